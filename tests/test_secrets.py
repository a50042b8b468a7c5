"""The public API: get, set, delete, restore, roll back, destroy."""

from __future__ import annotations

import base64
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from conftest import MakeDatasette
from datasette import hookimpl
from datasette.app import Datasette
from datasette.plugins import pm
from support.visitor import plugin

from datasette_secrets import (
    CannotOpen,
    DatabaseUnavailable,
    InvalidSecret,
    NeedsUpgrade,
    NotConfigured,
    Secret,
    UnknownMasterKey,
    VersionConflict,
    delete_secret,
    envelope,
    get_secret,
    get_secrets,
    listing,
    restore_secret,
    rotation,
    schema,
    service,
    set_secret,
    store,
)
from datasette_secrets.instance import get_instance

NAME = "OPENAI_API_KEY"


def alter(path: str, sql: str, *parameters: Any) -> None:
    """Change the file as somebody with write access would."""
    conn = sqlite3.connect(path)
    with conn:
        conn.execute(sql, parameters)
    conn.close()


def column(path: str, name: str) -> list[Any]:
    conn = sqlite3.connect(path)
    rows = conn.execute(
        f"select {name} from datasette_secrets order by version"
    ).fetchall()
    conn.close()
    return [row[0] for row in rows]


async def test_what_is_set_is_what_is_got(datasette: Datasette) -> None:
    for version, value in enumerate(("a", "b\nc\r\nd", "ключ 🔑", "x" * 65_536), 1):
        assert await set_secret(datasette, NAME, value) == version
        assert (await get_secret(datasette, NAME) == value) is True


async def test_nothing_stored_is_none(datasette: Datasette) -> None:
    assert await get_secret(datasette, NAME) is None


async def test_it_works_before_startup(
    make_datasette: MakeDatasette, master_key: str
) -> None:
    datasette = make_datasette(master_key)
    assert await get_secret(datasette, NAME) is None
    await set_secret(datasette, NAME, "early")
    assert await get_secret(datasette, NAME) == "early"


async def test_a_nonempty_environment_variable_wins(
    datasette: Datasette, monkeypatch: pytest.MonkeyPatch
) -> None:
    await set_secret(datasette, NAME, "stored")
    monkeypatch.setenv(f"DATASETTE_SECRETS_{NAME}", "")
    assert await get_secret(datasette, NAME) == "stored"
    monkeypatch.setenv(f"DATASETTE_SECRETS_{NAME}", "from the environment")
    assert await get_secret(datasette, NAME) == "from the environment"


async def test_the_environment_is_read_without_a_key(
    make_datasette: MakeDatasette, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"DATASETTE_SECRETS_{NAME}", "from the environment")
    assert await get_secret(make_datasette(), NAME) == "from the environment"


async def test_a_master_key_is_never_handed_out(
    make_datasette: MakeDatasette, master_key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "ENCRYPTION_KEY": master_key,
        "OLD_ENCRYPTION_KEY": "anything",
        "YEAR": master_key,
        "COPY": f"old,{master_key.replace('-', '+').replace('_', '/')}",
        "MIXED": master_key.replace("-", "+"),
        "HEX": base64.urlsafe_b64decode(master_key).hex().upper(),
    }.items():
        monkeypatch.setenv(f"DATASETTE_SECRETS_{name}", value)
    datasette = make_datasette({"$env": "DATASETTE_SECRETS_YEAR"})
    for name in (
        "ENCRYPTION_KEY",
        "OLD_ENCRYPTION_KEY",
        "YEAR",
        "COPY",
        "MIXED",
        "HEX",
    ):
        assert (await get_secret(datasette, name) is None) is True
        assert name not in {each.name for each in await listing.list_secrets(datasette)}
    for name in ("ENCRYPTION_KEY", "encryption_key", "YEAR"):
        with pytest.raises(InvalidSecret, match="reserved"):
            await set_secret(datasette, name, "a value")


async def test_a_deleted_secret_is_none_until_it_is_restored(
    datasette: Datasette,
) -> None:
    await set_secret(datasette, NAME, "first")
    await set_secret(datasette, NAME, "second")
    assert await delete_secret(datasette, NAME, actor_id="ann") == 2
    assert await get_secret(datasette, NAME) is None
    assert await restore_secret(datasette, NAME) == 2
    assert await get_secret(datasette, NAME) == "second"


async def test_a_new_value_of_a_deleted_secret_is_not_deleted(
    datasette: Datasette,
) -> None:
    await set_secret(datasette, NAME, "first")
    await delete_secret(datasette, NAME)
    assert await set_secret(datasette, NAME, "second") == 2
    assert await get_secret(datasette, NAME) == "second"


async def test_a_master_key_is_no_secret_to_store(
    make_datasette: MakeDatasette,
) -> None:
    keys = [envelope.generate_master_key() for _ in range(2)]
    datasette = make_datasette(*keys)
    for key in keys:
        for value in (key, f"KEY={key}\n", base64.urlsafe_b64decode(key).hex()):
            with pytest.raises(InvalidSecret, match="contains a master key"):
                await set_secret(datasette, NAME, value)
            plaintext = envelope.Plaintext.parse(value)
            with pytest.raises(InvalidSecret, match="contains a master key"):
                await service.set_secrets(datasette, {NAME: plaintext})
    assert await get_secret(datasette, NAME) is None


async def test_a_master_key_is_no_name_either(make_datasette: MakeDatasette) -> None:
    key = base64.urlsafe_b64encode(b"\0" * 32).decode()
    datasette = make_datasette(key)
    for value, said in (
        ("a value", "name contains a master key"),
        ("", "value cannot be stored"),
    ):
        with pytest.raises(InvalidSecret, match=said) as caught:
            await set_secret(datasette, key.rstrip("="), value)
        assert (key.rstrip("=") in str(caught.value)) is False


async def test_the_name_of_an_environment_variable_is_no_name_for_a_secret(
    datasette: Datasette,
) -> None:
    with pytest.raises(InvalidSecret, match="own name is FOO"):
        await set_secret(datasette, "DATASETTE_SECRETS_FOO", "a value")
    with pytest.raises(InvalidSecret, match="ENCRYPTION_KEY is reserved"):
        await set_secret(datasette, "DATASETTE_SECRETS_ENCRYPTION_KEY", "a value")


async def test_an_expected_version_is_a_number(datasette: Datasette) -> None:
    await set_secret(datasette, NAME, "a value")
    with pytest.raises(InvalidSecret, match="expected_version is a number"):
        await set_secret(datasette, NAME, "another", expected_version="1")  # type: ignore[arg-type]


async def test_rolling_back_seals_the_old_value_as_a_new_version(
    datasette: Datasette,
) -> None:
    await set_secret(datasette, NAME, "first")
    await set_secret(datasette, NAME, "second")
    assert await service.roll_back(datasette, NAME, 1) == 3
    assert await get_secret(datasette, NAME) == "first"


async def test_a_destroyed_newest_version_is_none_and_never_an_older_one(
    datasette: Datasette,
) -> None:
    await set_secret(datasette, NAME, "first")
    await set_secret(datasette, NAME, "second")
    destroyed, _ = await service.destroy_versions(datasette, NAME, [2])
    assert destroyed == 1
    assert await get_secret(datasette, NAME) is None
    with pytest.raises(InvalidSecret, match="destroyed"):
        await service.roll_back(datasette, NAME, 2)
    with pytest.raises(InvalidSecret, match="destroyed"):
        await restore_secret(datasette, NAME)
    assert await service.roll_back(datasette, NAME, 1) == 3
    assert await get_secret(datasette, NAME) == "first"


async def test_destroying_a_version_that_is_not_there_destroys_nothing(
    datasette: Datasette,
) -> None:
    await set_secret(datasette, NAME, "first")
    with pytest.raises(InvalidSecret, match="no version 9"):
        await service.destroy_versions(datasette, NAME, [1, 9])
    assert await get_secret(datasette, NAME) == "first"


@pytest.mark.parametrize("change", [delete_secret, restore_secret])
async def test_changing_what_is_not_stored_is_refused(
    datasette: Datasette, change: Any
) -> None:
    with pytest.raises(InvalidSecret, match="Nothing is stored"):
        await change(datasette, NAME)


@pytest.mark.parametrize(
    "value", ["", "a\0b", "x" * 65_537, "é" * 32_769, "\ud800", b"bytes", None, 3]
)
async def test_a_value_that_cannot_be_stored_is_refused(
    datasette: Datasette, value: Any
) -> None:
    with pytest.raises(InvalidSecret, match=NAME):
        await set_secret(datasette, NAME, value)
    assert await get_secret(datasette, NAME) is None


@pytest.mark.parametrize(
    "name", ["", "1A", "A B", "A-B", "Ä", "A/B", "A" * 129, "A\n", None, 3]
)
async def test_a_malformed_name_is_refused(datasette: Datasette, name: Any) -> None:
    with pytest.raises(InvalidSecret, match="name"):
        await set_secret(datasette, name, "a value")


@pytest.mark.parametrize("note", ["x" * 101, "a\0b", "\ud800", 3])
async def test_a_malformed_note_is_refused(datasette: Datasette, note: Any) -> None:
    with pytest.raises(InvalidSecret, match="note"):
        await set_secret(datasette, NAME, "a value", note=note)


async def test_a_note_stays_until_it_is_changed(
    datasette: Datasette, internal: str
) -> None:
    await set_secret(datasette, NAME, "a", note="from the vendor")
    await set_secret(datasette, NAME, "b")
    await set_secret(datasette, NAME, "c", note="")
    assert column(internal, "note") == ["from the vendor", "from the vendor", ""]


async def test_a_stale_expected_version_is_refused_with_who_and_when(
    datasette: Datasette,
) -> None:
    await set_secret(datasette, NAME, "first", expected_version=0)
    await set_secret(datasette, NAME, "second", actor_id="ann", expected_version=1)
    for change in (
        lambda: set_secret(datasette, NAME, "third", expected_version=1),
        lambda: delete_secret(datasette, NAME, expected_version=1),
        lambda: restore_secret(datasette, NAME, expected_version=1),
        lambda: service.roll_back(datasette, NAME, 1, expected_version=1),
        lambda: service.set_details(
            datasette, NAME, {"note": "new"}, expected_version=1
        ),
    ):
        with pytest.raises(VersionConflict, match="ann") as caught:
            await change()
        assert (caught.value.expected, caught.value.actual) == (1, 2)
        assert caught.value.updated_at
    assert await get_secret(datasette, NAME) == "second"


async def test_not_configured_raises_while_a_version_is_stored(
    datasette: Datasette, make_datasette: MakeDatasette
) -> None:
    await set_secret(datasette, NAME, "a value")
    without_key = make_datasette()
    with pytest.raises(NotConfigured):
        await get_secret(without_key, NAME)
    assert await get_secret(without_key, "ANOTHER") is None
    with pytest.raises(NotConfigured):
        await set_secret(without_key, NAME, "a value")
    await delete_secret(datasette, NAME)
    assert await get_secret(without_key, NAME) is None


async def test_a_missing_key_is_named_by_its_id(
    datasette: Datasette, make_datasette: MakeDatasette, master_key: str
) -> None:
    await set_secret(datasette, NAME, "a value")
    other = make_datasette(envelope.generate_master_key())
    with pytest.raises(UnknownMasterKey) as caught:
        await get_secret(other, NAME)
    assert caught.value.key_id == envelope.MasterKey.parse(master_key).id
    assert (caught.value.name, caught.value.version) == (NAME, 1)


@pytest.mark.parametrize(
    "damage",
    [
        "encrypted = null",
        "wrapped_key = null",
        "encrypted = 'text'",
        "wrapped_key = 7",
        "envelope_version = 2",
        "envelope_version = null",
        "encryption_key_name = 'default'",
        "encryption_key_name = x'00'",
        "encryption_key_name = cast(x'ff' as text)",
    ],
)
async def test_a_damaged_row_raises_and_is_mended_by_a_new_value(
    datasette: Datasette, internal: str, damage: str
) -> None:
    await set_secret(datasette, NAME, "a value")
    alter(internal, f"update datasette_secrets set {damage}")
    with pytest.raises(CannotOpen):
        await get_secret(datasette, NAME)
    await set_secret(datasette, NAME, "a new value")
    assert await get_secret(datasette, NAME) == "a new value"
    assert len(column(internal, "id")) == 2


@pytest.mark.parametrize(
    "version",
    ["'three'", "x'03'", "-1", "1.5", str(schema.VERSION_MAX), str(2**63 - 1)],
)
async def test_a_row_without_a_usable_version_is_removed_before_a_new_value(
    datasette: Datasette, internal: str, version: str
) -> None:
    await set_secret(datasette, NAME, "a value")
    alter(internal, f"update datasette_secrets set version = {version}")
    with pytest.raises(CannotOpen):
        await get_secret(datasette, NAME)
    with pytest.raises(DatabaseUnavailable, match="datasette secrets verify"):
        await set_secret(datasette, NAME, "a new value")
    [problem] = (await rotation.verify(datasette)).problems
    assert problem.remedy.startswith("datasette secrets destroy")
    await service.destroy_row(datasette, 1)
    await set_secret(datasette, NAME, "a new value")
    assert await get_secret(datasette, NAME) == "a new value"


async def test_a_row_of_0x_never_opens(datasette: Datasette, internal: str) -> None:
    alter(
        internal,
        "insert into datasette_secrets (name, version, encrypted, encryption_key_name)"
        " values (?, 1, ?, 'default')",
        NAME,
        b"gAAAAA",
    )
    with pytest.raises(NeedsUpgrade, match="datasette secrets upgrade"):
        await get_secret(datasette, NAME)
    with pytest.raises(NeedsUpgrade):
        await service.roll_back(datasette, NAME, 1)


async def test_the_next_read_sees_what_another_process_changed(
    datasette: Datasette, make_datasette: MakeDatasette, master_key: str, internal: str
) -> None:
    await set_secret(datasette, NAME, "first")
    assert await get_secret(datasette, NAME) == "first"
    await set_secret(make_datasette(master_key), NAME, "second")
    assert await get_secret(datasette, NAME) == "second"
    alter(internal, "delete from datasette_secrets")
    assert await get_secret(datasette, NAME) is None


async def test_a_closed_datasette_does_not_answer(
    make_datasette: MakeDatasette, master_key: str
) -> None:
    datasette = make_datasette(master_key)
    await set_secret(datasette, NAME, "a value")
    assert await get_secret(datasette, NAME) == "a value"
    datasette.close()
    with pytest.raises(RuntimeError, match="closed"):
        await get_secret(datasette, NAME)


@pytest.mark.parametrize("threads", [0, 1])
@pytest.mark.parametrize("internal_path", [None, "file"])
async def test_every_kind_of_internal_database_and_of_threading(
    make_datasette: MakeDatasette,
    master_key: str,
    internal: str,
    internal_path: str | None,
    threads: int,
) -> None:
    datasette = make_datasette(
        master_key,
        internal=internal_path and internal,
        settings={"num_sql_threads": threads},
    )
    await datasette.invoke_startup()
    await set_secret(datasette, NAME, "a value")
    assert await get_secret(datasette, NAME, "ann") == "a value"
    [version] = await store.history(get_instance(datasette).db, NAME)
    assert version.last_used_by == "ann"


async def test_shared_memory_works_as_a_named_database(
    make_datasette: MakeDatasette, master_key: str
) -> None:
    datasette = make_datasette(master_key, database="shared")
    datasette.add_memory_database("shared_secrets", name="shared")
    await datasette.invoke_startup()
    await set_secret(datasette, NAME, "a value")
    assert await get_secret(datasette, NAME) == "a value"


async def test_an_immutable_database_is_read_and_not_changed(
    make_datasette: MakeDatasette, master_key: str, tmp_path: Any
) -> None:
    path = str(tmp_path / "named.db")
    sqlite3.connect(path).execute("vacuum").connection.close()
    writable = make_datasette(master_key, database="named", files=[path])
    await writable.invoke_startup()
    await set_secret(writable, NAME, "a value")
    writable.close()
    datasette = make_datasette(master_key, database="named", immutables=[path])
    await datasette.invoke_startup()
    assert await get_secret(datasette, NAME, "ann") == "a value"
    with pytest.raises(DatabaseUnavailable, match="immutable"):
        await set_secret(datasette, NAME, "another")


@contextmanager
def listening() -> Iterator[list[Any]]:
    """The events that Datasette tells plugins of."""
    events: list[Any] = []

    class Listener:
        @hookimpl
        def track_event(self, event: Any) -> None:
            events.append(event)

    listener = Listener()
    pm.register(listener)
    try:
        yield events
    finally:
        pm.unregister(listener)


def failing(event: Any) -> None:
    raise ZeroDivisionError(event.name)


async def test_a_plugin_that_fails_on_one_event_does_not_stop_the_next(
    datasette: Datasette,
) -> None:
    values = {name: envelope.Plaintext.parse("a value") for name in ("A", "B")}
    with (
        plugin(track_event=failing),
        listening() as events,  # it is called first
        pytest.raises(ZeroDivisionError),
    ):
        await service.set_secrets(datasette, values)
    assert [event.secret for event in events] == ["A", "B"]
    assert await get_secret(datasette, "B") == "a value"


async def test_a_plugin_that_fails_on_events_stops_no_clean_up(
    datasette: Datasette, internal: str
) -> None:
    alter(internal, "pragma journal_mode = wal")
    await set_secret(datasette, NAME, "a value")
    [old] = column(internal, "encrypted")
    with plugin(track_event=failing), pytest.raises(ZeroDivisionError):
        await service.destroy_versions(datasette, NAME, [1])
    assert column(internal, "encrypted") == [None]
    for suffix in ("", "-wal"):
        with open(internal + suffix, "rb") as file:
            assert old not in file.read()


async def test_a_clean_up_that_fails_is_said_and_hides_no_event(
    datasette: Datasette, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(_: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    await set_secret(datasette, NAME, "a value")
    db = get_instance(datasette).db
    monkeypatch.setattr(db, "execute_isolated_fn", fail)
    with listening() as events:
        destroyed, done = await service.destroy_versions(datasette, NAME, [1])
    assert (destroyed, done.failed) == (1, True)
    assert "could not be cleaned up" in str(done.remains)
    assert [event.name for event in events] == ["destroy-secret"]


async def test_changes_are_announced_without_values(datasette: Datasette) -> None:
    with listening() as events:
        await set_secret(datasette, NAME, "sentinel-value", actor_id="ann")
        await delete_secret(datasette, NAME)
        await delete_secret(datasette, NAME)
        await restore_secret(datasette, NAME)
        await service.destroy_versions(datasette, NAME, [1])
    assert [event.name for event in events] == [
        "set-secret",
        "delete-secret",
        "restore-secret",
        "destroy-secret",
    ]
    assert events[0].actor == {"id": "ann"}
    assert events[0].properties() == {"secret": NAME, "version": 1}
    assert "sentinel" not in repr(events)


async def test_a_change_that_was_rolled_back_is_not_announced(
    datasette: Datasette, internal: str
) -> None:
    await set_secret(datasette, NAME, "first")
    with listening() as events:
        reader = sqlite3.connect(internal, isolation_level=None)
        reader.execute("begin")
        reader.execute("select * from datasette_secrets").fetchall()
        # Outside of WAL mode, a reader lets a writer begin and keeps it from committing.
        with pytest.raises(DatabaseUnavailable):
            await set_secret(datasette, NAME, "second")
        reader.close()
    assert events == []
    assert await get_secret(datasette, NAME) == "first"


async def test_the_first_to_register_a_name_wins_and_every_kind_of_hook_counts(
    datasette: Datasette,
) -> None:
    class First:
        @hookimpl(tryfirst=True)
        def register_secrets(self, datasette: Any) -> Any:
            async def later() -> list[Secret]:
                return [Secret("A", "the first"), Secret("B")]

            return later

    class Second:
        @hookimpl
        def register_secrets(self) -> list[Secret]:
            return [Secret("A", "the second"), Secret("C")]

    class Third:
        @hookimpl(trylast=True)
        async def register_secrets(self, datasette: Any) -> list[Secret]:
            return [Secret("D")]

    plugins = [First(), Second(), Third()]
    for each in plugins:
        pm.register(each)
    try:
        secrets = {each.name: each for each in await get_secrets(datasette)}
    finally:
        for each in plugins:
            pm.unregister(each)
    assert {"A", "B", "C", "D"} <= secrets.keys()
    assert secrets["A"].description == "the first"
    assert [each.name for each in await get_secrets(datasette)] == ["EXAMPLE_SECRET"]


async def test_what_is_no_secret_is_left_out_and_said(
    datasette: Datasette, capsys: pytest.CaptureFixture[str]
) -> None:
    class Careless:
        @hookimpl
        def register_secrets(self) -> list[Any]:
            return ["A_NAME", Secret(None), Secret("GOOD")]  # type: ignore[arg-type]

    plugin = Careless()
    pm.register(plugin)
    try:
        for _ in range(2):
            assert [each.name for each in await get_secrets(datasette)] == ["GOOD"]
    finally:
        pm.unregister(plugin)
    assert capsys.readouterr().err.count("of type str") == 1


async def test_a_registered_name_may_be_any_text(datasette: Datasette) -> None:
    class Odd:
        @hookimpl
        def register_secrets(self) -> list[Secret]:
            return [Secret("the näme / of%it")]

    plugin = Odd()
    pm.register(plugin)
    try:
        await set_secret(datasette, "the näme / of%it", "a value")
        assert await get_secret(datasette, "the näme / of%it") == "a value"
    finally:
        pm.unregister(plugin)
