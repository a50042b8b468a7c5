"""Killed, out of space, out of order, read-only, locked: nothing lost, nothing half done.

support/faults.py does the work in processes of its own, of which a small C library (fault_shim.c)
kills one at its n-th change to the files. Here n goes in steps; `make campaign` takes
every one.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeDatasette
from datasette.app import Datasette
from support import decoder, faults
from support.unwritable import unwritable

from datasette_secrets import (
    DatabaseUnavailable,
    envelope,
    get_secret,
    health,
    rotation,
    service,
    set_secret,
)
from datasette_secrets.instance import get_instance

HERE = Path(__file__).parent
JOURNALS = ("wal", "delete")
COMMANDS = [name for name in faults.OPERATIONS if name != "careless"]


def build_shim(folder: Path) -> Path | None:
    """The compiled library, or None where there is no compiler or no LD_PRELOAD."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    built = folder / "fault_shim.so"
    subprocess.run(
        [
            compiler,
            "-shared",
            "-fPIC",
            "-O1",
            "-o",
            built,
            HERE / "support/fault_shim.c",
            "-ldl",
        ],
        check=True,
        timeout=300,
    )
    return built


@pytest.fixture(scope="session")
def fault_shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = build_shim(tmp_path_factory.mktemp("shim"))
    if built is None:
        # The shim is C, and only Linux loads it with LD_PRELOAD. CI has both.
        pytest.skip("needs Linux and a C compiler")  # for LD_PRELOAD
    return built


def run_faults(
    shim: Path, jobs: Any, seconds: int = 300
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "support.faults"],
        cwd=HERE,
        input=json.dumps(jobs),
        text=True,
        capture_output=True,
        check=False,
        env={**os.environ, "LD_PRELOAD": str(shim)},
        timeout=seconds,
    )


Reports = list[tuple[dict[str, Any], dict[str, Any]]]


def reports(shim: Path, jobs: list[dict[str, Any]], *, seconds: int = 300) -> Reports:
    """Run jobs, in as many processes as there are processors: each with its report."""
    processes = os.cpu_count() or 1
    shares = [jobs[number::processes] for number in range(processes)]

    def run(share: list[dict[str, Any]]) -> Reports:
        done = run_faults(shim, share, seconds)
        assert done.returncode == 0, done.stderr
        return list(zip(share, json.loads(done.stdout), strict=True))

    with ThreadPoolExecutor(processes) as pool:
        return [each for done in pool.map(run, shares) for each in done]


def jobs(mode: str, step: int, names: list[str] = COMMANDS) -> list[dict[str, Any]]:
    kinds = [(name, journal) for name in names for journal in JOURNALS]
    return [
        {
            "operation": name,
            "journal": journal,
            "mode": mode,
            "step": step,
            "first": number,
        }
        for number, (name, journal) in enumerate(kinds)
    ]


REWRITE = ["set", "rotate", "destroy"]
RESEAL = ["set", "rotate-new-data-keys", "destroy"]
START = ["first-start"]
SAMPLE = [
    *jobs("kill-before", 29),
    *jobs("kill-before", 14, ["careless"])[:1],
    *jobs("kill-torn", 25, REWRITE),
    *jobs("kill-after", 25, REWRITE),
    *jobs("io-error", 25, RESEAL),
    *jobs("disk-full", 25, RESEAL),
    *(
        job
        for mode in ("kill-torn", "io-error", "disk-full")
        for job in jobs(mode, 51, START)
    ),
]


@pytest.fixture(scope="module")
def tried(fault_shim: Path) -> Callable[..., Reports]:
    """`tried(mode, names)`: the reports of these operations. All jobs are run at once."""
    all_reports = reports(fault_shim, SAMPLE)

    def of(mode: str, names: list[str]) -> Reports:
        found = [
            (job, report)
            for job, report in all_reports
            if job["mode"] == mode and job["operation"] in names
        ]
        assert found
        return found

    return of


def test_killed_at_any_write_nothing_is_lost_and_the_same_command_finishes(
    tried: Callable[..., Reports],
) -> None:
    for job, report in tried("kill-before", COMMANDS):
        assert not report["wrong"], (job, report["wrong"])
        assert report["stopped"] > 0


@pytest.mark.parametrize("mode", ["kill-torn", "kill-after"])
def test_killed_in_the_middle_of_a_write_nothing_is_lost(
    tried: Callable[..., Reports], mode: str
) -> None:
    for job, report in tried(mode, REWRITE):
        assert not report["wrong"], (job, report["wrong"])
        assert report["stopped"] > 0


@pytest.mark.parametrize("mode", ["io-error", "disk-full"])
def test_an_error_of_the_disk_is_said_and_nothing_is_lost(
    tried: Callable[..., Reports], mode: str
) -> None:
    for job, report in tried(mode, RESEAL):
        assert not report["wrong"], (job, report["wrong"])
        assert report["errors"].keys() <= {"database-unavailable"}, job


@pytest.mark.parametrize("mode", ["kill-torn", "io-error", "disk-full"])
def test_a_first_start_that_fails_converts_all_or_nothing_and_the_next_one_finishes(
    tried: Callable[..., Reports], mode: str
) -> None:
    for job, report in tried(mode, START):
        assert not report["wrong"], (job, report["wrong"])
        assert report["changes"] > 30


def test_a_command_that_does_half_its_work_would_be_found(
    tried: Callable[..., Reports],
) -> None:
    [(_, report)] = tried("kill-before", ["careless"])
    assert report["wrong"]


@pytest.mark.parametrize("journal", JOURNALS)
async def test_a_running_server_reads_on_where_a_writer_was_killed(
    fault_shim: Path, make_datasette: MakeDatasette, internal: str, journal: str
) -> None:
    with closing(sqlite3.connect(internal)) as conn:
        conn.execute(f"pragma journal_mode = {journal}").fetchall()
    server = make_datasette(*faults.RING)
    await faults.fill(server)
    before = await get_secret(server, "SECRET_1")
    for at in (2, 5, 8):
        job = {
            "operation": "set",
            "journal": journal,
            "mode": "kill-before",
            "path": internal,
            "at": at,
        }
        assert run_faults(fault_shim, job).returncode == -9
        found = await get_secret(server, "SECRET_1")
        assert found in (before, "the new value " + faults.FILLER)
        await set_secret(server, "SECRET_2", "written after")
        assert await get_secret(server, "SECRET_2") == "written after"


STEP_BACK = """
import asyncio, sys, time
sys.path.insert(0, sys.argv[2])
from support import faults
from datasette_secrets import get_secret, set_secret, store
from datasette_secrets.instance import get_instance, stop

async def main():
    shim, datasette = faults.shim(), faults.datasette_on(sys.argv[1], *faults.RING)
    db = get_instance(datasette).db
    for hours in (0, -24, 24):
        shim.fault_clock(hours * 3600)
        now = time.strftime("%Y-%m-%d %H", time.gmtime())
        await set_secret(datasette, "A", f"at {hours}")
        assert await get_secret(datasette, "A", f"actor {hours}") == f"at {hours}"
        newest = (await store.history(db, "A"))[0]
        assert newest.created_at[:13] == newest.last_used_at[:13] == now
        assert newest.last_used_by == f"actor {hours}"
    # One row, used by a clock that is ahead and then set right.
    shim.fault_clock(-24 * 3600)
    now = time.strftime("%Y-%m-%d %H", time.gmtime())
    assert await get_secret(datasette, "A", "right") == "at 24"
    newest = (await store.history(db, "A"))[0]
    assert (newest.version, newest.last_used_by) == (3, "right")
    assert newest.last_used_at[:13] == now
    datasette.close()

asyncio.run(main())
"""


def test_a_clock_that_steps_back_or_ahead_changes_no_order(
    fault_shim: Path, internal: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STEP_BACK, internal, HERE],
        env={**os.environ, "LD_PRELOAD": str(fault_shim)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, "")


# Files that cannot be written. To root, permissions prove nothing: these are real.


@pytest.mark.parametrize("journal", JOURNALS)
async def test_a_full_disk_refuses_what_is_new_and_keeps_what_there_is(
    small_disk: Path, make_datasette: MakeDatasette, master_key: str, journal: str
) -> None:
    path = str(small_disk / "internal.db")
    with closing(sqlite3.connect(path)) as conn:
        conn.execute(f"pragma journal_mode = {journal}").fetchall()
    datasette = make_datasette(master_key, internal=path)
    stored = 0
    with pytest.raises(DatabaseUnavailable, match="full"):
        for stored in range(100):
            await set_secret(datasette, f"SECRET_{stored}", "x" * 20_000)
    assert 2 < stored < 40
    for number in range(stored):
        value = await get_secret(datasette, f"SECRET_{number}", "ann")
        assert value == "x" * 20_000
    assert await get_secret(datasette, f"SECRET_{stored}") is None
    ring = (envelope.generate_master_key(), master_key)
    rotating = make_datasette(*ring, internal=path)
    with pytest.raises(DatabaseUnavailable):
        await rotation.rotate(rotating, new_data_keys=True)
    assert len(list(decoder.open_file(path, *ring))) == stored

    # With room again, the same calls finish.
    subprocess.run(
        ["mount", "-o", "remount,size=4m", small_disk], check=True, timeout=300
    )
    await set_secret(datasette, f"SECRET_{stored}", "small")
    assert (await rotation.rotate(rotating, new_data_keys=True)).complete


@pytest.fixture
async def immutable_file(
    make_datasette: MakeDatasette, master_key: str, internal: str
) -> AsyncIterator[str]:
    """The path of a database that holds A, and that not even root can change."""
    datasette = make_datasette(master_key)
    await datasette.invoke_startup()
    await set_secret(datasette, "A", "a value")
    datasette.close()
    with unwritable(internal):
        yield internal


async def test_a_read_only_file_is_read_and_every_change_is_refused(
    immutable_file: str, make_datasette: MakeDatasette, master_key: str
) -> None:
    datasette = make_datasette(envelope.generate_master_key(), master_key)
    assert "cannot be written" in health.why_read_only(get_instance(datasette))
    assert await get_secret(datasette, "A", "ann") == "a value"
    for change in (
        lambda: set_secret(datasette, "A", "another"),
        lambda: service.delete_secret(datasette, "A"),
        lambda: service.roll_back(datasette, "A", 1),
        lambda: service.destroy_versions(datasette, "A", [1]),
        lambda: rotation.rotate(datasette),
    ):
        with pytest.raises(DatabaseUnavailable, match="read-only"):
            await change()
    assert await get_secret(datasette, "A") == "a value"


async def test_a_lock_that_lasts_is_said_and_reads_go_on(
    datasette: Datasette, internal: str
) -> None:
    await set_secret(datasette, "A", "a value")

    def wait_less(conn: sqlite3.Connection) -> None:
        conn.execute("pragma busy_timeout = 50").fetchall()

    await datasette.get_internal_database().execute_write_fn(
        wait_less, transaction=False
    )
    with closing(sqlite3.connect(internal)) as other:
        other.execute("begin immediate")
        assert await get_secret(datasette, "A", "ann") == "a value"
        with pytest.raises(DatabaseUnavailable, match="another process holds its lock"):
            await set_secret(datasette, "A", "another")
        with pytest.raises(DatabaseUnavailable, match="another process holds its lock"):
            await service.delete_secret(datasette, "A")
    assert await set_secret(datasette, "A", "another") == 2


@pytest.mark.parametrize("damage", ["header", "middle", "truncated"])
async def test_a_damaged_file_is_an_error_and_never_none(
    datasette: Datasette,
    make_datasette: MakeDatasette,
    master_key: str,
    internal: str,
    damage: str,
) -> None:
    await set_secret(datasette, "A", "a value " * 2_000)
    datasette.close()
    file = Path(internal)
    content = bytearray(file.read_bytes())
    if damage == "header":
        content[:100] = os.urandom(100)
    elif damage == "middle":
        content[4096:] = os.urandom(len(content) - 4096)
    else:
        del content[4096:]
    file.write_bytes(content)
    with pytest.raises(DatabaseUnavailable):
        await get_secret(make_datasette(master_key), "A")


async def test_a_table_that_cannot_be_read_does_not_stop_the_server_and_is_said(
    make_datasette: MakeDatasette,
    master_key: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "named.db"
    with closing(sqlite3.connect(file)) as conn:
        conn.execute("create table t (a)")
    datasette = make_datasette(master_key, database="named", files=[str(file)])
    await set_secret(datasette, "A", "a value " * 2_000)
    datasette.close()
    content = bytearray(file.read_bytes())
    content[4096:] = os.urandom(len(content) - 4096)
    file.write_bytes(content)
    server = make_datasette(master_key, database="named", files=[str(file)])
    await server.invoke_startup()
    assert "damaged: restore it from a backup" in capsys.readouterr().err
    with pytest.raises(DatabaseUnavailable):
        await get_secret(server, "A")
