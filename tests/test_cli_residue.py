"""Gone means gone: no file of the database holds a replaced wrap or a destroyed value.

The rows are first written with `secure_delete` off, grow, and are moved between pages, so
that old copies lie about; then the bytes of every file are searched.
"""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing

import pytest
from support.console import Console, key_id

from datasette_secrets import envelope

JOURNALS = ("wal", "delete")
OLD, NEW = envelope.generate_master_key(), envelope.generate_master_key()
NAMES = [f"SECRET_{number}" for number in range(40)]


@pytest.fixture(params=JOURNALS)
async def littered(console: Console, request: pytest.FixtureRequest) -> Console:
    """Forty secrets of two versions, and many old copies of their rows."""
    console.key = OLD
    await console.fill(*NAMES, versions=2)
    console.sql(f"pragma journal_mode = {request.param}")
    console.sql(
        "pragma secure_delete = off",
        # Rows that grow do not fit their pages: these are split, and rows are moved.
        "update datasette_secrets set note = hex(zeroblob(400))",
        "update datasette_secrets set note = hex(zeroblob(1200)) where id % 3 = 0",
        "update datasette_secrets set note = null",
        "create table filler (x)",
        "insert into filler select hex(zeroblob(3000)) from datasette_secrets",
        "drop table filler",
    )
    console.configure(NEW, OLD)
    return console


def envelopes(console: Console, where: str = "1") -> tuple[list[bytes], list[bytes]]:
    """The wraps and the sealed values that the rows now hold."""
    rows = console.sql(
        f"select wrapped_key, encrypted from datasette_secrets where {where}"
    )
    return [row[0] for row in rows], [row[1] for row in rows]


def found_in_files(console: Console, wanted: list[bytes]) -> list[str]:
    """Where the first bytes, the middle or the end of any of these are found."""
    return [
        name
        for name, content in console.files().items()
        for each in wanted
        for part in (each[:24], each[40:64], each[-24:])
        if part in content
    ]


def journal_mode(console: Console) -> str:
    return str(console.sql("pragma journal_mode")[0][0])


def test_the_fixture_really_leaves_copies_behind(littered: Console) -> None:
    wraps, sealed = envelopes(littered)
    content = b"".join(littered.files().values())
    assert sum(content.count(each[:24]) for each in wraps + sealed) > len(wraps) * 2


def test_a_rotation_leaves_no_old_wrap(littered: Console) -> None:
    mode = journal_mode(littered)
    wraps, sealed = envelopes(littered)
    littered.ok("rotate-key")
    assert not found_in_files(littered, wraps)
    assert found_in_files(littered, sealed)
    assert journal_mode(littered) == mode


def test_new_data_keys_leave_no_old_value_either(littered: Console) -> None:
    wraps, sealed = envelopes(littered)
    littered.ok("rotate-key", "--new-data-keys")
    assert not found_in_files(littered, wraps + sealed)


def test_a_destroyed_version_leaves_nothing(littered: Console) -> None:
    wraps, sealed = envelopes(littered, "name = 'SECRET_7' and version = 1")
    littered.ok("destroy", "SECRET_7", "--all-but-newest", "--yes")
    assert not found_in_files(littered, wraps + sealed)
    assert littered.ok("get", "SECRET_7") == "SECRET_7 value 2\n"


def test_what_an_earlier_run_could_not_clean_up_the_next_one_does(
    littered: Console,
) -> None:
    """A rotation is killed when every row is re-wrapped and nothing cleaned up."""
    wraps, _ = envelopes(littered)
    # The last batch is committed while this reader keeps the clean-up waiting.
    with closing(sqlite3.connect(littered.internal, isolation_level=None)) as reader:
        if journal_mode(littered) == "wal":
            reader.execute("begin").close()
            reader.execute("select count(*) from datasette_secrets").fetchall()
        killed = littered.start("rotate-key", "--batch-size", "1")
        while littered.sql(
            "select count(*) from datasette_secrets "
            f"where encryption_key_name != '{key_id(NEW)}'"
        ) != [(0,)]:
            assert killed.poll() is None
        killed.kill()
        killed.communicate(timeout=60)
    littered.ok("rotate-key")
    assert not found_in_files(littered, wraps)


# Only a write-ahead log can be held.
@pytest.mark.parametrize("littered", ["wal"], indirect=True)
def test_a_log_that_another_process_holds_is_said_with_what_to_do(
    littered: Console,
) -> None:
    wraps, _ = envelopes(littered, "name = 'SECRET_7' and version = 1")
    with closing(sqlite3.connect(littered.internal, isolation_level=None)) as reader:
        reader.execute("begin").close()
        reader.execute("select count(*) from datasette_secrets").fetchall()
        # Not at once: while one waits for the log, the other cannot write.
        for arguments in (
            ("rotate-key",),
            ("destroy", "SECRET_7", "--version", "1", "--yes"),
        ):
            result = littered.run(*arguments)
            assert result.exit_code == 3
            assert "write-ahead log, which another process holds" in result.stderr
            assert "run 'datasette secrets rotate-key -c" in result.stderr
        assert found_in_files(littered, wraps)
    littered.ok("rotate-key")
    assert not found_in_files(littered, wraps)


@pytest.mark.parametrize("littered", ["wal"], indirect=True)
@pytest.mark.parametrize("trace", ["folder", "table"])
def test_what_litestream_leaves_makes_the_sentence_name_it(
    littered: Console, trace: str
) -> None:
    """tests/test_replication.py has a real Litestream."""
    if trace == "folder":
        (littered.folder / ".internal.db-litestream").mkdir()
    else:
        littered.sql("create table _litestream_seq (id integer primary key, seq int)")
    with closing(sqlite3.connect(littered.internal, isolation_level=None)) as reader:
        reader.execute("begin").close()
        reader.execute("select count(*) from datasette_secrets").fetchall()
        result = littered.run("rotate-key")
    assert result.exit_code == 3
    assert "which Litestream holds while it runs" in result.stderr
    result = littered.run("rotate-key")
    assert result.exit_code == 0
    assert result.stderr == (
        "Litestream's folder beside the database and its replica keep older copies "
        "until their retention ends\n"
    )


def test_a_view_with_the_name_of_a_litestream_table_is_no_litestream(
    littered: Console,
) -> None:
    littered.sql("create view _litestream_seq as select 1")
    result = littered.run("rotate-key")
    assert (result.exit_code, result.stderr) == (0, "")


def test_no_clean_up_renumbers_the_rows_of_other_tables(console: Console) -> None:
    console.ok("set", "A", "--create", input="a value")
    for sql in (
        "create table docs (title)",
        "insert into docs values ('apple'), ('banana'), ('cherry')",
        "create virtual table found using fts5 (title, content='docs')",
        "insert into found (found) values ('rebuild')",
    ):
        console.sql(sql)
    # A column may have the name of the row number, and a table be named by bytes.
    console.sql("create table exported (rowid text, a)")
    console.sql("insert into exported values ('10', 1), ('x', 2)")
    console.sql("""create table "named by bytes" (a)""")
    with closing(sqlite3.connect(console.internal)) as conn, conn:
        conn.execute("pragma writable_schema = on")
        conn.execute(
            "update sqlite_master set name = cast(name as blob) where name like 'named by%'"
        )
    # All rows have the numbers that they would get.
    done = console.run("rotate-key", "--vacuum", "--json")
    assert json.loads(done.stdout)["clean_up"]["vacuumed"] is True
    console.sql("delete from docs where title = 'apple'")
    banana = """select title from docs
        where rowid in (select rowid from found where found match 'banana')"""
    for command in (
        ("rotate-key", "--vacuum"),
        ("destroy", "A", "--version", "1", "--yes"),
    ):
        done = console.run(*command)
        assert done.exit_code == 3
        assert "was not rewritten" in done.stderr
        assert "table 'docs'" in done.stderr
        assert console.sql(banana) == [("banana",)]
    console.sql("create index titles on docs (title)")
    assert console.run("rotate-key", "--vacuum").exit_code == 0
    assert console.sql(banana) == [("banana",)]


def test_a_named_database_says_that_it_was_not_rewritten(littered: Console) -> None:
    littered.key = NEW
    data = littered.folder / "data.db"
    littered.sql("pragma wal_checkpoint(truncate)")
    wraps, _ = envelopes(littered)
    littered.internal.rename(data)
    littered.internal = data
    littered.configure(NEW, OLD, database="data")
    littered.options = [str(data), "-c", str(littered.config)]
    result = littered.run("rotate-key")
    assert result.exit_code == 0
    assert "rotate-key --vacuum" in result.stderr
    clean = littered.run("rotate-key", "--vacuum", "--json")
    assert json.loads(clean.stdout)["clean_up"]["vacuumed"] is True
    assert not found_in_files(littered, wraps)
