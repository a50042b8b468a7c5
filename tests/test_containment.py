"""A secret that cannot be read costs a plugin its links, and nobody a page."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeDatasette
from datasette import hookimpl
from datasette.app import Datasette
from datasette.plugins import pm

from datasette_secrets import envelope, get_secret, set_secret

HOOKS = {
    "homepage_actions": "/",
    "database_actions": "/data",
    "table_actions": "/data/t",
    "view_actions": "/data/v",
    "query_actions": "/data/-/query?sql=select+1",
    "row_actions": "/data/t/1",
    "menu_links": "/",
}
GOOD = [{"href": "/good", "label": "A link of another plugin"}]
BAD = [{"href": "/bad", "label": "A link that needs the secret"}]


def asynchronous(datasette: Datasette) -> Any:
    async def links() -> Any:
        await get_secret(datasette, "A")
        return BAD

    return links


def coroutine(datasette: Datasette) -> Any:
    return asynchronous(datasette)()


def called(datasette: Datasette) -> Any:
    return lambda: coroutine(datasette)


KINDS = {"async function": asynchronous, "coroutine": coroutine, "callable": called}


@contextmanager
def plugin(hook: str, implementation: Any) -> Iterator[None]:
    def links(datasette: Datasette) -> Any:
        return implementation(datasette)

    class Plugin:
        def __init__(self) -> None:
            self.links = hookimpl(specname=hook)(links)

    registered = Plugin()
    pm.register(registered)
    try:
        yield
    finally:
        pm.unregister(registered)


@pytest.fixture
def served(make_datasette: MakeDatasette, tmp_path: Path, master_key: str) -> Datasette:
    """A Datasette with a table and a view, and the master key first."""
    data = str(tmp_path / "data.db")
    conn = sqlite3.connect(data)
    with conn:
        conn.execute("create table t (id integer primary key)")
        conn.execute("insert into t values (1)")
        conn.execute("create view v as select * from t")
    conn.close()
    return make_datasette(master_key, files=[data])


@pytest.fixture
async def broken(
    served: Datasette, make_datasette: MakeDatasette, tmp_path: Path
) -> Datasette:
    """The same on the same files, with another master key."""
    await set_secret(served, "A", "a value")
    return make_datasette(
        envelope.generate_master_key(), files=[str(tmp_path / "data.db")]
    )


async def look(datasette: Datasette, path: str, *, as_root: bool) -> Any:
    cookies = (
        {"ds_actor": datasette.client.actor_cookie({"id": "root"})} if as_root else {}
    )
    return await datasette.client.get(path, cookies=cookies)


@pytest.mark.parametrize("hook", HOOKS)
async def test_a_plugin_that_cannot_read_its_secret_loses_only_its_links(
    broken: Datasette, hook: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for implementation in KINDS.values():
        with plugin(hook, lambda _: GOOD), plugin(hook, implementation):
            for as_root in (True, False):
                answer = await look(broken, HOOKS[hook], as_root=as_root)
                assert answer.status_code == 200
                assert "A link of another plugin" in answer.text
                assert "A link that needs the secret" not in answer.text
    said = [line for line in capsys.readouterr().err.splitlines() if "links" in line]
    assert len(said) == 1
    assert f"the links of {__name__} are left out: A version 1" in said[0]


async def test_each_secret_of_a_plugin_is_named_once(
    served: Datasette, broken: Datasette, capsys: pytest.CaptureFixture[str]
) -> None:
    def asking(name: str) -> Any:
        async def links(datasette: Datasette) -> Any:
            await get_secret(datasette, name)

        return links

    await set_secret(served, "B", "another value")
    with plugin("table_actions", asking("A")), plugin("row_actions", asking("B")):
        for path in ("/data/t", "/data/t/1") * 2:
            assert (await look(broken, path, as_root=True)).status_code == 200
    said = [line for line in capsys.readouterr().err.splitlines() if "links" in line]
    assert [line.split(" are left out: ")[1][0] for line in said] == ["A", "B"]


async def test_a_plugin_that_can_read_its_secret_keeps_its_links(
    served: Datasette,
) -> None:
    await set_secret(served, "A", "a value")
    for hook, path in HOOKS.items():
        for implementation in KINDS.values():
            with plugin(hook, implementation):
                answer = await look(served, path, as_root=True)
            assert "A link that needs the secret" in answer.text


async def test_an_error_raised_at_once_costs_the_links_of_the_hook(
    broken: Datasette,
) -> None:
    from datasette_secrets.errors import CannotOpen

    def fails(_: Datasette) -> Any:
        raise CannotOpen("A", 1)

    with plugin("table_actions", fails):
        assert (await look(broken, "/data/t", as_root=True)).status_code == 200


async def test_any_other_error_passes(served: Datasette) -> None:
    def fails(_: Datasette) -> Any:
        async def links() -> Any:
            raise ZeroDivisionError

        return links

    with plugin("table_actions", fails):
        assert (await look(served, "/data/t", as_root=True)).status_code == 500
