"""Every page of Datasette and of the real plugins, whatever is wrong with the store.

Datasette's own pages never fail because another plugin cannot read its secret. The pages
of other plugins that read it themselves may: .github/COMPATIBILITY.md lists them.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from datasette.app import Datasette
from support import zero
from support.console import Console
from support.servers import Server

from datasette_secrets import envelope

NAME = "OPENAI_API_KEY"
VALUE = f"{NAME} value 1"
COOKIE_SECRET = "signs the cookie of root"

OF_DATASETTE = [
    path
    for page in ("/", "/data", "/data/t", "/data/t/1")
    for path in (page, f"{page}.json")
]
OF_PLUGINS = ["/-/enrich/data/t", "/-/agent", "/-/secrets"]
#: These read the secret for every visitor who may see them.
READING = ["/-/enrich/data/t/gpt", "/data/-/extract", "/data/t/-/extract"]


def fill(console: Console) -> None:
    asyncio.run(console.fill(NAME))


def fill_as_0_x_did(console: Console) -> None:
    zero.write(str(console.internal), [(NAME, 1, zero.token(console.key, VALUE))])


def without_a_master_key(console: Console) -> None:
    fill(console)
    console.configure()


def with_another_master_key(console: Console) -> None:
    fill(console)
    console.configure(envelope.generate_master_key())


def of_0_x_without_a_master_key(console: Console) -> None:
    fill_as_0_x_did(console)
    console.configure()


def of_0_x_with_another_master_key(console: Console) -> None:
    fill_as_0_x_did(console)
    console.configure(envelope.generate_master_key())


def of_0_x_without_cryptography(console: Console) -> None:
    fill_as_0_x_did(console)
    plugins = console.folder / "plugins"
    plugins.mkdir()
    # To the server it is as if the package were not installed.
    plugins.joinpath("no_cryptography.py").write_text(
        "import sys\nsys.modules['cryptography'] = None\n"
    )


def with_a_damaged_row(console: Console) -> None:
    fill(console)
    console.sql("update datasette_secrets set encrypted = zeroblob(length(encrypted))")


STATES = [
    fill,
    without_a_master_key,
    with_another_master_key,
    of_0_x_without_a_master_key,
    of_0_x_with_another_master_key,
    of_0_x_without_cryptography,
    with_a_damaged_row,
]


def status(state: Callable[[Console], None], path: str, who: str) -> int:
    """The status that COMPATIBILITY.md promises."""
    if path in OF_DATASETTE:
        return 200
    if who == "anonymous":
        return 403
    return 500 if path in READING and state is not fill else 200


@pytest.mark.dependents
@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
def test_a_page_fails_only_if_its_plugin_reads_the_secret_itself(
    console: Console,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    state: Callable[[Console], None],
) -> None:
    data = tmp_path / "data.db"
    with closing(sqlite3.connect(data)) as conn, conn:
        conn.execute("create table t (id integer primary key, name text)")
        conn.execute("insert into t values (1, 'one')")
    for variable in ("OPENAI_API_KEY", "LLM_OPENAI_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path / "llm"))
    monkeypatch.setenv("DATASETTE_SECRET", COOKIE_SECRET)
    state(console)
    console.options += [str(data), "--root"]
    client = Datasette(secret=COOKIE_SECRET).client
    cookies = {
        "root": f"ds_actor={client.actor_cookie({'id': 'root'})}",
        "anonymous": "",
    }

    with Server(console) as server:
        found = {
            (path, who): server.get(path, cookie)[0]
            for path in OF_DATASETTE + OF_PLUGINS + READING
            for who, cookie in cookies.items()
        }
        is_offered = "/data/t/-/extract" in server.get("/data/t", cookies["root"])[1]
    assert is_offered == (state is fill)
    expected = {(path, who): status(state, path, who) for path, who in found}
    assert found == expected

    log = "".join(server.log)
    left_out = [line for line in server.log if "the links of" in line]
    assert len(left_out) == (state is not fill)
    assert all(
        "the links of datasette_extract are left out" in line for line in left_out
    )
    assert VALUE not in log
    assert console.key not in log
