"""A table that 0.x made becomes ours in place, whatever is in it, and loses nothing."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeDatasette
from datasette.app import Datasette
from support import zero
from support.unwritable import unwritable

from datasette_secrets import (
    DatabaseUnavailable,
    NeedsUpgrade,
    envelope,
    get_secret,
    set_secret,
    upgrade,
)


def rows(path: str, columns: str = "name, version, encrypted") -> list[tuple[Any, ...]]:
    conn = sqlite3.connect(path)
    found = conn.execute(f"select {columns} from datasette_secrets order by id")
    try:
        return found.fetchall()
    finally:
        conn.close()


def served(path: str, name: str) -> bytes | None:
    conn = sqlite3.connect(path)
    try:
        return zero.served(conn, name)
    finally:
        conn.close()


def indexes(path: str) -> set[tuple[str, int]]:
    conn = sqlite3.connect(path)
    found = {row[1:3] for row in conn.execute("pragma index_list(datasette_secrets)")}
    conn.close()
    return found


async def start(datasette: Datasette) -> Datasette:
    await datasette.invoke_startup()
    return datasette


@pytest.fixture
async def opened_before(make_datasette: MakeDatasette, internal: str) -> str:
    """An internal database in which Datasette has made its own tables."""
    datasette = await start(make_datasette())
    await datasette.refresh_schemas()
    datasette.close()
    return internal


UNIQUE = ("datasette_secrets_name_version", 1)


#: The configuration of these tests has another one, so that no value is upgraded.
LOST_KEY = envelope.generate_master_key()


async def test_migration_changes_no_column_of_a_row_that_no_key_opens(
    make_datasette: MakeDatasette, opened_before: str, master_key: str
) -> None:
    zero.write(
        opened_before,
        [
            (f"NAME_{n % 7}", n // 7 + 1, zero.token(LOST_KEY, str(n)))
            for n in range(50)
        ],
        note="a note",
        deleted_at="2025-05-05 05:05:05",
        deleted_by="somebody",
        last_used_at="2025-04-04 04:04:04",
        last_used_by="a plugin",
    )
    before = rows(opened_before, f"{zero.COLUMNS}, encrypted")

    await start(make_datasette(master_key))

    assert rows(opened_before, f"{zero.COLUMNS}, encrypted") == before
    assert set(rows(opened_before, "wrapped_key, envelope_version")) == {(None, None)}
    assert UNIQUE in indexes(opened_before)


async def test_migration_keeps_a_column_that_only_0_1a0_had(
    make_datasette: MakeDatasette, internal: str, master_key: str
) -> None:
    zero.write(internal)
    conn = sqlite3.connect(internal)
    with conn:
        conn.execute("alter table datasette_secrets add column redacted text")
        zero.insert(conn, "A", 1, zero.token(master_key, "a"), redacted="…")
    conn.close()

    await start(make_datasette(master_key))
    assert rows(internal, "redacted") == [("…",)]


@pytest.mark.parametrize(
    "versions",
    [
        [1, 1],
        [1, 2, 2, 2, 3],
        [3, 3, 1, 1, 2, 2],
        [2, 1, 2, 1, 2],
        [7, 7, 9],
        [0, 0],
        [-1, -1, 0, 1],
        ["one", "one", 1],
        [1.5, 1.5, 1, 2],
        [b"\x01", "one", 3, 3],
        [2**62, 2**62, 1],
        [2**63 - 1, 2**63 - 1],
        ["x", 1],
        [0],
        [-(2**63)],
        [1.5],
        ["latest"],
        [b"\x01"],
    ],
    ids=str,
)
async def test_versions_become_numbers_of_their_own_in_the_order_that_0_x_served(
    make_datasette: MakeDatasette, opened_before: str, master_key: str, versions: Any
) -> None:
    zero.write(
        opened_before,
        [("A", version, b"%d" % number) for number, version in enumerate(versions)]
        + [("B", 1, b"b1"), ("B", 4, b"b4")],
    )
    order = in_order(opened_before)
    newest = served(opened_before, "A")

    await start(make_datasette(master_key))

    numbers = [row[1] for row in rows(opened_before) if row[0] == "A"]
    assert len(set(numbers)) == len(versions)
    assert all(type(number) is int and number > 0 for number in numbers)
    assert in_order(opened_before) == order
    assert served(opened_before, "A") == newest
    assert [row[1] for row in rows(opened_before) if row[0] == "B"] == [1, 4]
    assert UNIQUE in indexes(opened_before)


def in_order(path: str) -> list[bytes]:
    """The values of A, oldest first; of one version twice, 0.x served the lowest id."""
    conn = sqlite3.connect(path)
    found = conn.execute(
        "select encrypted from datasette_secrets where name = 'A' "
        "order by version, id desc"
    ).fetchall()
    conn.close()
    return [row[0] for row in found]


async def test_the_lowest_number_of_a_doubled_version_does_not_grow(
    make_datasette: MakeDatasette, internal: str, master_key: str
) -> None:
    zero.write(internal, [("A", 1, b"1"), ("A", 2, b"2"), ("A", 2, b"2 again")])
    await start(make_datasette(master_key))
    assert [row[1] for row in rows(internal)] == [1, 3, 2]


async def test_a_row_without_a_value_reads_as_not_set(
    make_datasette: MakeDatasette, internal: str, master_key: str
) -> None:
    zero.write(internal, [("A", 1, zero.token(master_key, "a")), ("A", 2, None)])
    datasette = await start(make_datasette(master_key))
    assert await get_secret(datasette, "A") is None


async def test_a_row_of_0_x_that_came_after_the_first_start_never_opens_in_a_server(
    make_datasette: MakeDatasette,
    internal: str,
    master_key: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (await start(make_datasette(master_key))).close()
    conn = sqlite3.connect(internal)
    with conn:
        zero.insert(conn, "A", 1, zero.token(master_key, "a"))
    conn.close()
    datasette = await start(make_datasette(master_key))

    with pytest.raises(NeedsUpgrade, match="datasette secrets upgrade"):
        await get_secret(datasette, "A")
    assert "datasette secrets upgrade" in capsys.readouterr().err


@pytest.mark.parametrize("version", [1, 4])
async def test_a_value_set_before_the_upgrade_is_newer_than_what_0_x_stored(
    make_datasette: MakeDatasette, internal: str, master_key: str, version: int
) -> None:
    zero.write(internal, [("A", version, zero.token(master_key, "old"))])
    datasette = await start(make_datasette(master_key))

    assert await set_secret(datasette, "A", "new") == version + 1
    assert await get_secret(datasette, "A") == "new"
    report = await upgrade.upgrade(datasette)
    assert report.complete
    assert await get_secret(datasette, "A") == "new"


START = """
import asyncio, sys
from datasette.app import Datasette

datasette = Datasette(
    internal=sys.argv[1],
    config={"plugins": {"datasette-secrets": {"encryption-key": sys.argv[2]}}},
)
print("ready", flush=True)
sys.stdin.readline()
asyncio.run(datasette.invoke_startup())
datasette.close()
"""


async def test_three_servers_starting_at_once_on_one_file_migrate_it_once(
    opened_before: str, master_key: str
) -> None:
    zero.write(
        opened_before, [("A", 1 + n // 2, b"%d" % n) for n in range(1_000)], note="n"
    )
    order = in_order(opened_before)

    servers = [
        subprocess.Popen(
            [sys.executable, "-c", START, opened_before, master_key],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for server in servers:
        assert server.stdout and server.stdout.readline() == "ready\n"
    for server in servers:
        assert server.stdin
        server.stdin.write("go\n")
        server.stdin.flush()
    for server in servers:
        _, errors = server.communicate(timeout=60)
        assert server.returncode == 0, errors.splitlines()[-1:]

    assert in_order(opened_before) == order
    assert sorted(row[1] for row in rows(opened_before)) == list(range(1, 1_001))
    conn = sqlite3.connect(opened_before)
    assert conn.execute(
        "select name, count(*) from _sqlite_migrations "
        "where migration_set = 'datasette-secrets' group by name"
    ).fetchall() == [("0001_table", 1), ("0002_unique_versions", 1)]
    conn.close()


# Kills itself at the statement whose number it is given, counted over all connections
# and over what SQLite runs for it.
KILLED = """
import asyncio, os, signal, sys
from datasette.app import Datasette
from datasette.utils import sqlite3
from datasette_secrets import database, schema
from datasette_secrets.instance import get_instance

source, key, folder = sys.argv[1:]
statements = 0
last = None

def count(sql):
    global statements
    statements += 1
    if statements == last:
        os.kill(os.getpid(), signal.SIGKILL)

connect = sqlite3.connect

def connect_counting(*arguments, **options):
    conn = connect(*arguments, **options)
    conn.set_trace_callback(count)
    return conn

sqlite3.connect = connect_counting

def migrate(path):
    datasette = Datasette(
        internal=path,
        config={"plugins": {"datasette-secrets": {"encryption-key": key}}},
    )
    asyncio.run(database.write(get_instance(datasette).db, schema.apply_migrations))
    datasette.close()

last = 0
while True:
    last += 1
    path = f"{folder}/{last}.db"
    with open(source, "rb") as old, open(path, "wb") as new:
        new.write(old.read())
    child = os.fork()
    if not child:
        migrate(path)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        sys.exit(os.WEXITSTATUS(status))
"""


@pytest.mark.parametrize("journal_mode", ["delete", "wal"])
@pytest.mark.unix("forks")
async def test_a_migration_killed_at_any_statement_loses_nothing_and_is_finished_later(
    make_datasette: MakeDatasette,
    opened_before: str,
    master_key: str,
    tmp_path: Path,
    journal_mode: str,
) -> None:
    zero.write(
        opened_before,
        [("A", 1 + n // 2, b"%d" % n) for n in range(6)] + [("B", 0, b"b")],
    )
    conn = sqlite3.connect(opened_before)
    conn.execute(f"pragma journal_mode = {journal_mode}")
    conn.close()
    order = in_order(opened_before)
    before = rows(opened_before, "id, encrypted")
    folder = tmp_path / "killed"
    folder.mkdir()

    subprocess.run(
        [sys.executable, "-c", KILLED, opened_before, master_key, str(folder)],
        check=True,
        timeout=120,
    )

    killed = sorted(folder.glob("*.db"))
    assert len(killed) > 10
    for path in killed:
        await start(make_datasette(master_key, internal=str(path)))
        assert rows(str(path), "id, encrypted") == before
        assert in_order(str(path)) == order
        assert UNIQUE in indexes(str(path))


@pytest.mark.parametrize(
    "forgery",
    [
        "delete from _sqlite_migrations where migration_set = 'datasette-secrets'",
        "drop table _sqlite_migrations",
        "drop index datasette_secrets_name_version",
        "update _sqlite_migrations set name = 'un' || name "
        "where migration_set = 'datasette-secrets'",
    ],
)
async def test_a_record_of_migrations_that_was_tampered_with_harms_nothing(
    make_datasette: MakeDatasette, internal: str, master_key: str, forgery: str
) -> None:
    datasette = await start(make_datasette(master_key))
    for number in range(1, 4):
        await set_secret(datasette, "A", str(number))
    datasette.close()
    before = rows(internal)
    conn = sqlite3.connect(internal)
    with conn:
        conn.execute(forgery)
    conn.close()

    datasette = await start(make_datasette(master_key))
    assert rows(internal) == before
    assert await get_secret(datasette, "A") == "3"
    assert await set_secret(datasette, "A", "4") == 4
    assert UNIQUE in indexes(internal)


@pytest.mark.parametrize(
    "record",
    [
        "create table _sqlite_migrations (id integer primary key, migration_set text, "
        "name text, applied_at text, unique (migration_set, name))",
        # As sqlite-migrate made it.
        "create table _sqlite_migrations (migration_set text, name text, "
        "applied_at text, primary key (migration_set, name))",
    ],
)
async def test_a_table_of_0_x_is_migrated_though_the_record_says_that_it_was(
    make_datasette: MakeDatasette, tmp_path: Path, master_key: str, record: str
) -> None:
    path = str(tmp_path / "named.db")
    zero.write(path, [("A", 1, b"1"), ("A", 1, b"2")])
    conn = sqlite3.connect(path)
    with conn:
        conn.execute(record)
        conn.executemany(
            "insert into _sqlite_migrations (migration_set, name, applied_at) "
            "values ('datasette-secrets', ?, '')",
            [("0001_table",), ("0002_unique_versions",)],
        )
    conn.close()

    datasette = await start(make_datasette(master_key, database="named", files=[path]))
    assert sorted(row[1] for row in rows(path)) == [1, 2]
    assert UNIQUE in indexes(path)
    assert await set_secret(datasette, "A", "new") == 3


@pytest.mark.parametrize(
    "record",
    [
        "create table _sqlite_migrations (x)",
        "create table _sqlite_migrations (migration_set text)",
        "create view _sqlite_migrations as select 'datasette-secrets' as migration_set",
    ],
)
async def test_a_record_of_migrations_that_makes_no_sense_stops_changes_and_no_read(
    make_datasette: MakeDatasette,
    tmp_path: Path,
    master_key: str,
    record: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = str(tmp_path / "named.db")
    zero.write(path, [("A", 1, b"1"), ("A", 1, b"2")])
    conn = sqlite3.connect(path)
    with conn:
        conn.execute(record)
    conn.close()
    before = rows(path)

    datasette = await start(make_datasette(master_key, database="named", files=[path]))
    assert "secrets can be read but not changed" in capsys.readouterr().err
    with pytest.raises(NeedsUpgrade, match=r"0\.x"):
        await set_secret(datasette, "A", "new")
    with pytest.raises(DatabaseUnavailable, match="cannot be written"):
        await upgrade.upgrade(datasette)
    assert rows(path) == before
    assert await get_secret(datasette, "B") is None


async def test_a_table_that_cannot_be_migrated_is_read_as_it_is(
    make_datasette: MakeDatasette,
    tmp_path: Path,
    master_key: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = str(tmp_path / "named.db")
    zero.write(path, [("A", 1, zero.token(master_key, "a")), ("A", 1, b"doubled")])
    content = Path(path).read_bytes()
    datasette = make_datasette(master_key, database="named", files=[path])
    with unwritable(path):
        await start(datasette)
        assert "read-only" in capsys.readouterr().err
        with pytest.raises(NeedsUpgrade):
            await get_secret(datasette, "A")
        assert await get_secret(datasette, "B") is None
        report = await upgrade.upgrade(datasette, dry_run=True)
        assert report.found == [("A", 1), ("A", 1)]
        assert [problem.code for problem in report.problems] == ["cannot-upgrade"]
        with pytest.raises(DatabaseUnavailable, match="read-only"):
            await upgrade.upgrade(datasette)
    assert Path(path).read_bytes() == content


async def test_an_immutable_table_that_0_x_made_is_read_as_it_is(
    make_datasette: MakeDatasette, tmp_path: Path, master_key: str
) -> None:
    path = str(tmp_path / "named.db")
    zero.write(path, [("A", 1, zero.token(master_key, "a"))])
    content = Path(path).read_bytes()
    datasette = await start(
        make_datasette(master_key, database="named", immutables=[path])
    )
    with pytest.raises(NeedsUpgrade):
        await get_secret(datasette, "A")
    with pytest.raises(DatabaseUnavailable, match="immutable"):
        await upgrade.upgrade(datasette)
    assert Path(path).read_bytes() == content


async def test_0_x_still_serves_after_the_migration_what_no_key_opened(
    make_datasette: MakeDatasette, internal: str, master_key: str
) -> None:
    old = {f"NAME_{n}": zero.token(LOST_KEY, str(n)) for n in range(5)}
    zero.write(internal, [(name, 1, encrypted) for name, encrypted in old.items()])
    (await start(make_datasette(master_key))).close()

    assert {name: served(internal, name) for name in old} == old
    # It goes on writing, too: its own statement, unchanged.
    conn = sqlite3.connect(internal)
    with conn:
        conn.executescript(zero.SCHEMA)
        conn.execute(
            textwrap.dedent("""
            insert into datasette_secrets (
                name, version, note, encrypted, encryption_key_name,
                created_at, created_by, updated_at, updated_by
            ) values (
                :name,
                coalesce(
                    (select max(version) + 1 from datasette_secrets where name = :name), 1
                ),
                '', 'token', 'default', datetime('now'), 'root', datetime('now'), 'root'
            )"""),
            {"name": "NAME_1"},
        )
    token: object = zero.served(conn, "NAME_1")
    assert token == "token"
    conn.close()
