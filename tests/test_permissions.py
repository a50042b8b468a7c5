"""Who may do what: every route, method and kind of actor; and the table that is locked."""

from __future__ import annotations

import itertools
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeDatasette
from datasette import Response, hookimpl
from datasette.app import Datasette
from datasette.plugins import pm
from datasette.resources import TableResource
from datasette.tokens import TokenRestrictions
from datasette.utils.asgi import Request

from datasette_secrets import DatabaseUnavailable, set_secret

# Routes and methods. A form post that succeeds redirects; JSON says 200.

METHODS = ("GET", "HEAD", "POST form", "POST JSON", "PUT", "PATCH", "DELETE", "OPTIONS")
NO_OTHERS = (405, 405, 405, 405)
READ_ONLY = (200, 200, 405, 405, *NO_OTHERS)
PAGE = (200, 200, 302, 200, *NO_OTHERS)
# A program is told everything in JSON, and there is no confirmation for it to read.
PAGE_FOR_TOKENS = (200, 200, 200, 200, *NO_OTHERS)
ACTION = PAGE
ACTION_FOR_TOKENS = (405, 405, 200, 200, *NO_OTHERS)
SET = (405, 405, 302, 200, *NO_OTHERS)
UNKNOWN = (404, 404, 404, 404, *NO_OTHERS)
UNKNOWN_FOR_TOKENS = (405, 405, 404, 404, *NO_OTHERS)
UNKNOWN_JSON = (404, 404, 405, 405, *NO_OTHERS)

#: The path, what a post sends, as a form and as JSON, and the status for each method
#: where the actor may manage secrets: with a cookie, and with a token.
ROUTES: dict[str, tuple[dict[str, Any], tuple[int, ...], tuple[int, ...]]] = {
    "/-/secrets": ({}, READ_ONLY, READ_ONLY),
    "/-/secrets.json": ({}, READ_ONLY, READ_ONLY),
    "/-/secrets/KEPT": ({"value": "x"}, PAGE, PAGE_FOR_TOKENS),
    "/-/secrets/KEPT.json": ({"value": "x"}, READ_ONLY, READ_ONLY),
    "/-/secrets/NOBODY": ({"value": "x"}, UNKNOWN, UNKNOWN),
    "/-/secrets/NOBODY.json": ({}, UNKNOWN_JSON, UNKNOWN_JSON),
    "/-/secrets/KEPT/-/set": ({"value": "x"}, SET, ACTION_FOR_TOKENS),
    "/-/secrets/NEW/-/set": ({"value": "x"}, SET, ACTION_FOR_TOKENS),
    "/-/secrets/KEPT/-/rollback?version=1": ({"version": 1}, ACTION, ACTION_FOR_TOKENS),
    "/-/secrets/KEPT/-/delete": ({}, ACTION, ACTION_FOR_TOKENS),
    "/-/secrets/KEPT/-/restore": ({}, ACTION, ACTION_FOR_TOKENS),
    "/-/secrets/KEPT/-/destroy": ({"version": 2}, ACTION, ACTION_FOR_TOKENS),
    "/-/secrets/NOBODY/-/rollback": ({"version": 1}, UNKNOWN, UNKNOWN_FOR_TOKENS),
    "/-/secrets/NOBODY/-/delete": ({}, UNKNOWN, UNKNOWN_FOR_TOKENS),
    "/-/secrets/NOBODY/-/restore": ({}, UNKNOWN, UNKNOWN_FOR_TOKENS),
    "/-/secrets/NOBODY/-/destroy": ({"version": 1}, UNKNOWN, UNKNOWN_FOR_TOKENS),
    "/-/secrets/-/rotate": ({}, ACTION, ACTION_FOR_TOKENS),
    "/-/secrets/-/upgrade": ({}, ACTION, ACTION_FOR_TOKENS),
}
#: What it adds has to be new each time, so it stands by itself.
ADD = "/-/secrets/-/add"

REFUSED = ("anonymous", "signed in", "token for other actions", "token of sam")
ALLOWED = ("root", "granted", "token of root", "token for this action")


async def credentials(datasette: Datasette, kind: str) -> dict[str, Any]:
    """What a request of this kind of actor carries."""
    actor_id, *actions = {
        "anonymous": [""],
        "signed in": ["sam"],
        "root": ["root"],
        "granted": ["pat"],
        "token of sam": ["sam"],
        "token of root": ["root"],
        "token for other actions": ["root", "view-instance"],
        "token for this action": ["root", "manage-secrets"],
    }[kind]
    if not actor_id:
        return {}
    if not kind.startswith("token"):
        return {
            "cookies": {"ds_actor": datasette.client.actor_cookie({"id": actor_id})}
        }
    restrictions = TokenRestrictions()
    for action in actions:
        restrictions.allow_all(action)
    token = await datasette.create_token(
        actor_id, restrictions=restrictions if actions else None
    )
    return {"headers": {"Authorization": f"Bearer {token}"}}


async def ask(
    datasette: Datasette, path: str, method: str, carried: dict[str, Any]
) -> Any:
    verb, _, body = method.partition(" ")
    sent = dict(ROUTES[path][0]) if path in ROUTES else {}
    options: dict[str, Any] = {}
    if body == "JSON":
        options["json"] = sent
    elif body == "form":
        options["data"] = sent
    return await datasette.client.request(verb, path, **options, **carried)


@pytest.fixture
async def shared(make_datasette: MakeDatasette, master_key: str) -> Datasette:
    datasette = make_datasette(
        master_key, config={"permissions": {"manage-secrets": {"id": ["root", "pat"]}}}
    )
    await datasette.invoke_startup()
    for value in ("one", "two", "three"):
        await set_secret(datasette, "KEPT", value)
    return datasette


async def dump(datasette: Datasette) -> list[tuple[Any, ...]]:
    db = datasette.get_internal_database()
    rows = await db.execute("select * from datasette_secrets order by id")
    return [tuple(row) for row in rows]


@pytest.mark.parametrize("kind", REFUSED)
async def test_every_route_and_method_refuses(shared: Datasette, kind: str) -> None:
    before = await dump(shared)
    carried = await credentials(shared, kind)
    statuses = {
        (path, method): (await ask(shared, path, method, carried)).status_code
        for path, method in itertools.product([*ROUTES, ADD], METHODS)
    }
    assert statuses == dict.fromkeys(itertools.product([*ROUTES, ADD], METHODS), 403)
    assert before == await dump(shared)


@pytest.mark.parametrize("kind", ALLOWED)
async def test_every_route_and_method_answers(shared: Datasette, kind: str) -> None:
    carried = await credentials(shared, kind)
    statuses, expected = {}, {}
    for path, (_, with_cookie, with_token) in ROUTES.items():
        by_method = with_token if kind.startswith("token") else with_cookie
        for method, status in zip(METHODS, by_method, strict=True):
            answer = await ask(shared, path, method, carried)
            expected[path, method], statuses[path, method] = status, answer.status_code
            assert answer.headers["cache-control"].endswith("no-store")
    assert statuses == expected


@pytest.mark.parametrize("kind", ALLOWED)
async def test_the_page_to_add_a_secret_answers(shared: Datasette, kind: str) -> None:
    carried = await credentials(shared, kind)
    answers = {
        method: (await ask(shared, ADD, method, carried)).status_code
        for method in METHODS
    }
    assert answers == {
        "GET": 200,
        "HEAD": 200,
        "POST form": 400,  # with nothing in it
        "POST JSON": 400,
        **dict.fromkeys(("PUT", "PATCH", "DELETE", "OPTIONS"), 405),
    }


async def test_a_get_changes_nothing(shared: Datasette, admin_of: Any) -> None:
    before = await dump(shared)
    for path in (*ROUTES, ADD):
        await shared.client.get(path, cookies=admin_of(shared))
        assert before == await dump(shared), path


@pytest.fixture
def admin_of() -> Any:
    def cookies(datasette: Datasette) -> dict[str, str]:
        return {"ds_actor": datasette.client.actor_cookie({"id": "root"})}

    return cookies


async def test_a_refusal_tells_a_program_so_in_json(shared: Datasette) -> None:
    for options in (
        {"json": {"value": "x"}},
        {
            "content": b"{}",
            "headers": {"content-type": "application/json; charset=utf-8"},
        },
        {"headers": {"accept": "application/json"}},
    ):
        answer = await shared.client.post("/-/secrets/KEPT/-/set", **options)
        assert answer.status_code == 403
        assert answer.json() == {
            "ok": False,
            "error": "Permission denied: this needs manage-secrets",
            "errors": ["Permission denied: this needs manage-secrets"],
            "status": 403,
        }
        assert answer.headers["cache-control"].endswith("no-store")
        assert answer.headers["x-frame-options"] == "DENY"


@pytest.mark.parametrize("kind", ["anonymous", "signed in", "root", "granted"])
async def test_only_those_who_may_see_the_menu_link(
    shared: Datasette, kind: str
) -> None:
    carried = await credentials(shared, kind)
    page = await shared.client.get("/", **carried)
    assert ("Manage secrets" in page.text) == (kind in ALLOWED)
    jump = await shared.client.get("/-/jump?q=secrets", **carried)
    found = [
        (each["name"], each["url"], each["description"])
        for each in jump.json()["matches"]
        if each["type"] == "menu"
    ]
    about = "API keys and other credentials that plugins use"
    assert found == [("Manage secrets", "/-/secrets", about)] * (kind in ALLOWED)


async def test_a_refusal_to_a_browser_is_the_page_of_a_forbidden_plugin(
    shared: Datasette,
) -> None:
    class Undecided:
        @hookimpl(tryfirst=True)
        def forbidden(self) -> None:
            return None

    class SignIn:
        @hookimpl
        def forbidden(self, request: Request, message: str) -> Any:
            async def page() -> Any:
                return Response.text(f"Sign in: {request.path}: {message}")

            return page

    plugins = (Undecided(), SignIn())
    for plugin in plugins:
        pm.register(plugin)
    try:
        page = await shared.client.get("/-/secrets")
        answer = await shared.client.get("/-/secrets.json")
    finally:
        for plugin in plugins:
            pm.unregister(plugin)
    says = "Permission denied: this needs manage-secrets"
    # The page also says how to sign in.
    assert page.text.startswith(f"Sign in: /-/secrets: {says}. You are not signed in.")
    assert (answer.status_code, answer.json()["error"]) == (403, says)


# Where `database` names a database that people can browse, its table is locked.

TABLE = "datasette_secrets"
LOG = "datasette_secrets_log"
SPELLINGS = (TABLE, TABLE.upper(), "Datasette_Secrets", LOG, LOG.upper())
ROWS = {
    TABLE: {"name": "FORGED", "version": 1, "encryption_key_name": "0" * 16},
    LOG: {"name": "FORGED", "version": 1, "action": "set-secret"},
}


@pytest.fixture
async def browsable(
    make_datasette: MakeDatasette, master_key: str, tmp_path: Path
) -> Datasette:
    path = str(tmp_path / "data.db")
    with sqlite3.connect(path) as conn:
        conn.execute("create table notes (id integer primary key, body text)")
    conn.close()
    datasette = make_datasette(master_key, database="data", files=[path])
    await datasette.invoke_startup()
    await set_secret(datasette, "KEPT", "kept")
    await datasette.refresh_schemas()
    return datasette


async def state_of(datasette: Datasette) -> list[Any]:
    db = datasette.get_database("data")
    rows = await db.execute("select * from datasette_secrets")
    log = await db.execute("select * from datasette_secrets_log")
    schema = await db.execute("select sql from sqlite_master order by name")
    return [tuple(row) for row in (*rows, *log, *schema)]


def writes(table: str) -> dict[str, dict[str, Any]]:
    row = ROWS[table.lower()]
    return {
        f"/data/{table}/-/insert": {"row": row},
        f"/data/{table}/-/upsert": {"rows": [{"id": 1, **row}]},
        f"/data/{table}/1/-/update": {"update": {"name": "changed"}},
        f"/data/{table}/1/-/delete": {},
        f"/data/{table}/-/drop": {"confirm": True},
        f"/data/{table}/-/alter": {
            "operations": [{"op": "add_column", "args": {"name": "x", "type": "text"}}]
        },
        f"/data/{table}/-/set-column-type": {
            "column": "name",
            "column_type": {"type": "url"},
        },
        "/data/-/create": {"table": table, "row": row},
        "/data/-/create?": {
            "table": table,
            "rows": [{"id": 1, **row}],
            "pk": "id",
            "replace": True,
        },
    }


@pytest.mark.parametrize("table", SPELLINGS)
async def test_root_cannot_change_the_table_through_the_write_api(
    browsable: Datasette, admin_of: Any, table: str
) -> None:
    before = await state_of(browsable)
    for path, sent in writes(table).items():
        answer = await browsable.client.post(
            path, json=sent, cookies=admin_of(browsable)
        )
        # Datasette's API to create a table refused less and less well before 1.0a39: there
        # it is the wrapper around the write that stops it, with a 400.
        assert answer.status_code in (400, 403, 404), path
        assert before == await state_of(browsable), path


@pytest.mark.parametrize("table", SPELLINGS)
async def test_root_cannot_look_at_the_table(
    browsable: Datasette, admin_of: Any, table: str
) -> None:
    suffixes = ("", ".json", ".csv", "/1", "/1.json", "/-/schema")
    # Under another spelling there is no such page, which Datasette reports at length.
    for suffix in suffixes if table in ROWS else (".json", "/1", "/-/schema"):
        answer = await browsable.client.get(
            f"/data/{table}{suffix}", cookies=admin_of(browsable)
        )
        assert answer.status_code in (403, 404), suffix
        if table in ROWS:
            assert answer.status_code == 403, suffix
        assert "KEPT" not in answer.text, suffix


WRITE_SQL = (
    "insert into {table} (name, version, {third}) values ('FORGED', 1, '0')",
    "replace into {table} (id, name, version, {third}) values (1, 'F', 1, '0')",
    "update {table} set name = 'changed'",
    "delete from {table}",
    "drop table {table}",
    "alter table {table} add column x text",
    "alter table {table} rename to elsewhere",
    "create index stolen on {table} (name)",
    "create trigger t after insert on notes begin delete from {table}; end",
    "create table copied as select * from {table}",
    "insert into notes (body) select name from {table}",
    'update "main"."{table}" set name = 1',
)


def write_sql(table: str) -> list[str]:
    *_, third = ROWS[table.lower()]
    return [sql.format(table=table, third=third) for sql in WRITE_SQL]


@pytest.mark.parametrize("table", SPELLINGS)
async def test_root_cannot_change_the_table_by_sql(
    browsable: Datasette, admin_of: Any, table: str
) -> None:
    before = await state_of(browsable)
    for sql in write_sql(table):
        answer = await browsable.client.post(
            "/data/-/execute-write",
            json={"sql": sql},
            cookies=admin_of(browsable),
        )
        assert answer.status_code in (400, 403), sql
        assert before == await state_of(browsable), sql
    notes = await browsable.get_database("data").execute("select body from notes")
    assert not notes.rows


@pytest.mark.parametrize("table", SPELLINGS)
async def test_a_write_for_a_request_cannot_touch_the_table_whoever_makes_it(
    browsable: Datasette, table: str
) -> None:
    before = await state_of(browsable)
    db = browsable.get_database("data")
    # A trigger can be made, and is stopped when it fires.
    for sql in (sql for sql in write_sql(table) if "trigger" not in sql):
        with pytest.raises(sqlite3.DatabaseError, match=r"not authorized|prohibited"):
            await db.execute_write(sql, request=Request.fake("/"))
        assert before == await state_of(browsable), sql
    await db.execute_write("delete from notes", request=Request.fake("/"))
    [trigger] = (sql for sql in write_sql(table) if "trigger" in sql)
    await db.execute_write(trigger, request=Request.fake("/"))
    with pytest.raises(sqlite3.DatabaseError, match=r"not authorized|prohibited"):
        await db.execute_write(
            "insert into notes (body) values ('x')", request=Request.fake("/")
        )
    # It names our table, so that changes are refused until somebody has dropped it.
    with pytest.raises(DatabaseUnavailable, match="trigger 't'"):
        await set_secret(browsable, "KEPT", "again")
    await db.execute_write("drop trigger t")
    assert before == await state_of(browsable)
    assert await set_secret(browsable, "KEPT", "again") == 2


async def test_the_other_tables_of_that_database_stay_open(
    browsable: Datasette, admin_of: Any
) -> None:
    cookies = admin_of(browsable)
    inserted = await browsable.client.post(
        "/data/notes/-/insert", json={"row": {"body": "hello"}}, cookies=cookies
    )
    written = await browsable.client.post(
        "/data/-/execute-write",
        json={"sql": "insert into notes (body) values ('there')"},
        cookies=cookies,
    )
    shown = await browsable.client.get("/data/notes.json?_shape=array", cookies=cookies)
    assert (inserted.status_code, written.status_code) == (201, 200)
    assert [row["body"] for row in shown.json()] == ["hello", "there"]


async def test_every_action_on_tables_is_denied_to_everybody(
    browsable: Datasette,
) -> None:
    actions = [
        name
        for name, action in browsable.actions.items()
        if action.resource_class is TableResource
    ]
    assert "view-table" in actions
    for name, table, actor in itertools.product(
        actions, (TABLE, LOG), (None, {"id": "sam"}, {"id": "root"})
    ):
        assert not await browsable.allowed(
            action=name, resource=TableResource("data", table), actor=actor
        )


async def test_a_warning_says_who_can_read_the_rows_by_sql(
    browsable: Datasette, admin_of: Any
) -> None:
    page = await browsable.client.get("/-/secrets", cookies=admin_of(browsable))
    assert "Anyone, without signing in, can run SQL in the database" in page.text
    assert "can download" not in page.text


async def test_no_warning_where_only_administrators_run_sql(
    make_datasette: MakeDatasette, master_key: str, tmp_path: Path, admin_of: Any
) -> None:
    path = str(tmp_path / "data.db")
    sqlite3.connect(path).execute("vacuum").connection.close()
    datasette = make_datasette(
        master_key,
        database="data",
        files=[path],
        config={"databases": {"data": {"allow_sql": {"id": "root"}}}},
    )
    await datasette.invoke_startup()
    page = await datasette.client.get("/-/secrets", cookies=admin_of(datasette))
    assert page.status_code == 200
    assert "can run SQL" not in page.text
