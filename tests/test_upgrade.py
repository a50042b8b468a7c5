"""What 0.x stored is brought in: every value, by an explicit command, and nothing else."""

from __future__ import annotations

import base64
import functools
import itertools
import json
import os
import re
import sqlite3
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeDatasette
from datasette import hookimpl
from datasette.app import Datasette
from datasette.plugins import pm
from support import zero
from support.documents import blocks, section
from support.environments import environment, install

from datasette_secrets import (
    CannotOpen,
    NeedsUpgrade,
    SecretsError,
    envelope,
    get_secret,
    restore_secret,
    rotation,
    service,
    set_secret,
    store,
    upgrade,
)
from datasette_secrets.instance import get_instance

WHEEL = os.environ.get("WHEEL", "")  # set by scripts/dependents.py
OLD, NEW, OTHER = (envelope.generate_master_key() for _ in range(3))
NEW_ID = envelope.MasterKey.parse(NEW).id

# 0.x had no limits. What is larger than a value can be is left: see test_attacks.py.
VALUES = {
    "ONE_CHARACTER": "x",
    "ORDINARY": "sk-proj-0123456789abcdef",
    "UNICODE": "schlüssel-鍵-🔑",
    "LINES": "-----BEGIN KEY-----\r\nabc\n\n-----END KEY-----",
    "BLANKS": "  kept as it is\t",
    "WITH_NUL": "a\0b",
    "LONG": "long " * 13_107,
    "name of any kind / 鍵": "odd name",
}


def opened(make_datasette: MakeDatasette, *keys: str, **options: Any) -> Datasette:
    """As a command opens it: nothing is started."""
    return make_datasette(*keys, **options)


async def start(make_datasette: MakeDatasette, *keys: str, **options: Any) -> Datasette:
    datasette = opened(make_datasette, *keys, **options)
    await datasette.invoke_startup()
    return datasette


def write_values(path: str, key: str = OLD, **columns: Any) -> None:
    zero.write(
        path,
        [(name, 1, zero.token(key, value)) for name, value in VALUES.items()],
        **columns,
    )


def select(path: str, columns: str) -> list[Any]:
    conn = sqlite3.connect(path)
    rows = conn.execute(f"select {columns} from datasette_secrets order by id")
    found = rows.fetchall()
    conn.close()
    return found


def alter(path: str, sql: str, parameters: Iterable[Any] = ()) -> None:
    conn = sqlite3.connect(path)
    with conn:
        conn.execute(sql, tuple(parameters))
    conn.close()


async def differing(datasette: Datasette, values: dict[str, str]) -> list[str]:
    """The names whose value is another one: a failing test shows no value."""
    return [
        name
        for name, value in values.items()
        if await get_secret(datasette, name) != value
    ]


async def test_every_value_is_the_same_after_upgrade_and_rotation_and_without_the_old_key(
    make_datasette: MakeDatasette, internal: str
) -> None:
    write_values(internal)
    datasette = opened(make_datasette, OLD)
    report = await upgrade.upgrade(datasette)
    assert report.complete
    assert report.changed == len(VALUES)
    assert await differing(datasette, VALUES) == []
    datasette.close()

    datasette = await start(make_datasette, NEW, OLD)
    assert await differing(datasette, VALUES) == []
    assert (await rotation.rotate(datasette)).complete
    assert await differing(datasette, VALUES) == []
    datasette.close()

    assert await differing(await start(make_datasette, NEW), VALUES) == []


async def test_upgrade_seals_under_a_new_primary_key_with_the_old_one_in_the_ring(
    make_datasette: MakeDatasette, internal: str
) -> None:
    write_values(internal)
    alter(
        internal,
        "update datasette_secrets set encrypted = ? where name = 'UNICODE'",
        [zero.token(OTHER, VALUES["UNICODE"])],
    )
    datasette = opened(make_datasette, NEW, OLD, OTHER)
    assert (await upgrade.upgrade(datasette)).complete
    assert set(select(internal, "encryption_key_name, envelope_version")) == {
        (NEW_ID, 1)
    }
    datasette.close()

    assert await differing(await start(make_datasette, NEW), VALUES) == []


async def test_upgrade_changes_nothing_of_a_row_but_its_envelope(
    make_datasette: MakeDatasette, internal: str
) -> None:
    write_values(
        internal,
        note="a note",
        created_by="ann",
        updated_by="bob",
        deleted_at="2025-05-05 05:05:05",
        deleted_by="somebody",
        last_used_at="2025-04-04 04:04:04",
        last_used_by="a plugin",
    )
    others = zero.COLUMNS.replace("encryption_key_name, ", "")
    before = select(internal, others)
    datasette = opened(make_datasette, OLD)
    await upgrade.upgrade(datasette)

    assert select(internal, others) == before
    assert await get_secret(datasette, "ORDINARY") is None
    await restore_secret(datasette, "ORDINARY")
    assert await differing(datasette, {"ORDINARY": VALUES["ORDINARY"]}) == []


async def test_the_version_that_0_x_served_is_the_one_that_counts(
    make_datasette: MakeDatasette, internal: str
) -> None:
    order = [("1", 1), ("3, served", 2), ("2", 2), ("0", 1)]
    zero.write(
        internal, [("A", version, zero.token(OLD, value)) for value, version in order]
    )
    datasette = opened(make_datasette, OLD)
    assert (await upgrade.upgrade(datasette)).complete
    assert await get_secret(datasette, "A") == "3, served"
    newest = (await store.history(get_instance(datasette).db, "A"))[0]
    for version in range(1, newest.version + 1):
        await service.roll_back(datasette, "A", version)
    assert await get_secret(datasette, "A") == "3, served"


BAD = {
    "another key's": zero.token(OTHER, "a"),
    "garbage": b"not a token",
    "empty": b"",
    "text": "not a token: ünïcode",
    "cut short": zero.token(OLD, "a")[:-8],
    "changed": zero.token(OLD, "a")[:-8] + b"AAAAAAA=",
    "no UTF-8": zero.token(OLD, b"\xff\xfe"),
    "number": 5,
}


async def test_what_does_not_open_is_named_and_left_and_the_rest_brought_in(
    make_datasette: MakeDatasette, internal: str
) -> None:
    zero.write(internal, [(name, 1, encrypted) for name, encrypted in BAD.items()])
    zero.write(internal, [(b"name", 1, zero.token(OLD, "a"))])
    write_values(internal)
    before = select(internal, "name, version, encrypted, encryption_key_name")[
        : len(BAD)
    ]
    datasette = opened(make_datasette, OLD)

    report = await upgrade.upgrade(datasette)

    assert not report.complete
    assert report.changed == len(VALUES)
    assert len(report.found) == len(BAD) + 1 + len(VALUES)
    assert [problem.name for problem in report.problems] == [*BAD, "b'name'"]
    assert {problem.code for problem in report.problems} == {"cannot-upgrade"}
    assert all("destroy" in problem.remedy for problem in report.problems)
    after = select(internal, "name, version, encrypted, encryption_key_name")
    assert after[: len(BAD)] == before
    assert await differing(datasette, VALUES) == []
    for name in BAD:
        with pytest.raises(NeedsUpgrade):
            await get_secret(datasette, name)


async def test_a_token_that_sqlite_holds_as_text_is_brought_in(
    make_datasette: MakeDatasette, internal: str
) -> None:
    zero.write(internal, [("A", 1, zero.token(OLD, "a").decode())])
    datasette = opened(make_datasette, OLD)
    assert (await upgrade.upgrade(datasette)).complete
    assert await get_secret(datasette, "A") == "a"


async def test_the_wrong_key_changes_nothing(
    make_datasette: MakeDatasette, internal: str
) -> None:
    write_values(internal)
    before = select(internal, f"{zero.COLUMNS}, encrypted")
    report = await upgrade.upgrade(opened(make_datasette, NEW))
    assert (report.changed, len(report.problems)) == (0, len(VALUES))
    assert select(internal, f"{zero.COLUMNS}, encrypted") == before


async def test_a_dry_run_names_everything_and_changes_no_byte(
    make_datasette: MakeDatasette, internal: str, tmp_path: Path
) -> None:
    path = str(tmp_path / "named.db")
    write_values(path)
    zero.write(path, [("BAD", 1, b"not a token")])
    content = Path(path).read_bytes()

    # As the shell does it: nothing is started.
    datasette = make_datasette(OLD, database="named", files=[path])
    report = await upgrade.upgrade(datasette, dry_run=True)

    assert report.found == [(name, 1) for name in [*VALUES, "BAD"]]
    assert [problem.name for problem in report.problems] == ["BAD"]
    assert (report.changed, report.complete, report.clean_up) == (0, False, None)
    assert Path(path).read_bytes() == content


async def test_upgrade_run_again_finds_nothing_and_changes_nothing(
    make_datasette: MakeDatasette, internal: str
) -> None:
    write_values(internal)
    datasette = opened(make_datasette, OLD)
    await upgrade.upgrade(datasette)
    before = select(internal, "*")
    report = await upgrade.upgrade(datasette)
    assert (report.found, report.changed, report.complete) == ([], 0, True)
    assert select(internal, "*") == before


@pytest.mark.parametrize("journal_mode", ["delete", "wal"])
async def test_no_token_is_left_in_the_files_after_upgrade(
    make_datasette: MakeDatasette, internal: str, journal_mode: str
) -> None:
    # What 0.x has replaced lies in unused parts of its pages.
    write_values(internal)
    conn = sqlite3.connect(internal)
    conn.execute("pragma secure_delete = off")
    conn.execute(f"pragma journal_mode = {journal_mode}")
    with conn:
        conn.execute("update datasette_secrets set note = 'another note'")
        zero.insert(conn, "GONE", 1, zero.token(OLD, "gone"))
    with conn:
        conn.execute("delete from datasette_secrets where name = 'GONE'")
    conn.close()

    report = await upgrade.upgrade(opened(make_datasette, OLD))

    assert report.clean_up and report.clean_up.remains is None
    for file in Path(internal).parent.glob("internal.db*"):
        assert re.search(rb"gAAAAA[\w-]{20}", file.read_bytes()) is None


class Events:
    """A plugin that listens."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    @hookimpl
    def track_event(self, event: Any) -> None:
        if event.name == "upgrade-secrets":
            self.heard.append(event)


async def test_an_upgrade_that_changed_something_is_announced_once(
    make_datasette: MakeDatasette, internal: str
) -> None:
    events = Events()
    pm.register(events)
    try:
        datasette = await start(make_datasette, OLD)
        write_values(internal)
        await upgrade.upgrade(datasette, dry_run=True)
        await upgrade.upgrade(datasette, actor_id="ann")
        await upgrade.upgrade(datasette, actor_id="ann")
    finally:
        pm.unregister(events)
    [event] = events.heard
    assert (event.versions, event.actor) == (len(VALUES), {"id": "ann"})


async def test_upgrade_works_in_batches_of_any_size(
    make_datasette: MakeDatasette, internal: str
) -> None:
    for size in (1, 3, 1_000):
        Path(internal).unlink(missing_ok=True)
        write_values(internal)
        datasette = opened(make_datasette, OLD)
        steps: list[int] = []
        report = await upgrade.upgrade(
            datasette, batch_size=size, progress=steps.append
        )
        assert report.complete
        assert max(steps) <= size and sum(steps) == len(VALUES)
        assert await differing(datasette, VALUES) == []
        datasette.close()


async def test_a_row_that_0_x_writes_meanwhile_is_brought_in_too(
    make_datasette: MakeDatasette, internal: str
) -> None:
    write_values(internal)
    datasette = opened(make_datasette, OLD)
    late = itertools.count(2)

    def write(_: int) -> None:
        if (version := next(late)) < 5:
            token = zero.token(OLD, str(version))
            zero.write(internal, [("ORDINARY", version, token)])

    report = await upgrade.upgrade(datasette, batch_size=2, progress=write)
    assert report.complete
    assert report.changed == len(report.found) == len(VALUES) + 3
    assert await get_secret(datasette, "ORDINARY") == "4"


# Runs the upgrade on copy after copy and kills it some statements later each time.
KILLED = """
import asyncio, os, signal, sys
from datasette.app import Datasette
from datasette.utils import sqlite3
from datasette_secrets import envelope, fernet, upgrade as upgrading

source, key, folder = sys.argv[1:]
fernet.require_fernet()
statements = last = 0
connect = sqlite3.connect

def count(sql):
    global statements
    statements += 1
    if statements == last:
        os.kill(os.getpid(), signal.SIGKILL)

def connect_counting(*arguments, **options):
    conn = connect(*arguments, **options)
    conn.set_trace_callback(count)
    return conn

sqlite3.connect = connect_counting

def upgrade(path):
    datasette = Datasette(
        internal=path,
        config={"plugins": {"datasette-secrets": {"encryption-key": key}}},
    )
    asyncio.run(upgrading.upgrade(datasette, batch_size=3))
    datasette.close()

while True:
    last += 4
    path = f"{folder}/{last}.db"
    with open(source, "rb") as old, open(path, "wb") as new:
        new.write(old.read())
    child = os.fork()
    if not child:
        upgrade(path)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        sys.exit(os.WEXITSTATUS(status))
"""


@pytest.mark.unix("forks")
async def test_an_upgrade_killed_anywhere_loses_nothing_and_is_finished_later(
    make_datasette: MakeDatasette, internal: str, tmp_path: Path
) -> None:
    (opened(make_datasette)).close()
    write_values(internal)
    folder = tmp_path / "killed"
    folder.mkdir()

    subprocess.run(
        [sys.executable, "-c", KILLED, internal, OLD, str(folder)],
        check=True,
        timeout=120,
    )

    killed = sorted(folder.glob("*.db"))
    assert len(killed) > 10
    for path in killed:
        datasette = make_datasette(OLD, internal=str(path))
        report = await upgrade.upgrade(datasette)
        assert report.complete
        assert report.clean_up and report.clean_up.remains is None
        assert await differing(datasette, VALUES) == []
        datasette.close()


@pytest.mark.parametrize(
    "planting",
    [
        "insert into datasette_secrets (name, version, encrypted, encryption_key_name) "
        "values ('ORDINARY', 2, :token, 'default')",
        "update datasette_secrets set encrypted = :token, wrapped_key = null, "
        "envelope_version = null where name = 'ORDINARY'",
        "update datasette_secrets set encrypted = :token, wrapped_key = null, "
        "envelope_version = null, encryption_key_name = 'default' "
        "where name = 'ORDINARY'",
        "update datasette_secrets set encrypted = :token where name = 'ORDINARY'",
        "update datasette_secrets set encrypted = :token, wrapped_key = null "
        "where name = 'ORDINARY'",
        "update datasette_secrets set encrypted = :token, envelope_version = null "
        "where name = 'ORDINARY'",
    ],
)
async def test_a_token_planted_after_the_upgrade_opens_nowhere_and_rotate_launders_it_not(
    make_datasette: MakeDatasette, internal: str, planting: str
) -> None:
    write_values(internal)
    datasette = opened(make_datasette, OLD)
    assert (await upgrade.upgrade(datasette)).complete
    conn = sqlite3.connect(internal)
    with conn:
        conn.execute(planting, {"token": zero.token(OLD, "planted")})
    conn.close()
    planted = "encrypted, wrapped_key, envelope_version, encryption_key_name"
    before = [row for row in select(internal, planted) if row[0].startswith(b"gAAAAA")]
    assert len(before) == 1

    for keys in ((OLD,), (NEW, OLD)):
        datasette = await start(make_datasette, *keys)
        with pytest.raises((NeedsUpgrade, CannotOpen)):
            await get_secret(datasette, "ORDINARY")
        for new_data_keys in (False, True):
            report = await rotation.rotate(
                datasette, skip_unopenable=True, new_data_keys=new_data_keys
            )
            with pytest.raises((NeedsUpgrade, CannotOpen)):
                await get_secret(datasette, "ORDINARY")
        assert not report.complete
        assert [problem.name for problem in report.problems] == ["ORDINARY"]
        after = [row[0] for row in select(internal, planted)]
        assert before[0][0] in after
        datasette.close()


async def test_without_the_extra_upgrade_says_what_to_install_and_changes_nothing(
    make_datasette: MakeDatasette, internal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_values(internal)
    before = select(internal, f"{zero.COLUMNS}, encrypted")
    datasette = opened(make_datasette, OLD)
    for module in ("cryptography", "cryptography.fernet"):
        monkeypatch.setitem(sys.modules, module, None)
    for dry_run in (True, False):
        with pytest.raises(
            SecretsError, match=r"install 'datasette-secrets\[fernet\]'"
        ):
            await upgrade.upgrade(datasette, dry_run=dry_run)
    assert select(internal, f"{zero.COLUMNS}, encrypted") == before


async def test_without_anything_to_bring_in_the_extra_is_not_needed(
    datasette: Datasette, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("cryptography", "cryptography.fernet"):
        monkeypatch.setitem(sys.modules, module, None)
    await set_secret(datasette, "A", "a")
    assert (await upgrade.upgrade(datasette)).complete


@pytest.mark.parametrize("value", [b"\xff not to be seen", b"not to be seen"])
def test_a_traceback_with_locals_shows_neither_key_nor_value(value: bytes) -> None:
    master_key = envelope.MasterKey.parse(OLD)
    token = zero.token(OLD, value)
    if value.isascii():
        token = token[:-4] + b"AAA="

    with pytest.raises(CannotOpen) as caught:
        envelope.upgrade(envelope.KeyRing([master_key]), "A", 1, token)

    error = caught.value
    assert error.__traceback__ and error.__context__ is error.__cause__ is None
    below_this_test = error.with_traceback(error.__traceback__.tb_next)
    shown = "".join(
        traceback.TracebackException.from_exception(
            below_this_test, capture_locals=True
        ).format()
    )
    raw = base64.urlsafe_b64decode(OLD)
    for what in (OLD, repr(raw)[2:-1], raw.hex(), "not to be seen"):
        assert what not in shown


# The real datasette-secrets of other days, each in an environment of its own.

RELEASES = [
    ("0.1a4", "datasette==1.0a13", "httpx<0.28"),
    ("0.2", "datasette==1.0a19", "httpx<0.28"),
    ("0.3a0", "datasette==1.0a24"),
    ("0.3a0", "datasette>=1.0a41"),
]

# Stores through 0.x's own form, reads through its own get_secret.
OF_0_X = """
import asyncio, json, sys
from datasette import hookimpl
from datasette.app import Datasette
from datasette.plugins import pm
from datasette_secrets import Secret, get_secret

job = json.load(sys.stdin)

class Waiting:
    __name__ = "waiting"

    @hookimpl
    def register_secrets(self):
        return [Secret(name) for name in job["names"]]

pm.register(Waiting())

async def main():
    datasette = Datasette(
        internal=job["internal"],
        config={
            "plugins": {"datasette-secrets": {"encryption-key": job["key"]}},
            "permissions": {"manage-secrets": {"id": "root"}},
        },
    )
    datasette.root_enabled = True
    await datasette.invoke_startup()
    cookies = {"ds_actor": datasette.sign({"a": {"id": "root"}}, "actor")}
    for name, value, note in job["store"]:
        path = "/-/secrets/" + name
        page = await datasette.client.get(path, cookies=cookies)
        token = page.cookies.get("ds_csrftoken") or ""
        stored = await datasette.client.post(
            path,
            data={"secret": value, "note": note, "csrftoken": token},
            cookies={**cookies, "ds_csrftoken": token},
        )
        assert stored.status_code == 302, stored.status_code
    values = {name: await get_secret(datasette, name, "reader") for name in job["names"]}
    print(json.dumps(values))

asyncio.run(main())
"""


def run_0_x(programs: Path, job: dict[str, Any]) -> dict[str, str]:
    """Do a job with a real release of 0.x; returns what it then reads."""
    done = subprocess.run(
        [programs / "python", "-c", OF_0_X],
        cwd=programs,  # where no checkout can stand in for the release
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr.splitlines()[-1]
    return dict(json.loads(done.stdout))


@pytest.fixture(params=RELEASES, ids=", ".join)
def release(
    request: pytest.FixtureRequest,
) -> Callable[[dict[str, Any]], dict[str, str]]:
    """`run_0_x` with one of the releases."""
    version, *requirements = request.param
    name = re.sub(r"[^a-z0-9.]+", "-", f"{version} {requirements[0]}")
    programs = environment(name, f"datasette-secrets=={version}", *requirements)
    return functools.partial(run_0_x, programs)


@pytest.mark.dependents
async def test_what_a_real_release_of_0_x_stored_is_brought_in(
    make_datasette: MakeDatasette, internal: str, release: Any
) -> None:
    stored: dict[str, str] = {}
    store_job = []
    for number in range(300):
        name = f"SECRET_{number % 60}"
        stored[name] = f"{number} {VALUES['UNICODE']} " + "x" * (number * 7)
        store_job.append((name, stored[name], f"note {number}"))
    job = {"internal": internal, "key": OLD, "names": list(stored), "store": store_job}
    assert release(job) == stored
    before = select(internal, zero.COLUMNS)
    assert len(before) == 300

    # No server has started yet: ours opens none, and 0.x still opens all.
    datasette = opened(make_datasette, OLD)
    with pytest.raises(NeedsUpgrade):
        await get_secret(datasette, "SECRET_0")
    datasette.close()
    assert release({**job, "store": [("SECRET_0", "later", "")]})["SECRET_0"] == "later"
    stored["SECRET_0"] = "later"
    before = select(internal, zero.COLUMNS)

    datasette = await start(make_datasette, OLD)
    assert get_instance(datasette).notices[0].startswith("301 versions")
    others = zero.COLUMNS.replace("encryption_key_name, ", "")
    assert select(internal, others) == [row[:4] + row[5:] for row in before]
    assert await differing(datasette, stored) == []
    # Every version, not only the newest.
    assert (await rotation.verify(datasette)).opened == 301
    datasette.close()

    datasette = await start(make_datasette, NEW, OLD)
    assert await differing(datasette, stored) == []
    assert (await rotation.rotate(datasette)).complete
    assert await differing(datasette, stored) == []

    # What the real release can do to the file now opens nothing, and is not laundered.
    assert release({**job, "names": [], "store": [("SECRET_1", "planted", "")]}) == {}
    with pytest.raises(NeedsUpgrade):
        await get_secret(datasette, "SECRET_1")
    assert not (await rotation.rotate(datasette, skip_unopenable=True)).complete
    with pytest.raises(NeedsUpgrade):
        await get_secret(datasette, "SECRET_1")
    del stored["SECRET_1"]
    datasette.close()

    assert await differing(await start(make_datasette, NEW), stored) == []


@pytest.mark.dependents
async def test_the_commands_of_the_readme_move_over_from_0_x_and_back(
    make_datasette: MakeDatasette, tmp_path: Path
) -> None:
    [commands] = blocks(section("README.md", "Moving over from 0.x"), "bash")
    programs = environment(
        "moving-over", "datasette-secrets==0.3a0", "datasette>=1.0a41"
    )
    back = ("--force-reinstall", "--no-deps", "datasette-secrets==0.3a0")
    install(programs, *back)
    internal, copy = str(tmp_path / "internal.db"), str(tmp_path / "internal-0.x.db")
    stored = {f"SECRET_{number}": f"value {number}" for number in range(20)}
    job = {
        "internal": internal,
        "key": OLD,
        "names": list(stored),
        "store": [(name, value, "") for name, value in stored.items()],
    }
    assert run_0_x(programs, job) == stored
    (tmp_path / "datasette.yaml").write_text(
        f"plugins:\n  datasette-secrets:\n    encryption-key: {OLD}\n"
    )

    done = subprocess.run(
        ["/bin/sh", "-e", "-c", commands],
        cwd=tmp_path,
        env={
            **os.environ,
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PIP_FIND_LINKS": str(Path(WHEEL).parent),
        },
        input="y\n",
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr.splitlines()[-1]
    assert (
        await differing(await start(make_datasette, OLD, internal=internal), stored)
        == []
    )

    install(programs, *back)
    assert run_0_x(programs, {**job, "internal": copy, "store": []}) == stored
