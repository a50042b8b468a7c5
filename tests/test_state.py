"""`secret_state`: is there a key? Asked on pages, it reads no value and is no use."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from conftest import MakeDatasette
from cryptography.fernet import Fernet
from datasette import Response, hookimpl
from datasette.app import Datasette
from datasette.plugins import pm
from support import zero

from datasette_secrets import (
    DatabaseUnavailable,
    SecretState,
    delete_secret,
    envelope,
    get_secret,
    instance,
    secret_state,
    service,
    set_secret,
)

NAME = "OPENAI_API_KEY"


def alter(path: str, sql: str, *parameters: Any) -> None:
    with closing(sqlite3.connect(path)) as conn, conn:
        conn.execute(sql, parameters)


def uses(path: str) -> list[tuple[object, object]]:
    with closing(sqlite3.connect(path)) as conn:
        return conn.execute(
            "select last_used_at, last_used_by from datasette_secrets"
        ).fetchall()


async def test_nothing_is_stored(datasette: Datasette) -> None:
    state = await secret_state(datasette, NAME)
    assert state == SecretState("not-set", None, None, None)
    assert not state.is_set


async def test_before_the_first_start_there_is_no_table(
    make_datasette: MakeDatasette, master_key: str
) -> None:
    state = await secret_state(make_datasette(master_key), NAME)
    assert state.state == "not-set"


async def test_every_change_is_noticed(datasette: Datasette) -> None:
    await set_secret(datasette, NAME, "first")
    first = await secret_state(datasette, NAME)
    assert first == SecretState("stored", 1, "database", None)
    assert first.is_set
    await set_secret(datasette, NAME, "second")
    assert (await secret_state(datasette, NAME)).version == 2
    await delete_secret(datasette, NAME)
    assert await secret_state(datasette, NAME) == SecretState("deleted", 2, None, None)
    await service.destroy_versions(datasette, NAME, [2])
    destroyed = await secret_state(datasette, NAME)
    assert destroyed == SecretState("destroyed", 2, None, None)
    assert not destroyed.is_set


async def test_the_environment_comes_first(
    datasette: Datasette, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"DATASETTE_SECRETS_{NAME}", "a value")
    state = await secret_state(datasette, NAME)
    assert state == SecretState("environment", None, "environment", None)
    assert state.is_set
    await set_secret(datasette, NAME, "another")
    state = await secret_state(datasette, NAME)
    assert (state.version, state.source) == (1, "environment")


async def test_another_master_key_and_none_are_the_same_state(
    datasette: Datasette, make_datasette: MakeDatasette
) -> None:
    await set_secret(datasette, NAME, "a value")
    for keys in ([envelope.generate_master_key()], []):
        state = await secret_state(make_datasette(*keys), NAME)
        assert state == SecretState("needs-key", 1, "database", None)
        assert not state.is_set


async def test_what_0_x_stored_needs_an_upgrade(
    make_datasette: MakeDatasette, internal: str
) -> None:
    key = Fernet.generate_key().decode()
    zero.write(internal, [(NAME, 1, zero.token(key, "a value"))])
    state = await secret_state(make_datasette(key), NAME)
    assert state == SecretState("needs-upgrade", 1, "database", None)


@pytest.mark.parametrize(
    ("damage", "state"),
    [
        ("encrypted = zeroblob(296)", "stored"),
        ("encrypted = 'text'", "stored"),
        ("wrapped_key = x'00'", "stored"),
        ("encryption_key_name = 7", "needs-key"),
        ("encryption_key_name = x'ff'", "needs-key"),
        ("encryption_key_name = cast(x'ff' as text)", "needs-key"),
        ("version = 'text'", "stored"),
        ("version = x'00'", "stored"),
        ("note = cast(x'ff' as text)", "stored"),
        ("deleted_at = x'ff'", "deleted"),
        ("envelope_version = 'text'", "stored"),
    ],
)
async def test_no_damaged_row_raises(
    datasette: Datasette, internal: str, damage: str, state: str
) -> None:
    await set_secret(datasette, NAME, "a value")
    alter(internal, f"update datasette_secrets set {damage}")
    found = await secret_state(datasette, NAME)
    assert found.state == state
    assert found.version in (1, None)
    assert found.renew_by is None


async def test_a_database_that_cannot_be_read_raises(
    datasette: Datasette, internal: str
) -> None:
    await set_secret(datasette, NAME, "a value")
    with closing(sqlite3.connect(internal, isolation_level=None)) as conn:
        conn.execute("drop table datasette_secrets")
        conn.execute(
            "create view datasette_secrets as select no_such_function() as name"
        )
    with pytest.raises(DatabaseUnavailable):
        await secret_state(datasette, NAME)


async def test_a_state_is_no_value_and_no_use(
    datasette: Datasette, internal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await set_secret(datasette, NAME, "a value")

    def opened(*_: object) -> None:
        raise AssertionError("it was decrypted")

    with monkeypatch.context() as patch:
        patch.setattr(envelope, "unseal", opened)
        patch.setattr(envelope, "unwrap", opened)
        state = await secret_state(datasette, NAME)
    assert "a value" not in repr(state)
    await instance.stop(datasette)  # writes the uses that wait
    assert uses(internal) == [(None, None)]


class Summaries:
    """Offers to summarize a table if there is a key, which it reads only to do so."""

    @hookimpl
    def table_actions(self, datasette: Datasette, actor: Any) -> Any:
        async def inner() -> list[dict[str, str]]:
            state = await secret_state(datasette, NAME)
            links = [{"href": "/-/summarize", "label": "Summarize this"}]
            return links if state.is_set else []

        return inner

    @hookimpl
    def register_routes(self) -> list[Any]:
        async def summarize(datasette: Datasette, request: Any) -> Any:
            assert await get_secret(datasette, NAME, request.actor["id"])
            return Response.text("a summary")

        return [(r"^/-/summarize$", summarize)]


@pytest.fixture
def summaries() -> Iterator[None]:
    plugin = Summaries()
    pm.register(plugin)
    yield
    pm.unregister(plugin)


@pytest.mark.usefixtures("summaries")
async def test_looking_at_a_table_page_is_no_use(
    make_datasette: MakeDatasette, master_key: str, internal: str, tmp_path: Any
) -> None:
    path = str(tmp_path / "data.db")
    alter(path, "create table places (name text)")
    datasette = make_datasette(master_key, files=[path])
    await datasette.invoke_startup()
    await set_secret(datasette, NAME, "a value")
    root = {"ds_actor": datasette.client.actor_cookie({"id": "root"})}

    await datasette.client.get("/-/summarize", cookies=root)
    await instance.stop(datasette)  # writes the uses that wait
    before = uses(internal)
    assert before[0][1] == "root"
    alter(internal, "update datasette_secrets set last_used_at = '2001-01-01 00:00:00'")
    before = uses(internal)

    for cookies in (root, {}):
        page = await datasette.client.get("/data/places", cookies=cookies)
        assert page.status_code == 200
        assert "Summarize this" in page.text
    await instance.stop(datasette)  # writes the uses that wait
    assert uses(internal) == before

    await delete_secret(datasette, NAME)
    page = await datasette.client.get("/data/places", cookies=root)
    assert page.status_code == 200
    assert "Summarize this" not in page.text
