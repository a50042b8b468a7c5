"""Several processes on one database: nothing is lost, doubled or seen out of order."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeDatasette
from support import decoder, traffic

from datasette_secrets import envelope, get_secret, rotation, set_secret

HERE = Path(__file__).parent


def start(internal: str, *keys: str, **job: Any) -> subprocess.Popen[str]:
    """A process that does `job` on the database; support/traffic.py says what there is."""
    process = subprocess.Popen(
        [sys.executable, "-m", "support.traffic"],
        cwd=HERE,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps({"internal": internal, "keys": keys, **job}))
    process.stdin.close()
    process.stdin = None
    return process


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=600)  # the campaign runs this for longer
    assert (process.returncode, err) == (0, "")
    return dict(json.loads(out))


@pytest.mark.parametrize("journal", ["wal", "delete"])
def test_two_hundred_concurrent_sets_from_two_processes_give_each_version_once(
    internal: str, master_key: str, journal: str
) -> None:
    traffic.set_journal_mode(internal, journal)
    running = [
        start(internal, master_key, do="set", worker=worker, times=100)
        for worker in range(2)
    ]
    given = [version for each in running for version in finish(each)["versions"]]
    assert sorted(given) == list(range(1, 201))
    opened = list(decoder.open_file(internal, master_key))
    assert sorted(row.version for row in opened) == list(range(1, 201))
    assert len({row.value for row in opened}) == 200
    assert len({row.data_key for row in opened}) == 200


def test_of_all_that_expect_one_version_exactly_one_succeeds(
    internal: str, master_key: str
) -> None:
    running = [
        start(internal, master_key, do="compete", worker=worker, times=30)
        for worker in range(2)
    ]
    done = [finish(each) for each in running]
    # Each round, one of all that expected its version won, and the others were told.
    assert sum(each["won"] for each in done) == 30
    assert sum(each["lost"] for each in done) == 30
    versions = [row.version for row in decoder.open_file(internal, master_key)]
    assert sorted(versions) == list(range(1, 31))


def test_three_processes_migrate_one_file_at_once(
    internal: str, master_key: str
) -> None:
    traffic.make_table_of_0x(internal, master_key, names=20)
    running = [start(internal, master_key, do="migrate") for _ in range(3)]
    for each in running:
        assert finish(each)["legacy"] == 40
    rows = decoder.rows(internal)
    assert sorted((row["name"], row["version"]) for row in rows) == sorted(
        (f"SECRET_{number}", version) for number in range(20) for version in (1, 2)
    )


def test_two_servers_two_rotations_writers_and_readers_at_once(internal: str) -> None:
    report = traffic.run(start, finish, internal, seconds=2)
    assert report["problems"] == []
    # How many is a matter of the machine; that there were some is not.
    assert min(report["reads"], report["writes"], report["rotations"]) > 0


async def test_a_read_never_sees_a_version_older_than_one_already_seen(
    internal: str, make_datasette: MakeDatasette, master_key: str
) -> None:
    server = make_datasette(master_key)
    await set_secret(server, "SECRET", traffic.value_of(0, 0))
    writer = start(internal, master_key, do="set", worker=1, times=150)
    seen = []
    while writer.poll() is None:
        seen.append(await get_secret(server, "SECRET"))
    finish(writer)
    order = {
        row.value.decode(): row.version
        for row in decoder.open_file(internal, master_key)
    }
    versions = [order[value or ""] for value in seen]
    assert versions == sorted(versions)


async def test_a_server_with_both_keys_never_misses_a_read_during_a_rotation(
    internal: str, make_datasette: MakeDatasette, master_key: str
) -> None:
    new_key = envelope.generate_master_key()
    server = make_datasette(new_key, master_key)
    old_server = make_datasette(master_key)
    for number in range(300):
        await set_secret(old_server, f"SECRET_{number}", "a value")
    rotating = start(internal, new_key, master_key, do="rotate")
    reads = 0
    while rotating.poll() is None:
        assert await get_secret(server, f"SECRET_{reads % 300}") == "a value"
        reads += 1
    assert finish(rotating)["changed"] == 300
    assert reads > 0
    assert (await rotation.census(server)).removable == [
        decoder.key_id(decoder.master_key(master_key))
    ]
