"""The first start of a server upgrades what 0.x stored, once, and nothing after that."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeDatasette
from datasette import hookimpl
from datasette.app import Datasette
from datasette.plugins import pm
from datasette.utils.internal_db import init_internal_db
from support import zero
from support.console import Console
from support.servers import Server
from support.unwritable import unwritable
from support.visitor import plugin

from datasette_secrets import (
    CannotOpen,
    NeedsUpgrade,
    delete_secret,
    envelope,
    get_secret,
    restore_secret,
    rotation,
    set_secret,
)

OLD, NEW, OTHER = (envelope.generate_master_key() for _ in range(3))
TOKEN = re.compile(rb"gAAAAA[\w-]{20}")
VALUES = {
    "ONE_CHARACTER": "x",
    "UNICODE": "schlüssel-鍵-🔑",
    "LINES": "-----BEGIN KEY-----\r\nabc\n\n-----END KEY-----",
    "WITH_NUL": "a\0b",
    "name of any kind / 鍵": "odd name",
}
BAD = {
    "ANOTHER_KEY": zero.token(OTHER, "a"),
    "GARBAGE": b"not a token",
    "EMPTY": b"",
    "CUT_SHORT": zero.token(OLD, "a")[:-8],
    "NO_UTF8": zero.token(OLD, b"\xff\xfe"),
    "A_NUMBER": 5,
}

Captured = pytest.CaptureFixture[str]


def write_values(path: str, key: str = OLD, **columns: Any) -> None:
    rows = [(name, 1, zero.token(key, value)) for name, value in VALUES.items()]
    zero.write(path, rows, **columns)


def run_sql(path: str, sql: str, *parameters: Any) -> list[Any]:
    conn = sqlite3.connect(path)
    with conn:
        rows = conn.execute(sql, parameters).fetchall()
    conn.close()
    return rows


def columns(path: str) -> set[str]:
    return {row[1] for row in run_sql(path, "pragma table_info(datasette_secrets)")}


def is_untouched(path: str) -> bool:
    return "wrapped_key" not in columns(path)


async def start(make_datasette: MakeDatasette, *keys: str, **options: Any) -> Datasette:
    datasette = make_datasette(*keys, **options)
    await datasette.invoke_startup()
    return datasette


async def differing(datasette: Datasette) -> list[str]:
    """The names whose value is another one: a failing test shows no value."""
    return [
        name
        for name, value in VALUES.items()
        if await get_secret(datasette, name) != value
    ]


def without_cryptography(patch: pytest.MonkeyPatch) -> None:
    for module in ("cryptography", "cryptography.fernet"):
        patch.setitem(sys.modules, module, None)


async def test_every_value_is_read_at_once_and_nothing_else_has_changed(
    make_datasette: MakeDatasette, internal: str
) -> None:
    write_values(internal, note="a note", created_by="ann", last_used_by="a plugin")
    kept = zero.COLUMNS.replace("encryption_key_name, ", "")
    before = run_sql(internal, f"select {kept} from datasette_secrets order by id")
    datasette = make_datasette(OLD)
    await datasette.invoke_startup()
    after = run_sql(internal, f"select {kept} from datasette_secrets order by id")
    assert after == before
    assert await differing(datasette) == []


async def test_a_deleted_mark_is_kept(
    make_datasette: MakeDatasette, internal: str
) -> None:
    write_values(internal, deleted_at="2025-05-05 05:05:05", deleted_by="somebody")
    datasette = await start(make_datasette, OLD)
    for name in VALUES:
        assert await get_secret(datasette, name) is None
        await restore_secret(datasette, name)
    assert await differing(datasette) == []


async def test_the_version_that_0_x_served_is_served(
    make_datasette: MakeDatasette, internal: str
) -> None:
    order = [("1", 1), ("3, served", 2), ("2", 2), ("0", 1)]
    zero.write(
        internal, [("A", version, zero.token(OLD, value)) for value, version in order]
    )
    assert await get_secret(await start(make_datasette, OLD), "A") == "3, served"


async def test_values_are_sealed_under_the_primary_key_whichever_opens_them(
    make_datasette: MakeDatasette, internal: str
) -> None:
    write_values(internal)
    datasette = await start(make_datasette, NEW, OTHER, OLD)
    assert await differing(datasette) == []
    assert run_sql(
        internal, "select distinct encryption_key_name from datasette_secrets"
    ) == [(envelope.MasterKey.parse(NEW).id,)]


@pytest.mark.parametrize("journal_mode", ["delete", "wal"])
async def test_no_token_is_left_in_the_files(
    make_datasette: MakeDatasette, internal: str, journal_mode: str
) -> None:
    write_values(internal)
    conn = sqlite3.connect(internal)
    conn.execute("pragma secure_delete = off")
    conn.execute(f"pragma journal_mode = {journal_mode}")
    with conn:
        zero.insert(conn, "GONE", 1, zero.token(OLD, "gone"))
    with conn:
        conn.execute("delete from datasette_secrets where name = 'GONE'")
    conn.close()
    await start(make_datasette, OLD)
    for file in Path(internal).parent.glob("internal.db*"):
        assert TOKEN.search(file.read_bytes()) is None


async def test_it_says_how_many_were_upgraded_on_stderr_and_on_the_page(
    make_datasette: MakeDatasette, internal: str, capsys: Captured
) -> None:
    write_values(internal)
    datasette = await start(make_datasette, OLD)
    sentence = "5 versions that datasette-secrets 0.x had stored were upgraded"
    assert sentence in capsys.readouterr().err
    cookies = {"ds_actor": datasette.client.actor_cookie({"id": "root"})}
    assert sentence in (await datasette.client.get("/-/secrets", cookies=cookies)).text
    again = await start(make_datasette, OLD)
    assert "upgraded" not in capsys.readouterr().err
    assert sentence not in (await again.client.get("/-/secrets", cookies=cookies)).text


async def test_it_is_one_row_of_the_log_and_one_event(
    make_datasette: MakeDatasette, internal: str
) -> None:
    heard: list[Any] = []

    class Listening:
        @hookimpl
        def track_event(self, event: Any) -> None:
            heard.append(event)

    listening = Listening()
    pm.register(listening)
    write_values(internal)
    try:
        for _ in range(2):
            await start(make_datasette, OLD)
    finally:
        pm.unregister(listening)
    assert [(event.name, event.versions, event.actor) for event in heard] == [
        ("upgrade-secrets", len(VALUES), None)
    ]
    [(actor_id, via, action, detail)] = run_sql(
        internal, "select actor_id, via, action, detail from datasette_secrets_log"
    )
    assert (actor_id, via, action) == (None, "start", "upgrade-secrets")
    assert json.loads(detail) == {"versions": len(VALUES)}


async def test_a_plugin_that_fails_on_the_event_stops_no_start(
    make_datasette: MakeDatasette, internal: str, capsys: Captured
) -> None:
    def track_event(event: Any) -> None:
        raise sqlite3.OperationalError("no such table: events")

    write_values(internal)
    with plugin(track_event=track_event):
        datasette = await start(make_datasette, OLD)
    assert await differing(datasette) == []
    said = capsys.readouterr().err
    assert "5 versions that datasette-secrets 0.x had stored were upgraded" in said
    failed = "a plugin failed on the event upgrade-secrets: OperationalError"
    assert f"datasette-secrets: {failed}\n" in said


async def test_what_no_key_opens_is_left_and_named_and_the_rest_is_upgraded(
    make_datasette: MakeDatasette, internal: str, capsys: Captured
) -> None:
    zero.write(internal, [(name, 1, encrypted) for name, encrypted in BAD.items()])
    write_values(internal)
    before = run_sql(internal, "select encrypted from datasette_secrets order by id")
    datasette = await start(make_datasette, OLD)
    said = capsys.readouterr().err
    assert "5 versions that datasette-secrets 0.x had stored were upgraded" in said
    for name in BAD:
        assert f"{name} version 1" in said
        with pytest.raises(NeedsUpgrade):
            await get_secret(datasette, name)
    assert await differing(datasette) == []
    after = run_sql(internal, "select encrypted from datasette_secrets order by id")
    assert after[: len(BAD)] == before[: len(BAD)]


async def test_without_a_master_key_nothing_is_touched_until_a_start_with_it(
    make_datasette: MakeDatasette, internal: str, capsys: Captured
) -> None:
    write_values(internal)
    datasette = await start(make_datasette)
    assert "configure a master key and restart" in capsys.readouterr().err
    for call in (
        get_secret(datasette, "UNICODE"),
        delete_secret(datasette, "UNICODE"),
    ):
        with pytest.raises(NeedsUpgrade, match="configure a master key and restart"):
            await call
    assert is_untouched(internal)
    assert await differing(await start(make_datasette, OLD)) == []


async def test_without_cryptography_nothing_is_touched_until_a_start_with_it(
    make_datasette: MakeDatasette, internal: str, capsys: Captured
) -> None:
    write_values(internal)
    with pytest.MonkeyPatch.context() as patch:
        without_cryptography(patch)
        datasette = await start(make_datasette, OLD)
        assert "install 'datasette-secrets[fernet]'" in capsys.readouterr().err
        for call in (
            get_secret(datasette, "UNICODE"),
            set_secret(datasette, "ANOTHER", "a value"),
            delete_secret(datasette, "UNICODE"),
        ):
            with pytest.raises(NeedsUpgrade, match=r"\[fernet\]' and restart"):
                await call
    assert is_untouched(internal)
    assert await differing(await start(make_datasette, OLD)) == []


async def test_a_restored_table_of_0_x_is_upgraded_like_the_first(
    make_datasette: MakeDatasette, internal: str, tmp_path: Path
) -> None:
    write_values(internal)
    copy = shutil.copy(internal, tmp_path / "copy.db")
    (await start(make_datasette, OLD)).close()
    shutil.copy(copy, internal)
    assert await differing(await start(make_datasette, OLD)) == []


async def test_a_token_planted_later_is_never_read_after_any_start_or_rotation(
    make_datasette: MakeDatasette, internal: str
) -> None:
    write_values(internal)
    (await start(make_datasette, OLD)).close()
    run_sql(
        internal,
        "insert into datasette_secrets (name, version, encrypted, encryption_key_name) "
        "values ('UNICODE', 2, ?, 'default')",
        zero.token(OLD, "planted"),
    )
    for keys in ((OLD,), (OLD,), (NEW, OLD)):
        datasette = await start(make_datasette, *keys)
        with pytest.raises(NeedsUpgrade):
            await get_secret(datasette, "UNICODE")
        report = await rotation.rotate(datasette, skip_unopenable=True)
        assert not report.complete
        with pytest.raises((NeedsUpgrade, CannotOpen)):
            await get_secret(datasette, "UNICODE")
        datasette.close()


async def test_servers_of_one_process_that_start_at_once_do_it_once(
    make_datasette: MakeDatasette, tmp_path: Path
) -> None:
    path = str(tmp_path / "named.db")
    write_values(path)
    servers = [
        make_datasette(
            OLD,
            database="named",
            files=[path],
            internal=str(tmp_path / f"internal-{number}.db"),
        )
        for number in range(4)
    ]
    await asyncio.gather(*(server.invoke_startup() for server in servers))
    for server in servers:
        assert await differing(server) == []
    [(rows,)] = run_sql(path, "select count(*) from datasette_secrets_log")
    assert rows == 1


def test_two_servers_that_start_at_once_do_it_once(console: Console) -> None:
    write_values(str(console.internal), console.key)
    # Datasette's own tables come first. Of two servers that make those at once, one fails.
    datasette = Datasette(internal=str(console.internal))
    asyncio.run(init_internal_db(datasette.get_internal_database()))
    datasette.close()
    with ThreadPoolExecutor(2) as pool:
        servers = list(pool.map(lambda _: Server(console), range(2)))
    try:
        assert all(server.read(*VALUES) == [*VALUES.values()] for server in servers)
    finally:
        for server in servers:
            server.stop()
    said = [line for server in servers for line in server.log if "upgraded at" in line]
    assert len(said) == 1
    [(rows,)] = console.sql("select count(*) from datasette_secrets_log")
    assert rows == 1


@pytest.mark.parametrize("how", ["immutable", "trigger"])
async def test_a_database_that_cannot_be_changed_is_left_and_said(
    make_datasette: MakeDatasette, tmp_path: Path, how: str, capsys: Captured
) -> None:
    path = str(tmp_path / "named.db")
    write_values(path)
    if how == "trigger":
        run_sql(
            path,
            "create trigger t before update on datasette_secrets "
            "begin select raise(abort, 'no'); end",
        )
    content = Path(path).read_bytes()
    kind = "immutables" if how == "immutable" else "files"
    datasette = await start(make_datasette, OLD, database="named", **{kind: [path]})
    said = {
        "immutable": "cannot be read until upgraded",
        "trigger": "The trigger 't' was not made by this plugin",
    }
    assert said[how] in capsys.readouterr().err
    with pytest.raises(NeedsUpgrade):
        await get_secret(datasette, "UNICODE")
    datasette.close()
    assert Path(path).read_bytes() == content


async def test_exchanged_tokens_stay_exchanged_since_0_x_bound_them_to_no_name(
    make_datasette: MakeDatasette, internal: str
) -> None:
    zero.write(
        internal, [("A", 1, zero.token(OLD, "b")), ("B", 1, zero.token(OLD, "a"))]
    )
    datasette = await start(make_datasette, OLD)
    assert [await get_secret(datasette, name) for name in "AB"] == ["b", "a"]


async def test_a_table_whose_names_may_be_null_is_refused_and_left(
    make_datasette: MakeDatasette, internal: str, capsys: Captured
) -> None:
    run_sql(internal, zero.SCHEMA.replace("name text not null", "name text"))
    write_values(internal)
    zero.write(internal, [(None, 1, zero.token(OLD, "a"))])
    datasette = await start(make_datasette, OLD)
    said = capsys.readouterr().err
    assert "The table 'datasette_secrets'" in said
    assert "upgraded" not in said
    assert is_untouched(internal)
    with pytest.raises(NeedsUpgrade):
        await get_secret(datasette, "UNICODE")


@pytest.mark.unix("mounts a file system")
@pytest.mark.parametrize("journal_mode", ["delete", "wal"])
async def test_a_full_disk_is_left_and_said_and_the_next_start_upgrades(
    small_disk: Path, make_datasette: MakeDatasette, capsys: Captured, journal_mode: str
) -> None:
    path = small_disk / "named.db"
    run_sql(str(path), f"pragma journal_mode = {journal_mode}")
    write_values(str(path), note="n" * 100)
    zero.write(str(path), [("LONG", 1, zero.token(OLD, "x" * 60_000))])
    filler = small_disk / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    # Some room is left: what a write-ahead log needs before anything is written to it.
    os.truncate(filler, filler.stat().st_size - 48_000)
    options: dict[str, Any] = {"database": "named", "files": [str(path)]}
    datasette = await start(make_datasette, OLD, **options)
    said = capsys.readouterr().err
    assert "the disk is full" in said
    assert "upgraded at this start" not in said
    with pytest.raises(NeedsUpgrade):
        await get_secret(datasette, "UNICODE")
    datasette.close()
    assert is_untouched(str(path))

    filler.unlink()
    datasette = await start(make_datasette, OLD, **options)
    assert "6 versions" in capsys.readouterr().err
    assert await differing(datasette) == []


@pytest.mark.unix("changes attributes of a file")
async def test_a_read_only_file_is_left_and_said_and_the_next_start_upgrades(
    make_datasette: MakeDatasette, tmp_path: Path, capsys: Captured
) -> None:
    path = str(tmp_path / "named.db")
    write_values(path)
    options: dict[str, Any] = {"database": "named", "files": [path]}
    with unwritable(path):
        datasette = await start(make_datasette, OLD, **options)
        said = capsys.readouterr().err
        assert "it is read-only" in said
        assert "upgraded at this start" not in said
        with pytest.raises(NeedsUpgrade):
            await get_secret(datasette, "UNICODE")
        datasette.close()
    assert is_untouched(path)
    assert await differing(await start(make_datasette, OLD, **options)) == []


COMMANDS = [
    ("status",),
    ("list",),
    ("history", "UNICODE"),
    ("verify",),
    ("set", "ANOTHER", "--value-file", "-"),
    ("get", "UNICODE"),
    ("delete", "UNICODE", "--yes"),
    ("destroy", "UNICODE", "--version", "1", "--yes"),
    ("rotate-key",),
    ("rotate-key", "--skip-unopenable"),
    ("upgrade", "--dry-run"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_no_command_but_upgrade_touches_a_table_of_0_x(
    console: Console, command: tuple[str, ...]
) -> None:
    path = str(console.internal)
    write_values(path, console.key)
    content = console.internal.read_bytes()
    console.run(*command, input="a value")
    assert console.internal.read_bytes() == content


def test_the_command_upgrades_a_table_of_0_x(console: Console) -> None:
    write_values(str(console.internal), console.key)
    console.ok("upgrade", "--yes")
    assert console.value("UNICODE") == VALUES["UNICODE"]


# Starts a server on copy after copy and kills it some statements later each time.
KILLED = """
import asyncio, os, signal, sys
from datasette.app import Datasette
from datasette.utils import sqlite3
from datasette_secrets import envelope, fernet

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

def start(path):
    datasette = Datasette(
        internal=path,
        config={"plugins": {"datasette-secrets": {"encryption-key": key}}},
    )
    sqlite3.connect = connect_counting
    asyncio.run(datasette.invoke_startup())
    datasette.close()

while True:
    last += 7
    path = f"{folder}/{last}.db"
    with open(source, "rb") as old, open(path, "wb") as new:
        new.write(old.read())
    child = os.fork()
    if not child:
        start(path)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        sys.exit(os.WEXITSTATUS(status))
"""


async def test_a_start_killed_anywhere_is_begun_again_by_the_next(
    make_datasette: MakeDatasette, internal: str, tmp_path: Path
) -> None:
    write_values(internal)
    folder = tmp_path / "killed"
    folder.mkdir()
    subprocess.run(
        [sys.executable, "-c", KILLED, internal, OLD, str(folder)],
        check=True,
        timeout=120,
        stderr=subprocess.DEVNULL,
    )
    killed = sorted(folder.glob("*.db"))
    assert len(killed) > 5
    for path in killed:
        tokens = [
            row[0].startswith(b"gAAAAA")
            for row in run_sql(str(path), "select encrypted from datasette_secrets")
        ]
        assert all(tokens) or not any(tokens)
        assert is_untouched(str(path)) == all(tokens)
        datasette = await start(make_datasette, OLD, internal=str(path))
        assert await differing(datasette) == []
        datasette.close()
