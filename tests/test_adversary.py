"""A database whose schema or pages somebody has changed is named, and nothing is claimed.

Where `get_secret` would return anything but the newest value, `verify` and `status` exit
1 and name what is wrong. Where a command exits 0, its effect is there: the independent
decoder reads it.
"""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

import pytest
from conftest import MakeDatasette
from datasette.app import Datasette
from support import adversary, decoder, zero
from support.console import Console
from support.visitor import Visitor

from datasette_secrets import (
    DatabaseUnavailable,
    SecretsError,
    delete_secret,
    envelope,
    get_secret,
    inspection,
    listing,
    rotation,
    secret_state,
    service,
    set_secret,
    store,
    upgrade,
)
from datasette_secrets.instance import get_instance

NAMES = ("ONE", "TWO", "three")
JOURNALS = ("wal", "delete")


@pytest.fixture
async def filled(console: Console) -> Console:
    await console.fill(*NAMES, versions=3)
    return console


def stored(console: Console) -> dict[tuple[str, int], str | None]:
    """Each version and its value; None for a destroyed one."""
    found: dict[tuple[str, int], str | None] = {}
    keys = [decoder.master_key(console.key)]
    for row in decoder.rows(str(console.internal)):
        value = None
        if row["encrypted"] is not None:
            opened = decoder.open_row(keys, row["name"], row["version"], row)
            value = opened.value.decode()
        found[row["name"], row["version"]] = value
    return found


def said_by(console: Console, *arguments: str, code: int = 1) -> str:
    result = console.run(*arguments)
    assert result.exit_code == code, result.output
    return result.stdout + result.stderr


@pytest.mark.parametrize("name", adversary.SCHEMA)
def test_a_changed_schema_is_named_and_every_change_is_refused(
    filled: Console, name: str
) -> None:
    adversary.SCHEMA[name](str(filled.internal))
    for command in ("status", "verify"):
        said = said_by(filled, command)
        assert "was not made by this plugin" in said
        assert "drop table" not in said
    with closing(sqlite3.connect(filled.internal)) as conn:
        before = list(conn.iterdump())
    for arguments in (
        ("set", "ONE"),
        ("delete", "ONE", "--yes"),
        ("destroy", "ONE", "--version", "1", "--yes"),
        ("rotate-key", "--new-data-keys"),
        ("upgrade", "--yes"),
    ):
        result = filled.run(*arguments, input="a value")
        assert result.exit_code == 1, arguments
    with closing(sqlite3.connect(filled.internal)) as conn:
        assert list(conn.iterdump()) == before


@pytest.mark.parametrize(
    "name",
    [
        "before update",
        "on another table",
        "trigger of a blob of a table",
        "view",
        "partial index",
        "one more index",
    ],
)
def test_the_command_that_is_named_helps(filled: Console, name: str) -> None:
    adversary.SCHEMA[name](str(filled.internal))
    statements = adversary.remedies(said_by(filled, "status"))
    assert statements
    filled.sql(*statements)
    said_by(filled, "set", "ONE", "--value-file", __file__, code=0)
    said_by(filled, "status", code=0)
    said_by(filled, "verify", code=0)


@pytest.mark.parametrize("name", adversary.IN_ITS_PLACE)
def test_somebody_elses_table_is_refused_before_anything_is_written(
    console: Console, name: str
) -> None:
    adversary.IN_ITS_PLACE[name](str(console.internal))
    before = console.internal.read_bytes()
    for arguments in (
        ("set", "ONE"),
        ("status",),
        ("verify",),
        ("rotate-key",),
        ("upgrade", "--yes"),
    ):
        said = console.refused(*arguments, input="a value")
        assert "'datasette_secrets' was not made by this plugin" in said
    assert console.internal.read_bytes() == before


async def newest(datasette: Datasette, name: str) -> str | None:
    try:
        return await get_secret(datasette, name)
    except (SecretsError, sqlite3.Error):
        return "an error"


@pytest.mark.parametrize("part", ["index", "schema"])
async def test_a_flipped_bit_is_named_where_it_hides_the_newest_value(
    filled: Console, part: str
) -> None:
    path = str(filled.internal)
    places = adversary.pages(path)
    # Of the index its header and the pointers to its cells, and then the cells.
    ranges = {
        "index": [
            (places["index"], places["index"] + 26, 3),
            (places["end of index"] - 160, places["end of index"], 19),
        ],
        "schema": [(places["schema"], 4096, 509)],
    }[part]
    wrong = unnamed = 0
    for _ in (flip for each in ranges for flip in adversary.flips(path, *each)):
        datasette = filled.datasette()
        try:
            values = [await newest(datasette, name) for name in NAMES]
            expected = [f"{name} value 3" for name in NAMES]
            if all(v in (e, "an error") for v, e in zip(values, expected, strict=True)):
                continue
            wrong += 1
            with suppress(SecretsError):
                unnamed += not await inspection.inspect(get_instance(datasette).db)
        finally:
            datasette.close()
    assert wrong > 0 or part == "schema"
    assert unnamed == 0


def test_a_damaged_index_is_named_by_status_and_verify_and_reindex_helps(
    filled: Console,
) -> None:
    filled.sql(
        "pragma writable_schema = on",
        "update sqlite_master set sql = sql || ' where version < 3' "
        "where name = 'datasette_secrets_name_version'",
    )
    filled.sql("reindex datasette_secrets")
    filled.sql(
        "pragma writable_schema = on",
        "update sqlite_master set sql = replace(sql, ' where version < 3', '') "
        "where name = 'datasette_secrets_name_version'",
    )
    assert filled.value("ONE") == "ONE value 2"
    for command in ("status", "verify"):
        said = said_by(filled, command)
        assert "so that a read can miss the newest version" in said
    before = stored(filled)
    for arguments in (
        ("set", "ONE"),
        ("destroy", "ONE", "--version", "1", "--yes"),
        ("rotate-key",),
    ):
        assert filled.run(*arguments, input="a value").exit_code == 1
    assert stored(filled) == before
    filled.sql(*adversary.remedies(said_by(filled, "status")))
    assert filled.value("ONE") == "ONE value 3"
    said_by(filled, "status", code=0)
    said_by(filled, "verify", code=0)


_COPY = (
    "insert into datasette_secrets (id, name, version, encryption_key_name, "
    "envelope_version, encrypted, wrapped_key) select {}, name, {}, "
    "encryption_key_name, 1, {} from datasette_secrets where name = 'ONE' and version = 3"
)
_ENVELOPE = "encrypted, wrapped_key"
_DESTROYED = "null, null"


async def said_in_shell(console: Console, *arguments: str, code: int = 1) -> str:
    """The same, while a server runs in this loop."""
    return await asyncio.to_thread(said_by, console, *arguments, code=code)


def refuses_changes(console: Console, says: str) -> None:
    """Every command that destroys or changes anything says this, and does nothing."""
    before = stored_bytes(console)
    for arguments in (
        ("set", "ONE"),
        ("destroy", "ONE", "--version", "1", "--yes"),
        ("destroy", "ONE", "--all-but-newest", "--yes"),
        ("rotate-key", "--new-data-keys"),
        ("upgrade", "--yes"),
    ):
        result = console.run(*arguments, input="a value")
        assert result.exit_code == 1, arguments
        # That one reads the newest version before the tables are checked.
        assert says in result.stderr or "--all-but-newest" in arguments
    assert stored_bytes(console) == before


def stored_bytes(console: Console) -> list[str]:
    with closing(sqlite3.connect(console.internal)) as conn:
        rows = 'INSERT INTO "datasette_secrets'
        return [line for line in conn.iterdump() if line.startswith(rows)]


@pytest.mark.parametrize("envelope", [_ENVELOPE, _DESTROYED])
@pytest.mark.parametrize(
    "version", ["'zzz'", "x'ff'", "1.5", "0", "-1", str(2**53), str(2**63 - 1)]
)
def test_a_row_whose_version_is_no_number_is_named_and_the_command_removes_it(
    filled: Console, version: str, envelope: str
) -> None:
    filled.sql(_COPY.format(-7, version, envelope))
    for command in ("status", "verify"):
        assert "datasette secrets destroy-row -7" in said_by(filled, command)
    refuses_changes(filled, "datasette secrets destroy-row -7")
    said = said_by(filled, "destroy", "ONE", "--version", str(2**53), "--yes")
    assert "Destroyed" not in said
    said_by(filled, "destroy-row", "-7", "--yes", code=0)
    for command in ("status", "verify"):
        said_by(filled, command, code=0)
    assert filled.value("ONE") == "ONE value 3"
    said_by(filled, "set", "ONE", "--value-file", __file__, code=0)


def test_a_row_whose_name_is_no_text_is_named_and_the_command_removes_it(
    filled: Console,
) -> None:
    filled.sql(
        "insert into datasette_secrets (id, name, version, encryption_key_name) "
        "values (70, x'ff', 1, '')"
    )
    for command in ("status", "verify"):
        assert "datasette secrets destroy-row 70" in said_by(filled, command)
    said_by(filled, "destroy-row", "70", "--yes", code=0)
    for command in ("status", "verify"):
        said_by(filled, command, code=0)


async def test_the_check_of_a_damaged_page_holds_no_lock(
    filled: Console, make_datasette: MakeDatasette
) -> None:
    filled.sql("pragma journal_mode = delete")
    with closing(sqlite3.connect(filled.internal)) as conn:
        [(page,)] = conn.execute(
            "select rootpage from sqlite_master where name = 'datasette_secrets_log'"
        )
        [(size,)] = conn.execute("pragma page_size")
    with filled.internal.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(bytes(size))
    # With one thread, the next read has the connection of the check.
    datasette = make_datasette(
        filled.key, internal=str(filled.internal), settings={"num_sql_threads": 1}
    )
    await datasette.invoke_startup()
    with pytest.raises(DatabaseUnavailable, match="it is damaged"):
        await inspection.inspect(get_instance(datasette).db)
    assert (await listing.secret_state(datasette, "ONE")).version == 3
    assert len(await store.history(get_instance(datasette).db, "ONE")) == 3
    internal = datasette.get_internal_database()
    await internal.execute_write("create table of_another_plugin (a)")


async def test_a_row_planted_under_a_running_server_stops_what_destroys(
    filled: Console, make_datasette: MakeDatasette
) -> None:
    server = make_datasette(filled.key, internal=str(filled.internal))
    await set_secret(server, "ONE", "ONE value 4")
    filled.sql(_COPY.format(70, "'zzz'", _DESTROYED))
    with pytest.raises(DatabaseUnavailable, match="secrets verify"):
        await set_secret(server, "ONE", "ONE value 5")
    with pytest.raises(DatabaseUnavailable, match="destroy-row 70"):
        await service.destroy_versions(server, "ONE", [1, 2, 3, 4])
    await service.destroy_row(filled.datasette(), 70)
    assert await set_secret(server, "ONE", "ONE value 5") == 5


@pytest.mark.parametrize(
    "statement",
    [
        "update datasette_secrets set wrapped_key = zeroblob(104)",
        "update datasette_secrets set encrypted = substr(encrypted, 2)",
        "update datasette_secrets set encryption_key_name = '0123456789abcdef'",
        "update datasette_secrets set encrypted = null, wrapped_key = null",
    ],
)
async def test_all_but_the_newest_are_kept_where_the_newest_cannot_be_read(
    filled: Console, make_datasette: MakeDatasette, statement: str
) -> None:
    filled.sql(f"{statement} where name = 'ONE' and version = 3")
    before = stored_bytes(filled)
    said = await said_in_shell(filled, "destroy", "ONE", "--all-but-newest", "--yes")
    assert "Only the newest version would be left, which cannot be read" in said
    server = make_datasette(filled.key, internal=str(filled.internal))
    visitor = Visitor(server)
    page = await visitor.get("/ONE/-/destroy?old=1")
    assert "Only the newest version would be left, which cannot be read" in page.text
    assert "data-secrets-select" not in page.text
    assert " checked" not in page.text
    assert stored_bytes(filled) == before
    await said_in_shell(filled, "destroy", "ONE", "--version", "1", "--yes", code=0)


_DROP_INDEX = "drop index datasette_secrets_name_version"
MISSING = {
    "index": (_DROP_INDEX,),
    "log": ("drop table datasette_secrets_log",),
    "index of the log": ("drop index datasette_secrets_log_name_id",),
}


@pytest.mark.parametrize("part", MISSING)
async def test_what_is_missing_is_named_and_a_restart_makes_it_again(
    filled: Console, part: str
) -> None:
    running = filled.datasette()
    await set_secret(running, "ONE", "ONE value 4")
    filled.sql(*MISSING[part])
    for command in ("status", "verify"):
        said = await said_in_shell(filled, command)
        assert "is missing, so that" in said
        assert "restart Datasette" in said
    before = stored_bytes(filled)
    with pytest.raises(DatabaseUnavailable, match=r"is missing.*restart Datasette"):
        await set_secret(running, "ONE", "a value")
    with pytest.raises(DatabaseUnavailable, match=r"is missing.*restart Datasette"):
        await service.destroy_versions(running, "ONE", [1])
    assert stored_bytes(filled) == before
    running.close()
    restarted = filled.datasette()
    await restarted.invoke_startup()
    for command in ("status", "verify"):
        await said_in_shell(filled, command, code=0)
    assert await set_secret(restarted, "ONE", "a value") == 5
    restarted.close()


@pytest.mark.parametrize("envelope", [_ENVELOPE, _DESTROYED])
@pytest.mark.parametrize("restarts", [False, True])
async def test_two_rows_of_one_version_are_named_and_the_command_removes_one(
    filled: Console,
    envelope: str,
    restarts: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    filled.sql(_DROP_INDEX, _COPY.format(-5, "version", envelope))
    if restarts:
        datasette = filled.datasette()
        capsys.readouterr()
        await datasette.invoke_startup()
        if hasattr(datasette, "start_background_tasks"):
            await datasette.start_background_tasks()
            tasks = datasette._background_tasks.tasks()
            await asyncio.wait_for(
                asyncio.gather(*(each.task for each in tasks if each.task)), 60
            )
        datasette.close()
        assert capsys.readouterr().err.count("have the same name and version") == 1
    for command in ("status", "verify"):
        said = await said_in_shell(filled, command)
        assert "-5" in said
        assert "have the same name and version" in said
        assert "datasette secrets destroy-row ID" in said
    await asyncio.to_thread(refuses_changes, filled, "have the same name and version")
    await said_in_shell(filled, "destroy-row", "-5", "--yes", code=0)
    # Again, it only cleans up, as it must after an interruption.
    await said_in_shell(filled, "destroy-row", "-5", "--yes", code=0)
    await said_in_shell(filled, "destroy-row", "-6", "--yes")
    assert await get_secret(filled.datasette(), "ONE") == "ONE value 3"
    await said_in_shell(filled, "set", "ONE", "--value-file", __file__, code=0)
    for command in ("status", "verify"):
        await said_in_shell(filled, command, code=0)


def test_a_second_table_on_the_same_pages_is_named(filled: Console) -> None:
    filled.sql(
        "pragma writable_schema = on",
        "insert into sqlite_master select type, 'mirror', 'mirror', rootpage, "
        "replace(sql, 'datasette_secrets', 'mirror') from sqlite_master "
        "where name = 'datasette_secrets'",
    )
    filled.sql("update mirror set note = 'seen' where name = 'ONE'")
    for command in ("status", "verify"):
        said = said_by(filled, command)
        assert "datasette_secrets and mirror share their pages" in said
        assert "restore the database from a backup" in said
    refuses_changes(filled, "share their pages")


@pytest.mark.parametrize("how", ["dropped", "emptied"])
async def test_a_table_that_goes_under_a_running_server_is_an_error_and_not_unset(
    filled: Console, how: str
) -> None:
    filled.sql("pragma journal_mode = delete")
    server = filled.datasette()
    await server.invoke_startup()
    assert await get_secret(server, "ONE") == "ONE value 3"
    copy = filled.internal.read_bytes()
    if how == "emptied":
        filled.internal.write_bytes(b"")
    else:
        filled.sql("drop table datasette_secrets")
    for reading in (
        get_secret(server, "ONE"),
        secret_state(server, "ONE"),
        get_secret(server, "NEVER_STORED"),
        listing.list_secrets(server),
    ):
        with pytest.raises(DatabaseUnavailable, match="is gone; restore the database"):
            await reading
    for change in (
        set_secret(server, "ONE", "a value"),
        delete_secret(server, "ONE"),
        service.destroy_versions(server, "ONE", [1]),
        rotation.rotate(server),
    ):
        with pytest.raises(DatabaseUnavailable, match=r"is gone.*restart Datasette"):
            await change
    server.close()
    restarted = filled.datasette()
    await restarted.invoke_startup()
    assert await get_secret(restarted, "ONE") is None
    restarted.close()
    filled.internal.write_bytes(copy)
    assert await get_secret(filled.datasette(), "ONE") == "ONE value 3"


# No false alarm.


@pytest.mark.parametrize("name", adversary.UNRELATED)
def test_what_only_looks_like_ours_raises_no_alarm(filled: Console, name: str) -> None:
    adversary.UNRELATED[name](str(filled.internal))
    said_by(filled, "set", "ONE", "--value-file", __file__, code=0)
    for command in ("status", "verify"):
        said_by(filled, command, code=0)


@pytest.mark.parametrize("journal", JOURNALS)
async def test_a_server_that_writes_meanwhile_raises_no_alarm(
    filled: Console, make_datasette: MakeDatasette, journal: str
) -> None:
    filled.sql(f"pragma journal_mode = {journal}")
    path = str(filled.internal)
    server = make_datasette(filled.key, internal=path)
    other = make_datasette(filled.key, internal=path)
    db = get_instance(other).db

    async def write() -> None:
        for number in range(30):
            await set_secret(server, "BUSY", f"value {number}", keep=2)
            await service.destroy_versions(server, "ONE", [1])

    writing = asyncio.ensure_future(write())
    checks = 0
    while not writing.done() or checks < 3:
        assert await inspection.inspect(db) == []
        assert (await rotation.verify(other, batch_size=2)).problems == []
        checks += 1
    await writing


ZERO = {
    "0.1a0": zero.SCHEMA.replace(
        "encryption_key_name text not null,",
        "encryption_key_name text not null,\n    redacted text,",
    ),
    "0.1a1 to 0.3a0": zero.SCHEMA,
}


@pytest.mark.parametrize("journal", JOURNALS)
@pytest.mark.parametrize("release", ZERO)
async def test_a_database_of_0x_raises_no_alarm_before_or_after_its_upgrade(
    make_datasette: MakeDatasette, internal: str, release: str, journal: str
) -> None:
    key = envelope.generate_master_key()
    with closing(sqlite3.connect(internal)) as conn, conn:
        conn.execute(f"pragma journal_mode = {journal}").fetchall()
        conn.executescript(ZERO[release])
        zero.insert(conn, "A", 1, zero.token(key, "a value"))
        for version in ("two", 2.5, -1, 2**60, 3, 3):
            zero.insert(conn, "B", version, zero.token(key, "another"))
            zero.insert(conn, "C", version, None)
    datasette = make_datasette(key)
    db = get_instance(datasette).db
    assert await inspection.inspect(db) == []
    assert (await upgrade.upgrade(datasette)).complete
    assert await inspection.inspect(db) == []
    assert await get_secret(datasette, "A") == "a value"


async def test_white_space_case_and_quotes_of_the_same_schema_raise_no_alarm(
    filled: Console, make_datasette: MakeDatasette
) -> None:
    filled.sql(
        "pragma writable_schema = on",
        "update sqlite_master set sql = replace(replace(sql, 'note text', "
        "'\"note\"\n  TEXT'), 'datasette_secrets', '[datasette_secrets]') "
        "where name = 'datasette_secrets'",
    )
    datasette = make_datasette(filled.key, internal=str(filled.internal))
    assert await inspection.inspect(get_instance(datasette).db) == []


async def test_the_check_runs_once_the_server_has_begun_to_serve(
    filled: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    datasette = filled.datasette()
    content = Path(filled.internal).read_bytes()
    place = adversary.pages(str(filled.internal))["index"]
    Path(filled.internal).write_bytes(
        content[: place + 3] + b"\0\1" + content[place + 5 :]
    )
    await datasette.invoke_startup()
    said = capsys.readouterr().err
    # Before 1.0a41, Datasette has no background tasks, and the start runs the check.
    if hasattr(datasette, "start_background_tasks"):
        assert "is damaged" not in said
        await datasette.start_background_tasks()

    async def until_said() -> None:
        nonlocal said
        while "is damaged" not in said:
            await asyncio.sleep(0.01)
            said += capsys.readouterr().err

    await asyncio.wait_for(until_said(), 60)
    datasette.close()
