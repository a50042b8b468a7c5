"""The change log: one row for each change, written with it, from every door."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeDatasette
from datasette.app import Datasette
from support import decoder
from support.console import Console

from datasette_secrets import (
    CheckResult,
    DatabaseUnavailable,
    InvalidSecret,
    VersionConflict,
    changes,
    checks,
    delete_secret,
    get_secret,
    inspection,
    restore_secret,
    service,
    set_secret,
    store,
)
from datasette_secrets.instance import get_instance

NAME = "API_KEY"
VALUE = "sk-live-4f9c0d1e"

Row = dict[str, Any]


def log(path: str | Path) -> list[Row]:
    """The rows of the log as they stand in the file, oldest first, without their time."""
    with closing(sqlite3.connect(path)) as conn:
        conn.row_factory = sqlite3.Row
        rows = [
            dict(row)
            for row in conn.execute(
                "select actor_id, via, action, name, version, detail, at "
                "from datasette_secrets_log order by id"
            )
        ]
    for row in rows:
        assert len(row.pop("at")) == len("2026-01-01 00:00:00")
        row["detail"] = row["detail"] and json.loads(row["detail"])
    return rows


def alter(path: str | Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as conn, conn:
        for statement in statements:
            conn.execute(statement)


def snapshot(path: str | Path) -> list[tuple[Any, ...]]:
    """Every row of the secrets, whole."""
    return [tuple(row.values()) for row in decoder.rows(str(path))]


async def test_a_change_that_is_refused_or_changes_nothing_leaves_no_row(
    datasette: Datasette, internal: str
) -> None:
    await set_secret(datasette, NAME, VALUE)
    before = log(internal)
    for refused in (
        lambda: set_secret(datasette, NAME, VALUE, expected_version=7),
        lambda: set_secret(datasette, NAME, VALUE, keep=1),
        lambda: set_secret(datasette, NAME, VALUE, renew_by="2026-02-30"),
        lambda: set_secret(datasette, NAME, "\0"),
        lambda: service.roll_back(datasette, NAME, 7),
        lambda: service.destroy_versions(datasette, NAME, [1, 7]),
        lambda: delete_secret(datasette, "NOTHING"),
    ):
        with pytest.raises((InvalidSecret, VersionConflict)):
            await refused()
    await restore_secret(datasette, NAME)
    assert log(internal) == before


async def test_of_two_secrets_set_at_once_each_has_its_row_or_neither(
    datasette: Datasette, internal: str
) -> None:
    await service.set_secrets(datasette, {"A": plaintext("a"), "B": plaintext("b")})
    assert [row["name"] for row in log(internal)] == ["A", "B"]
    alter(
        internal,
        "create trigger t before insert on datasette_secrets when new.name = 'D' "
        "begin select raise(abort, 'no'); end",
    )
    with pytest.raises(DatabaseUnavailable):
        await service.set_secrets(datasette, {"C": plaintext("c"), "D": plaintext("d")})
    assert [row["name"] for row in log(internal)] == ["A", "B"]


def plaintext(value: str) -> Any:
    from datasette_secrets.envelope import Plaintext

    return Plaintext.parse(value)


# Nothing is changed that is not logged, or not kept.


@pytest.mark.parametrize(
    "statements",
    [
        ["drop table datasette_secrets_log"],
        ["alter table datasette_secrets_log drop column via"],
        [
            "drop table datasette_secrets_log",
            "create view datasette_secrets_log as select 1 as id",
        ],
        [
            "create trigger t after insert on datasette_secrets_log "
            "begin delete from datasette_secrets_log where id = new.id; end"
        ],
        [
            "create trigger t before insert on datasette_secrets_log "
            "begin select raise(ignore); end"
        ],
        [
            "create trigger t after insert on datasette_secrets_log "
            "begin update datasette_secrets_log set actor_id = 'x'; end"
        ],
        [
            "create trigger t after insert on datasette_secrets_log "
            "begin delete from datasette_secrets; end"
        ],
        [
            "create trigger t after insert on datasette_secrets_log "
            "begin update datasette_secrets set deleted_at = '2020', note = 'x', "
            "encrypted = x'00'; end"
        ],
    ],
    ids=str,
)
@pytest.mark.parametrize("action", ["set", "delete", "destroy", "note", "keep"])
async def test_a_change_whose_rows_are_not_kept_does_not_happen(
    datasette: Datasette, internal: str, statements: list[str], action: str
) -> None:
    for value in ("one", "two"):
        await set_secret(datasette, NAME, value, actor_id="ann")
    before = snapshot(internal)
    alter(internal, *statements)

    act = {
        "set": lambda: set_secret(datasette, NAME, VALUE),
        "delete": lambda: delete_secret(datasette, NAME),
        "destroy": lambda: service.destroy_versions(datasette, NAME, [1]),
        "note": lambda: service.set_details(datasette, NAME, {"note": "another"}),
        "keep": lambda: set_secret(datasette, NAME, VALUE, keep=2),
    }[action]
    with pytest.raises(DatabaseUnavailable) as raised:
        await act()  # type: ignore[no-untyped-call]
    assert "\n" not in str(raised.value)
    assert snapshot(internal) == before
    assert await get_secret(datasette, NAME) == "two"


@pytest.mark.parametrize(
    ("action", "undoing"),
    [
        ("set", "before insert on {} begin select raise(ignore); end"),
        ("set", "after insert on {} begin delete from {} where id = new.id; end"),
        ("set", "after insert on {} begin update {} set deleted_at = '2020'; end"),
        ("set", "after insert on {} begin update {} set encrypted = x'00'; end"),
        ("set", "after insert on {} begin update {} set version = -version; end"),
        ("set", "after insert on {}_log begin delete from {}; end"),
        ("set", "after insert on {}_log begin delete from {}_log; end"),
        ("set", "before insert on {}_log begin select raise(ignore); end"),
        ("set", "after insert on {}_log begin update {}_log set via = 'page'; end"),
        ("note", "before update on {} begin select raise(ignore); end"),
        (
            "note",
            "after update of note on {} begin update {} set updated_by = 'x'; end",
        ),
        ("renew", "before update on {} begin select raise(ignore); end"),
        ("delete", "before update on {} begin select raise(ignore); end"),
        ("restore", "after insert on {}_log begin update {} set deleted_by = 1; end"),
        ("roll back", "before insert on {} begin select raise(ignore); end"),
        ("destroy", "before update on {} begin select raise(ignore); end"),
        ("destroy", "after insert on {}_log begin update {} set encrypted = 7; end"),
        ("keep", "before delete on {} begin select raise(ignore); end"),
        ("read", "before insert on {}_log begin select raise(ignore); end"),
    ],
)
async def test_a_change_that_is_not_found_where_it_was_written_is_taken_back(
    datasette: Datasette,
    internal: str,
    action: str,
    undoing: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for value in ("one", "two"):
        await set_secret(datasette, NAME, value, actor_id="ann")
    if action == "restore":
        await delete_secret(datasette, NAME)
    before = snapshot(internal), log(internal)

    # The check of the tables would refuse the change before it is made.
    monkeypatch.setattr(inspection, "require_whole_schema", lambda conn: None)

    def undo(conn: sqlite3.Connection) -> None:
        table = "datasette_secrets"
        where = undoing.replace("on {}", f"on main.{table}", 1).replace("{}", table)
        conn.execute(f"create temp trigger t {where}")

    db = get_instance(datasette).db
    await db.execute_write_fn(undo, transaction=False)
    actions: dict[str, Callable[[], Awaitable[Any]]] = {
        "set": lambda: set_secret(datasette, NAME, VALUE),
        "note": lambda: service.set_details(datasette, NAME, {"note": "another"}),
        "renew": lambda: service.set_details(
            datasette, NAME, {"renew_by": "2027-01-31"}
        ),
        "delete": lambda: delete_secret(datasette, NAME),
        "restore": lambda: restore_secret(datasette, NAME),
        "roll back": lambda: service.roll_back(datasette, NAME, 1),
        "destroy": lambda: service.destroy_versions(datasette, NAME, [1]),
        "keep": lambda: set_secret(datasette, NAME, VALUE, keep=2),
        "read": lambda: service.log_read(datasette, NAME, 1),
    }
    with pytest.raises(DatabaseUnavailable, match="does not contain what was written"):
        await actions[action]()
    assert (snapshot(internal), log(internal)) == before


async def test_a_value_read_in_the_shell_is_printed_where_it_cannot_be_logged(
    console: Console,
) -> None:
    await console.fill(NAME)
    alter(console.internal, "drop table datasette_secrets_log")
    alter(console.internal, "create view datasette_secrets_log as select 1 as id")
    result = console.process("get", NAME)
    assert (result.returncode, result.stdout) == (0, f"{NAME} value 1\n")
    assert "not logged" in result.stderr


async def test_a_value_from_the_environment_is_not_logged(console: Console) -> None:
    await console.fill(NAME)
    before = log(console.internal)
    env = {**os.environ, f"DATASETTE_SECRETS_{NAME}": "from here"}
    assert console.process("get", NAME, env=env).stdout == "from here\n"
    assert log(console.internal) == before


# Reading the log.


async def test_the_log_is_read_newest_first_in_pages_and_of_one_secret(
    datasette: Datasette,
) -> None:
    db = get_instance(datasette).db
    for number in range(7):
        await set_secret(datasette, f"KEY_{number % 2}", VALUE)
    newest = await changes.entries(db, limit=3)
    assert [entry.id for entry in newest] == [7, 6, 5]
    older = await changes.entries(db, limit=10, before=newest[-1].id)
    assert [entry.id for entry in older] == [4, 3, 2, 1]
    of_one = await changes.entries(db, name="KEY_1", limit=2)
    assert [(entry.name, entry.version) for entry in of_one] == [
        ("KEY_1", 3),
        ("KEY_1", 2),
    ]
    assert await changes.entries(db, name="KEY_1", before=2) == []


async def test_a_page_of_the_log_and_of_a_secret_is_found_in_an_index(
    make_datasette: MakeDatasette, master_key: str
) -> None:
    # With one thread there is one connection to watch.
    datasette = make_datasette(master_key, settings={"num_sql_threads": 1})
    await set_secret(datasette, NAME, VALUE)
    plans: list[str] = []
    statements: list[str] = []
    db = get_instance(datasette).db

    def watch(conn: sqlite3.Connection) -> None:
        conn.set_trace_callback(statements.append)

    await db.execute_fn(watch)
    await changes.entries(db, limit=10)
    await changes.entries(db, name=NAME, limit=10)
    await changes.newest_checks(db, [NAME])
    for sql in list(statements):
        if "datasette_secrets_log" in sql:
            rows = (await db.execute("explain query plan " + sql)).rows
            plans += [row["detail"] for row in rows]
    assert plans
    assert not any("TEMP B-TREE" in plan for plan in plans), plans
    assert not any(
        plan.startswith("SCAN datasette_secrets_log USING INDEX") for plan in plans
    )


async def test_a_page_of_a_log_of_a_million_rows_reads_no_more_than_that_page(
    make_datasette: MakeDatasette, master_key: str, internal: str
) -> None:
    datasette = make_datasette(master_key, settings={"num_sql_threads": 1})
    await set_secret(datasette, NAME, VALUE)
    alter(
        internal,
        "with recursive n(i) as (select 1 union all select i + 1 from n where i < 1e6) "
        "insert into datasette_secrets_log (at, via, action, name, version) "
        f"select '2026-01-01 00:00:00', 'api', 'set-note', '{NAME}', 1 from n",
    )
    db = get_instance(datasette).db
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 1
        return 0

    def watch(conn: sqlite3.Connection) -> None:
        conn.set_progress_handler(count, 1)

    await db.execute_fn(watch)
    pages = [
        await changes.entries(db, limit=101),
        await changes.entries(db, limit=101, before=500_000),
        await changes.entries(db, name=NAME, limit=101),
        await changes.entries(db, name=NAME, limit=101, before=500_000),
    ]
    assert [len(page) for page in pages] == [101] * 4
    assert pages[0][0].id == 1_000_001
    assert pages[3][0].id == 499_999
    # Some twenty steps of SQLite's machine for each row.
    assert steps < 4 * 101 * 50


async def test_a_log_that_somebody_wrote_nonsense_to_is_read_all_the_same(
    datasette: Datasette, internal: str
) -> None:
    await set_secret(datasette, NAME, VALUE)
    for detail in ("{", "[]", "7", '{"versions": 3}', '{"rolled_back_from": []}'):
        for action in ("destroy-secret", "set-secret", "check-secret", "\x1b[31m"):
            with closing(sqlite3.connect(internal)) as conn, conn:
                conn.execute(
                    "insert into datasette_secrets_log (action, name, version, detail) "
                    "values (?, ?, 'x', ?)",
                    [action, NAME, detail],
                )
    db = get_instance(datasette).db
    assert len(await changes.entries(db)) == 21
    past = await changes.past(db, NAME)
    assert past.copies(1) == []
    assert past == ({}, {})
    await changes.newest_checks(db, [NAME])


async def test_names_and_notes_with_control_characters_are_logged_as_they_are(
    datasette: Datasette, internal: str
) -> None:
    name = "A\x1b[31m\n\"'; drop table datasette_secrets_log --"
    db = get_instance(datasette).db
    await service.log_read(datasette, name, 1, actor_id="x\x00\x1b")
    [row] = log(internal)
    assert (row["name"], row["actor_id"]) == (name, "x\x00\x1b")
    [entry] = await changes.entries(db, name=name)
    assert entry.name == name


def test_control_characters_of_names_and_notes_reach_no_terminal(
    console: Console,
) -> None:
    note, name = "red \x1b[31m \x9b2J\r\n\u202egnp", "A\x1b[2J\u202e"
    console.ok("set", NAME, "--note", note, "--create", input=VALUE)
    console.ok("note", NAME, note[::-1])
    console.sql(
        "insert into datasette_secrets_log (at, actor_id, via, action, name, detail) "
        f"select at, 'x{name}', '{name}', '{name}', '{name}', "
        f"json_object('{name}', '{name}') from datasette_secrets_log"
    )
    for arguments in (("list",), ("history", NAME), ("log",), ("log", "--name", name)):
        shown = console.ok(*arguments)
        assert len(shown.splitlines()) > 1
        assert not set(shown) & set("\x1b\x9b\r\u202e"), arguments
    assert console.json("log")["log"][0]["name"] == name
    # The log keeps no note, only that it was changed.
    assert note[::-1] not in str(log(console.internal))


async def test_control_characters_of_names_are_shown_on_the_page_as_text(
    datasette: Datasette, internal: str, admin: dict[str, str]
) -> None:
    await set_secret(datasette, NAME, VALUE)
    name = "A\x1b<script>alert(1)</script>\u202e"
    alter(
        internal, f"update datasette_secrets_log set name = '{name}', action = '{name}'"
    )
    page = await datasette.client.get("/-/secrets/-/log", cookies=admin)
    assert page.status_code == 200
    assert "A\x1b&lt;script&gt;alert(1)&lt;/script&gt;" in page.text
    assert "<script>alert" not in page.text


# What the log says about versions.


async def test_the_log_tells_where_a_version_comes_from_and_who_destroyed_one(
    datasette: Datasette,
) -> None:
    await set_secret(datasette, NAME, "leaked", note="the first")
    await set_secret(datasette, NAME, "another", note="the second")
    await service.roll_back(datasette, NAME, 1)
    await set_secret(datasette, NAME, "again another", note="the fourth")
    await service.roll_back(datasette, NAME, 3)
    await service.destroy_versions(datasette, NAME, [1, 2], actor_id="ann")

    db = get_instance(datasette).db
    past = await changes.past(db, NAME)
    assert past.rolled_back_from == {3: 1, 5: 3}
    assert past.copies(1) == [3, 5]
    assert past.copies(3) == [1, 5]
    assert past.copies(5) == [1, 3]
    assert past.copies(2) == past.copies(4) == []
    assert past.destroyed.keys() == {1, 2}
    assert past.destroyed[1].actor_id == "ann"
    notes = [version.note for version in await store.history(db, NAME)]
    assert notes == ["the first", "the fourth", "the first", "the second", "the first"]


async def test_the_json_says_what_the_log_knows(
    datasette: Datasette, admin: dict[str, str]
) -> None:
    await set_secret(datasette, NAME, VALUE, renew_by="2027-01-31")
    await checks.log(datasette, NAME, 1, CheckResult("works"))
    await service.roll_back(datasette, NAME, 1)
    await service.destroy_versions(datasette, NAME, [1], actor_id="ann")
    answer = await datasette.client.get(f"/-/secrets/{NAME}.json", cookies=admin)
    new, old = answer.json()["versions"]
    assert (new["rolled_back_from"], new["destroyed_at"]) == (1, None)
    assert (old["destroyed_by"], old["renew_by"]) == ("ann", "2027-01-31")
    assert old["destroyed_at"]
    secret = answer.json()["secret"]
    # They describe the newest version, which nobody has checked.
    assert (secret["check"], secret["checked_at"], secret["renew_by"]) == (None,) * 3

    await set_secret(datasette, NAME, VALUE, renew_by="2028-01-31")
    await checks.log(datasette, NAME, 3, CheckResult("unknown"))
    answer = await datasette.client.get("/-/secrets.json", cookies=admin)
    [secret] = [each for each in answer.json()["secrets"] if each["name"] == NAME]
    assert (secret["check"], secret["renew_by"]) == ("unknown", "2028-01-31")
    assert secret["checked_at"]


async def test_a_check_counts_for_the_version_that_is_the_newest(
    datasette: Datasette,
) -> None:
    db = get_instance(datasette).db
    await set_secret(datasette, NAME, VALUE)
    await checks.log(datasette, NAME, 1, CheckResult("works"))
    checked = (await changes.newest_checks(db, [NAME, "OTHER"]))[NAME]
    assert (checked.version, checked.outcome) == (1, "works")
    await checks.log(datasette, NAME, 1, CheckResult("rejected"))
    assert (await changes.newest_checks(db, [NAME]))[NAME].outcome == "rejected"
    await checks.log(datasette, NAME, None, CheckResult("unknown"))
    assert (await changes.newest_checks(db, [NAME]))[NAME].outcome == "rejected"
    await set_secret(datasette, NAME, "another")
    assert await changes.newest_checks(db, [NAME]) == {}


async def test_a_version_whose_number_was_given_again_has_nothing_of_the_one_before(
    datasette: Datasette, internal: str, admin: dict[str, str]
) -> None:
    db = get_instance(datasette).db
    await set_secret(datasette, NAME, VALUE)
    await checks.log(datasette, NAME, 1, CheckResult("works"))
    await service.destroy_versions(datasette, NAME, [1])
    alter(internal, f"delete from datasette_secrets where name = '{NAME}'")
    assert await set_secret(datasette, NAME, "another") == 1
    assert await changes.newest_checks(db, [NAME]) == {}
    answer = await datasette.client.get(f"/-/secrets/{NAME}.json", cookies=admin)
    assert answer.json()["secret"]["check"] is None
    [version] = answer.json()["versions"]
    assert (version["destroyed_at"], version["destroyed_by"]) == (None, None)


async def test_it_is_known_which_version_was_used_last(datasette: Datasette) -> None:
    await set_secret(datasette, NAME, VALUE)
    await get_secret(datasette, NAME, "ann")
    await set_secret(datasette, NAME, "another")
    db = get_instance(datasette).db
    used = (await store.last_uses(db, [NAME]))[NAME]
    assert (used.by, used.version) == ("ann", 1)


# A date to renew by.


@pytest.mark.parametrize(
    "date",
    [
        "2026-02-30",
        "2026-13-01",
        "2026-1-1",
        "20260101",
        "2026-W01-1",
        "tomorrow",
        "",
        "2026-01-01 ",
        "2026-01-01T00:00",
        "\u0662\u0660\u0662\u0666-01-01",
        "0000-01-01",
        7,
        True,
    ],
)
async def test_a_date_that_does_not_exist_is_refused(
    datasette: Datasette, date: Any
) -> None:
    await set_secret(datasette, NAME, VALUE)
    with pytest.raises(InvalidSecret, match="YYYY-MM-DD"):
        await set_secret(datasette, NAME, VALUE, renew_by=date)
    with pytest.raises(InvalidSecret, match="YYYY-MM-DD"):
        await service.set_details(datasette, NAME, {"renew_by": date})
    assert await get_secret(datasette, NAME) == VALUE


async def test_a_new_value_without_a_date_has_none(
    datasette: Datasette, internal: str
) -> None:
    db = get_instance(datasette).db
    await set_secret(datasette, NAME, VALUE, renew_by="2027-01-31")
    await set_secret(datasette, NAME, VALUE)
    dates = [version.renew_by for version in await store.history(db, NAME)]
    assert dates == [None, "2027-01-31"]
    await service.set_details(
        datasette, NAME, {"renew_by": "2028-02-29"}, actor_id="ann"
    )
    assert (await store.history(db, NAME))[0].renew_by == "2028-02-29"
    await service.set_details(datasette, NAME, {"renew_by": None})
    assert (await store.history(db, NAME))[0].renew_by is None
    assert [row["detail"] for row in log(internal)[2:]] == [
        {"renew_by": "2028-02-29"},
        {"renew_by": None},
    ]
