"""Rows that change between the moment they are read and the moment they are written."""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from typing import Any

import pytest
from conftest import MakeDatasette
from cryptography.fernet import Fernet
from datasette import hookimpl
from datasette.app import Datasette
from datasette.events import Event
from datasette.plugins import pm
from support import decoder
from support.visitor import plugin

from datasette_secrets import (
    DatabaseUnavailable,
    envelope,
    get_secret,
    rotation,
    service,
    set_secret,
    store,
    upgrade,
)
from datasette_secrets.cli import output
from datasette_secrets.instance import get_instance


def alter(path: str, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as conn, conn:
        for sql in statements:
            conn.execute(sql)


def before_the_write(
    datasette: Datasette, other: Callable[[], Awaitable[object]]
) -> None:
    """Let `other` be quicker: it runs before the transaction that writes rows begins."""
    db = get_instance(datasette).db
    write = db.execute_write_fn
    left = 1

    async def execute_write_fn(fn: Any, **options: Any) -> Any:
        nonlocal left
        if left and fn.__qualname__.endswith("rewrite_secret_versions"):
            left -= 1
            await other()
        return await write(fn, **options)  # type: ignore[no-untyped-call]

    db.execute_write_fn = execute_write_fn  # type: ignore[method-assign,assignment]


def put_tokens(path: str, key: str, *names: str) -> None:
    with closing(sqlite3.connect(path)) as conn, conn:
        for name in names:
            conn.execute(
                "insert into datasette_secrets "
                "(name, version, encrypted, encryption_key_name) "
                "values (?, 1, ?, 'default')",
                (name, Fernet(key).encrypt(f"value of {name}".encode())),
            )


@pytest.fixture
async def rotating(
    datasette: Datasette, make_datasette: MakeDatasette, master_key: str
) -> Datasette:
    """An instance with a new key first, on a database in which A, B and C are."""
    for name in "ABC":
        await set_secret(datasette, name, f"value of {name}")
    return make_datasette(envelope.generate_master_key(), master_key)


@pytest.fixture
def quicker(rotating: Datasette, make_datasette: MakeDatasette) -> Datasette:
    """Another instance with the configuration of `rotating`."""
    keys = rotating.plugin_config("datasette-secrets")["encryption-key"]
    return make_datasette(*keys)


@pytest.mark.parametrize("new_data_keys", [False, True])
@pytest.mark.parametrize("of_the_other", [False, True])
async def test_a_row_that_another_rotation_changed_meanwhile_is_read_again(
    rotating: Datasette, quicker: Datasette, new_data_keys: bool, of_the_other: bool
) -> None:
    before_the_write(
        rotating, lambda: rotation.rotate(quicker, new_data_keys=of_the_other)
    )
    report = await rotation.rotate(rotating, new_data_keys=new_data_keys)
    # The other one has wrapped it with the primary key, which needs no second time.
    changed = 3 if new_data_keys else 0
    assert (report.complete, report.changed, report.problems) == (True, changed, [])
    assert report.census is not None
    assert report.census.counts == {report.primary: 3}
    assert (await rotation.verify(rotating)).opened == 3


@pytest.mark.parametrize("new_data_keys", [False, True])
async def test_nobody_can_change_a_row_between_its_reading_and_its_writing(
    rotating: Datasette,
    internal: str,
    new_data_keys: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refused = []
    operation = "reseal" if new_data_keys else "rewrap"
    make_envelope = getattr(envelope, operation)

    def beside_another_writer(*row: Any) -> Any:
        with closing(sqlite3.connect(internal, timeout=0)) as conn:
            with pytest.raises(sqlite3.OperationalError, match="locked") as error:
                conn.execute("update datasette_secrets set wrapped_key = x'00'")
            refused.append(error)
        return make_envelope(*row)

    monkeypatch.setattr(envelope, operation, beside_another_writer)
    report = await rotation.rotate(rotating, new_data_keys=new_data_keys)
    assert (report.complete, report.changed, len(refused)) == (True, 3, 3)
    assert (await rotation.verify(rotating)).opened == 3


@pytest.mark.parametrize("new_data_keys", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        "delete from datasette_secrets where name = 'B'",
        "update datasette_secrets set encrypted = null, wrapped_key = null "
        "where name = 'B'",
    ],
)
async def test_a_row_that_vanished_meanwhile_is_done(
    rotating: Datasette, internal: str, new_data_keys: bool, change: str
) -> None:
    async def vanish() -> None:
        alter(internal, change)

    before_the_write(rotating, vanish)
    report = await rotation.rotate(rotating, new_data_keys=new_data_keys)
    assert (report.complete, report.changed, report.problems) == (True, 2, [])


@pytest.mark.parametrize("wraps_only", [False, True])
@pytest.mark.parametrize(
    "undoes",
    [
        "update datasette_secrets set wrapped_key = old.wrapped_key where id = old.id",
        "update datasette_secrets set wrapped_key = null, encrypted = null "
        "where id = old.id",
        "delete from datasette_secrets where id = old.id",
    ],
)
async def test_a_rotation_is_an_error_where_the_file_does_not_hold_what_was_written(
    rotating: Datasette, internal: str, wraps_only: bool, undoes: str
) -> None:
    ring = get_instance(rotating).settings.require_ring()
    with closing(sqlite3.connect(internal)) as conn:
        envelopes: dict[int, Any] = {}
        for row in store.rows_from(conn, 0, 10):
            sealed = envelope.reseal(ring, row.name, 1, row, 1)
            envelopes[row.id] = sealed[1:3] if wraps_only else sealed
        conn.execute(
            "create temp trigger undo after update of encryption_key_name on "
            f"main.datasette_secrets when new.name = 'B' begin {undoes}; end"
        )
        with pytest.raises(
            DatabaseUnavailable, match="does not contain what was written"
        ):
            store.replace_envelopes(conn, envelopes, wraps_only=wraps_only)


@pytest.mark.parametrize("size", [2, 3, 5])
async def test_a_lock_after_the_last_row_does_not_make_a_rotation_fail(
    rotating: Datasette, internal: str, size: int
) -> None:
    done = 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        if done == 6:  # each of the three rows twice
            other.execute("begin immediate")

    def prepare_connection(conn: sqlite3.Connection) -> None:
        conn.execute("pragma busy_timeout = 50").fetchall()

    other = sqlite3.connect(internal, isolation_level=None)
    with closing(other), plugin(prepare_connection=prepare_connection):
        report = await rotation.rotate(rotating, batch_size=size, progress=progress)
    assert (report.changed, report.complete) == (3, True)
    assert report.clean_up is not None
    assert report.clean_up.failed


async def test_a_row_that_cannot_be_decrypted_costs_no_second_pass(
    rotating: Datasette, internal: str
) -> None:
    alter(internal, "update datasette_secrets set wrapped_key = x'00' where name = 'B'")
    steps: list[int] = []
    report = await rotation.rotate(
        rotating, skip_unopenable=True, progress=steps.append
    )
    assert (report.changed, report.complete) == (2, False)
    assert sum(steps) == 6  # each row once in the preflight and once in one pass


async def test_a_row_of_0x_that_somebody_else_upgraded_meanwhile_is_no_problem(
    datasette: Datasette,
    make_datasette: MakeDatasette,
    internal: str,
    master_key: str,
) -> None:
    put_tokens(internal, master_key, "A", "B", "C")
    quicker = make_datasette(master_key)
    before_the_write(datasette, lambda: upgrade.upgrade(quicker))
    report = await upgrade.upgrade(datasette)
    assert (report.changed, report.complete, report.problems) == (0, True, [])
    assert await get_secret(datasette, "B") == "value of B"


async def test_a_row_of_0x_whose_token_changed_meanwhile_is_read_again(
    datasette: Datasette, internal: str, master_key: str
) -> None:
    put_tokens(internal, master_key, "A", "B", "C")

    async def change() -> None:
        alter(internal, "delete from datasette_secrets where name = 'B'")
        put_tokens(internal, master_key, "B")

    before_the_write(datasette, change)
    report = await upgrade.upgrade(datasette)
    assert (report.changed, report.complete, report.problems) == (3, True, [])
    assert await get_secret(datasette, "B") == "value of B"


# What is reported.


async def test_a_problem_says_what_is_wrong_and_which_command_deals_with_it(
    rotating: Datasette, internal: str, master_key: str
) -> None:
    put_tokens(internal, Fernet.generate_key().decode(), "OLD")
    alter(
        internal,
        "update datasette_secrets set wrapped_key = x'00' where name = 'A'",
        "update datasette_secrets set encryption_key_name = '0123456789abcdef' "
        "where name = 'B'",
    )
    found = {each.name: each for each in (await rotation.verify(rotating)).problems}
    assert {name: each.code for name, each in found.items()} == {
        "A": "cannot-open",
        "B": "unknown-master-key",
        "OLD": "needs-upgrade",
    }
    assert found["A"].remedy == "datasette secrets destroy A --version 1"
    assert found["B"].remedy == (
        "add key 0123456789abcdef to encryption-key, or, if the key is lost, destroy "
        "the version: datasette secrets destroy B --version 1"
    )
    assert found["OLD"].remedy == "datasette secrets upgrade"
    for name, problem in found.items():
        assert problem.message.startswith(f"{name} version 1 ")

    [problem] = (await upgrade.upgrade(rotating)).problems
    assert (problem.name, problem.code) == ("OLD", "cannot-upgrade")
    assert problem.message.startswith("OLD version 1 ")
    assert problem.remedy == (
        "add its key to encryption-key and run 'datasette secrets upgrade' again, or, "
        "if the key is lost, destroy the version: datasette secrets destroy OLD --version 1"
    )


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
async def test_verify_counts_the_same_in_batches_of_any_size(
    rotating: Datasette, internal: str, batch_size: int
) -> None:
    steps: list[int] = []
    found = await rotation.verify(
        rotating, batch_size=batch_size, progress=steps.append
    )
    assert (found.opened, found.destroyed, found.problems) == (3, 0, [])
    assert sum(steps) == 3
    alter(internal, "update datasette_secrets set wrapped_key = x'00' where name > 'A'")
    await service.destroy_versions(rotating, "C", [1])
    await set_secret(rotating, "D", "value of D")
    alter(internal, "update datasette_secrets set encrypted = x'00' where name = 'D'")
    found = await rotation.verify(rotating, batch_size=batch_size)
    assert (found.opened, found.destroyed) == (1, 1)
    assert [problem.name for problem in found.problems] == ["B", "D"]


@pytest.mark.parametrize("vacuum", [False, True])
async def test_what_may_remain_in_a_named_database_is_said_unless_it_is_rewritten(
    make_datasette: MakeDatasette, master_key: str, tmp_path: str, vacuum: bool
) -> None:
    path = f"{tmp_path}/named.db"
    alter(path, "create table t (a)")
    datasette = make_datasette(master_key, database="named", files=[path])
    await set_secret(datasette, "A", "value of A")
    put_tokens(path, master_key, "OLD")
    old = next(row["encrypted"] for row in decoder.rows(path) if row["name"] == "OLD")
    for done in (
        await upgrade.upgrade(datasette, vacuum=vacuum),
        await rotation.rotate(datasette, vacuum=vacuum),
    ):
        assert done.clean_up is not None
        assert (done.clean_up.remains is None) == vacuum
    with open(path, "rb") as file:
        assert not vacuum or old not in file.read()


async def test_an_upgrade_of_a_named_database_says_by_default_what_may_remain(
    make_datasette: MakeDatasette, master_key: str, tmp_path: str
) -> None:
    path = f"{tmp_path}/named.db"
    alter(path, "create table t (a)")
    datasette = make_datasette(master_key, database="named", files=[path])
    await set_secret(datasette, "A", "value of A")
    report = await upgrade.upgrade(datasette)
    assert report.clean_up is not None
    assert report.clean_up.remains


async def test_rows_that_do_not_open_cost_no_second_pass_in_any_batch(
    rotating: Datasette, internal: str
) -> None:
    alter(internal, "update datasette_secrets set wrapped_key = x'00' where name < 'C'")
    steps: list[int] = []
    report = await rotation.rotate(
        rotating, skip_unopenable=True, batch_size=1, progress=steps.append
    )
    assert [problem.name for problem in report.problems] == ["A", "B"]
    assert sum(steps) == 6


async def test_a_row_of_0x_between_others_that_no_key_opens_is_named_once(
    datasette: Datasette, internal: str, master_key: str
) -> None:
    put_tokens(internal, master_key, "A")
    put_tokens(internal, Fernet.generate_key().decode(), "B")
    put_tokens(internal, master_key, "C")
    report = await upgrade.upgrade(datasette)
    assert report.changed == 2
    assert [(each.name, each.code) for each in report.problems] == [
        ("B", "cannot-upgrade")
    ]


# Counting.


async def test_the_census_counts_all_rows_of_0x_whatever_key_they_name(
    datasette: Datasette, internal: str, master_key: str
) -> None:
    put_tokens(internal, master_key, "A", "B", "C")
    alter(
        internal,
        "update datasette_secrets set encryption_key_name = name where name > 'A'",
    )
    assert (await rotation.census(datasette)).legacy == 3


async def test_the_census_of_a_server_without_a_key_has_no_primary(
    make_datasette: MakeDatasette,
) -> None:
    found = await rotation.census(make_datasette())
    assert (found.primary, found.ring, found.counts) == (None, (), {})


async def test_a_rotation_of_nothing_is_complete(datasette: Datasette) -> None:
    report = await rotation.rotate(datasette)
    assert (report.complete, report.changed, report.current) == (True, 0, 0)


async def test_what_is_current_and_what_is_to_change_add_up(
    rotating: Datasette, internal: str
) -> None:
    await set_secret(rotating, "D", "value of D")
    for dry_run in (True, False):
        report = await rotation.rotate(rotating, dry_run=dry_run)
        assert (report.to_change, report.current) == (3, 1)
        assert report.dry_run == dry_run


async def test_rows_with_odd_ids_are_rotated_too(
    rotating: Datasette, internal: str
) -> None:
    alter(
        internal,
        "update datasette_secrets set id = -9223372036854775808 where name = 'A'",
        "update datasette_secrets set id = 9223372036854775807 where name = 'B'",
        "update datasette_secrets set id = 1000 where name = 'C'",
    )
    assert (await rotation.verify(rotating, batch_size=1)).opened == 3
    report = await rotation.rotate(rotating, batch_size=1)
    assert (report.complete, report.changed) == (True, 3)


@pytest.mark.parametrize("new_data_keys", [False, True])
async def test_a_row_of_0x_that_names_the_primary_key_stops_a_rotation_and_is_named(
    rotating: Datasette, internal: str, master_key: str, new_data_keys: bool
) -> None:
    put_tokens(internal, master_key, "D")
    primary = get_instance(rotating).settings.require_ring().primary.id
    alter(
        internal,
        f"update datasette_secrets set encryption_key_name = '{primary}' where name = 'D'",
    )
    report = await rotation.rotate(rotating, new_data_keys=new_data_keys)
    assert (report.changed, report.complete) == (0, False)
    assert [problem.code for problem in report.problems] == ["needs-upgrade"]


@pytest.mark.parametrize("column", ["wrapped_key", "encrypted"])
async def test_new_data_keys_are_refused_where_one_value_does_not_open(
    rotating: Datasette, internal: str, column: str
) -> None:
    alter(internal, f"update datasette_secrets set {column} = x'00' where name > 'A'")
    report = await rotation.rotate(rotating, new_data_keys=True, batch_size=1)
    assert (report.to_change, report.changed, report.complete) == (3, 0, False)
    assert [problem.name for problem in report.problems] == ["B", "C"]
    assert await get_secret(rotating, "A") == "value of A"


def after_step(number: int, *statements: str, path: str) -> Callable[[int], None]:
    """A `progress` that changes the database once that many steps were reported."""
    steps: list[int] = []

    def progress(count: int) -> None:
        steps.append(count)
        if len(steps) == number:
            alter(path, *statements)

    return progress


def late_row(key: str) -> str:
    """SQL by which a server that has this key first stores LATE, before all other rows."""
    master_key = envelope.MasterKey.parse(key)
    plaintext = envelope.Plaintext.parse("value of LATE")
    sealed = plaintext.seal(master_key, "LATE", 1)
    assert sealed.wrapped_key is not None
    assert sealed.encrypted is not None
    return (
        "insert into datasette_secrets (id, name, version, envelope_version, "
        "encryption_key_name, wrapped_key, encrypted) values (-1, 'LATE', 1, 1, "
        f"'{sealed.key_id}', x'{sealed.wrapped_key.hex()}', x'{sealed.encrypted.hex()}')"
    )


DESTROY_B = (
    "update datasette_secrets set wrapped_key = null, encrypted = null where name = 'B'"
)


async def test_a_row_that_did_not_open_and_was_destroyed_meanwhile_is_no_problem(
    rotating: Datasette, internal: str, master_key: str
) -> None:
    alter(internal, "update datasette_secrets set wrapped_key = x'00' where name = 'B'")
    report = await rotation.rotate(
        rotating,
        skip_unopenable=True,
        progress=after_step(1, DESTROY_B, late_row(master_key), path=internal),
    )
    assert (report.changed, report.problems, report.complete) == (3, [], True)
    assert await get_secret(rotating, "LATE") == "value of LATE"


async def test_what_could_not_be_sealed_afresh_is_not_forgotten_in_another_pass(
    rotating: Datasette, internal: str, master_key: str
) -> None:
    await rotation.rotate(rotating)
    alter(internal, "update datasette_secrets set encrypted = x'00' where name = 'B'")
    report = await rotation.rotate(
        rotating,
        new_data_keys=True,
        skip_unopenable=True,
        progress=after_step(2, late_row(master_key), path=internal),
    )
    assert [problem.name for problem in report.problems] == ["B"]
    assert (report.changed, report.current, report.complete) == (3, 0, False)


async def test_what_turns_up_after_the_rows_were_changed_does_not_say_nothing_was(
    rotating: Datasette, internal: str, capsys: pytest.CaptureFixture[str]
) -> None:
    planted = (
        "insert into datasette_secrets "
        "(id, name, version, encrypted, encryption_key_name) "
        "values (-1, 'L', 1, x'41', 'default')"
    )
    report = await rotation.rotate(
        rotating, progress=after_step(1, planted, path=internal)
    )
    assert ([each.name for each in report.problems], report.complete) == (["L"], False)
    output.print_rotation(get_instance(rotating), report)
    assert "Re-wrapped 3 versions" in capsys.readouterr().out


@pytest.mark.parametrize(
    "message", ["no such table", "no such column", "database is locked"]
)
@pytest.mark.parametrize("column", ["name", "encryption_key_name", "wrapped_key"])
async def test_text_that_does_not_decode_hides_no_row_whatever_it_says(
    rotating: Datasette, internal: str, message: str, column: str
) -> None:
    """The error that SQLite's module raises for such text quotes it."""
    alter(
        internal,
        f"update datasette_secrets set {column} = cast(x'ff' || '{message}' as text) "
        "where name = 'B'",
    )
    found = await rotation.verify(rotating)
    assert (found.opened, len(found.problems)) == (2, 1)
    report = await rotation.rotate(rotating, skip_unopenable=True)
    assert (report.changed, len(report.problems), report.complete) == (2, 1, False)


async def test_a_rotation_is_announced_with_its_key_number_and_actor(
    rotating: Datasette,
) -> None:
    seen: list[Event] = []

    class Listening:
        @hookimpl
        def track_event(self, event: Event) -> None:
            seen.append(event)

    listening = Listening()
    pm.register(listening)
    try:
        await rotating.invoke_startup()
        report = await rotation.rotate(rotating, actor_id="ann")
    finally:
        pm.unregister(listening)
    [event] = [each for each in seen if each.name == "rotate-encryption-key"]
    assert event.actor == {"id": "ann"}
    assert event.properties() == {"key_id": report.primary, "versions": 3}


async def test_a_rotation_of_a_named_database_says_by_default_what_may_remain(
    make_datasette: MakeDatasette, master_key: str, tmp_path: str
) -> None:
    path = f"{tmp_path}/named.db"
    alter(path, "create table t (a)")
    datasette = make_datasette(master_key, database="named", files=[path])
    await set_secret(datasette, "A", "value of A")
    report = await rotation.rotate(datasette)
    assert report.clean_up is not None
    assert report.clean_up.remains
