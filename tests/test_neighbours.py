"""Other plugins and other tables are as they would be without this plugin."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeDatasette
from datasette.app import Datasette
from datasette.database import Database
from datasette.permissions import PermissionSQL
from support.console import Console
from support.visitor import Visitor, plugin

from datasette_secrets import (
    DatabaseUnavailable,
    get_secret,
    health,
    secret_state,
    set_secret,
)

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def named(tmp_path: Path) -> str:
    """The path of a database `named`, with tables of somebody else's."""
    path = str(tmp_path / "named.db")
    with closing(sqlite3.connect(path)) as conn:
        conn.executescript("""
            create table salaries (id integer primary key, amount);
            create table notes (id integer primary key, body);
            create view hints as select 'see datasette_secrets' as hint, id from notes;
            create table ledger (id integer primary key, amount);
            insert into ledger values (1, 10);
            create trigger touch after update on ledger begin
                update ledger set amount = new.amount where id = new.id;
            end;
        """)
    return path


@pytest.fixture
def datasette(make_datasette: MakeDatasette, master_key: str, named: str) -> Datasette:
    """Not started yet. It keeps its secrets in `named`."""
    return make_datasette(master_key, database="named", files=[named])


@pytest.fixture
def protected() -> Iterator[None]:
    """A plugin that lets nobody read `salaries` or write to `ledger`."""

    def authorize(action: int, table: str | None, *_: object) -> int:
        reads = action == sqlite3.SQLITE_READ and table == "salaries"
        changing = (sqlite3.SQLITE_INSERT, sqlite3.SQLITE_DELETE)
        writes = action in changing and table == "ledger"
        return sqlite3.SQLITE_DENY if reads or writes else sqlite3.SQLITE_OK

    def prepare_connection(conn: sqlite3.Connection, database: str) -> None:
        if database == "named":
            conn.set_authorizer(authorize)

    with plugin(prepare_connection=prepare_connection):
        yield


@pytest.mark.usefixtures("protected")
async def test_what_the_authorizer_of_a_plugin_denies_stays_denied(
    datasette: Datasette,
) -> None:
    await datasette.invoke_startup()
    visitor = Visitor(datasette)
    for value in ("one", "two"):
        await set_secret(datasette, "A", value)
        assert (await visitor.get()).status_code == 200
    sql = "/named/-/query.json?sql=select+amount+from+salaries"
    for path, sent in (
        ("ledger/-/insert", {"row": {"amount": 20}}),
        ("ledger/1/-/delete", {}),
        ("notes/-/insert", {"row": {"body": "open to all"}}),
        ("ledger/-/insert", {"row": {"amount": 20}}),
        ("datasette_secrets/-/insert", {"row": {"name": "B", "version": 1}}),
    ):
        answer = await datasette.client.post(
            f"/named/{path}", json=sent, cookies=visitor.cookies
        )
        assert (answer.status_code == 201) == path.startswith("notes"), path
        read = await asyncio.gather(*(datasette.client.get(sql) for _ in range(12)))
        assert {each.status_code for each in read} == {400}
    ledger = await datasette.get_database("named").execute("select * from ledger")
    assert [tuple(row) for row in ledger.rows] == [(1, 10)]


async def test_a_change_that_is_stored_does_not_fail_because_of_a_plugin(
    make_datasette: MakeDatasette, master_key: str, named: str
) -> None:
    fails = False

    def prepare_connection() -> None:
        if fails:
            raise ZeroDivisionError

    datasette = make_datasette(
        master_key, database="named", files=[named], settings={"num_sql_threads": 1}
    )
    with plugin(prepare_connection=prepare_connection):
        await datasette.invoke_startup()
        assert await set_secret(datasette, "A", "one") == 1
        fails = True  # all connections of Datasette are prepared
        assert await set_secret(datasette, "A", "two") == 2
        assert (await secret_state(datasette, "A")).version == 2


async def test_an_immutable_file_and_its_log_stay_as_they_are(
    make_datasette: MakeDatasette, master_key: str, named: str, tmp_path: Path
) -> None:
    copies = [tmp_path / name for name in ("copy.db", "copy.db-wal")]
    with closing(sqlite3.connect(named, isolation_level=None)) as conn:
        conn.execute("pragma journal_mode = wal").fetchall()
        conn.execute("insert into notes values (1, 'in the log only')")
        for source, copy in zip((named, f"{named}-wal"), copies, strict=True):
            shutil.copy(source, copy)
    before = [copy.read_bytes() for copy in copies]
    datasette = make_datasette(
        master_key,
        database="copy",
        immutables=[str(copies[0])],
        settings={"cache_size_kb": 2000},
    )
    await datasette.invoke_startup()
    datasette.close()
    assert [copy.read_bytes() for copy in copies] == before


async def test_the_first_start_leaves_the_triggers_of_others_as_they_are(
    datasette: Datasette,
) -> None:
    await datasette.invoke_startup()
    await set_secret(datasette, "A", "a value")
    # It would call itself without end if triggers were recursive.
    await datasette.get_database("named").execute_write("update ledger set amount = 20")


async def test_a_change_that_waits_for_the_lock_holds_up_nobody(
    datasette: Datasette, named: str
) -> None:
    await datasette.invoke_startup()
    await set_secret(datasette, "A", "a value")
    with closing(sqlite3.connect(named, isolation_level=None)) as other:
        other.execute("begin immediate")
        change = asyncio.ensure_future(set_secret(datasette, "A", "another"))
        await asyncio.wait([change], timeout=0.1)
        # Other work of Datasette's write thread, for which no lock is needed.
        work = datasette.get_database("named").execute_write_fn(
            lambda conn: conn.in_transaction, transaction=False
        )
        assert await asyncio.wait_for(work, 20) is False
        assert not change.done()
        other.execute("commit")
        assert await asyncio.wait_for(change, 20) == 2


async def test_a_server_starts_although_the_rules_of_a_plugin_fail(
    datasette: Datasette, capsys: Captured
) -> None:
    def permission_resources_sql() -> PermissionSQL:
        return PermissionSQL(sql="select * from made_when_that_plugin_starts")

    with plugin(permission_resources_sql=permission_resources_sql):
        await datasette.invoke_startup()
        assert "a permission rule failed (" in capsys.readouterr().err
        [warning, *_] = await health.exposure(datasette)
        assert warning.startswith("a permission rule failed (")
    assert "failed" not in "".join(await health.exposure(datasette))


def test_a_plugin_that_fails_to_register_secrets_stops_no_command(
    console: Console,
) -> None:
    console.ok("set", "A", "--create", input="a value")

    def register_secrets(datasette: Datasette) -> list[Any]:
        return datasette.made_when_that_plugin_starts  # type: ignore[attr-defined,no-any-return]

    with plugin(register_secrets=register_secrets):
        assert console.value("A") == "a value"
        assert "EXAMPLE_SECRET" not in console.ok("list")
        for command in (
            ("history", "A"),
            ("delete", "A", "--yes"),
            ("destroy", "A", "--version", "1", "--yes"),
        ):
            console.ok(*command)


async def test_a_database_that_was_replaced_raises_an_error_of_this_package(
    datasette: Datasette, named: str
) -> None:
    await datasette.invoke_startup()
    await set_secret(datasette, "A", "a value")
    datasette.remove_database("named")
    datasette.add_database(Database(datasette, path=named), name="named")
    for call in (
        lambda: get_secret(datasette, "A"),
        lambda: secret_state(datasette, "A"),
        lambda: set_secret(datasette, "A", "another"),
    ):
        with pytest.raises(DatabaseUnavailable, match="was closed; restart Datasette"):
            await call()


async def test_what_a_plugin_stores_meanwhile_is_logged_as_its_own(
    datasette: Datasette, named: str
) -> None:
    async def refresh() -> list[Any]:
        await set_secret(datasette, "TOKEN", "a token", keep=2)
        return []

    def menu_links() -> Any:
        return refresh

    def track_event(event: Any) -> Any:
        return refresh if event.secret == "A" else None

    await datasette.invoke_startup()
    visitor = Visitor(datasette)
    with plugin(menu_links=menu_links):
        assert (await visitor.get()).status_code == 200
        await set_secret(datasette, "B", "a value")
        refused = await visitor.post("/B", secret="a value", note="x" * 101)
        assert refused.status_code == 400
    with plugin(track_event=track_event):
        assert (await visitor.post("/A/-/set", secret="a value")).status_code == 302
    with closing(sqlite3.connect(named)) as conn:
        rows = conn.execute("select distinct name, via from datasette_secrets_log")
        assert set(rows) == {("TOKEN", "plugin"), ("B", "plugin"), ("A", "page")}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no file modes")
async def test_the_file_is_private_at_the_end_of_a_link_that_led_nowhere(
    make_datasette: MakeDatasette, master_key: str, tmp_path: Path
) -> None:
    (tmp_path / "volume").mkdir()
    link = tmp_path / "link.db"
    link.symlink_to(tmp_path / "volume" / "internal.db")
    before = os.umask(0o022)
    try:
        datasette = make_datasette(master_key, internal=str(link))
        await datasette.invoke_startup()
    finally:
        os.umask(before)
    assert stat.S_IMODE(link.stat().st_mode) == 0o600
