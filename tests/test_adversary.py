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

from datasette_secrets import (
    SecretsError,
    envelope,
    get_secret,
    inspection,
    rotation,
    service,
    set_secret,
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
    if not hasattr(datasette, "start_background_tasks"):
        # Datasettes before 1.0a41 have no background: it runs at the start there.
        pytest.skip("this Datasette has no background tasks")
    content = Path(filled.internal).read_bytes()
    place = adversary.pages(str(filled.internal))["index"]
    Path(filled.internal).write_bytes(
        content[: place + 3] + b"\0\1" + content[place + 5 :]
    )
    await datasette.invoke_startup()
    capsys.readouterr()
    await datasette.start_background_tasks()
    said = ""

    async def until_said() -> None:
        nonlocal said
        while "is damaged" not in said:
            await asyncio.sleep(0.01)
            said += capsys.readouterr().err

    await asyncio.wait_for(until_said(), 60)
    datasette.close()
