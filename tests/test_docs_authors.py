"""The page for plugin authors: its plugin, its tests and its OAuth token, run as they stand."""

from __future__ import annotations

import asyncio
import importlib
import json
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx2
import pytest
import tomli
from conftest import MakeDatasette
from datasette.app import Datasette
from datasette.plugins import pm
from packaging.requirements import Requirement
from support.documents import blocks, read, section

import datasette_secrets
from datasette_secrets import SecretsError, errors, get_secret, secret_state, set_secret

PAGE = "plugin-authors.md"
TOKEN = "EXAMPLE_OAUTH_TOKEN"
# An installed plugin is a file with an entry point. pytest loads none of its own accord.
INSTALL = """\
import datasette_models
from datasette.plugins import pm

pm.register(datasette_models, "datasette_models")
"""


def test_the_tests_of_the_plugin_pass_as_written(tmp_path: Path) -> None:
    [plugin] = blocks(section(PAGE, "A complete plugin"), "python")
    tests = blocks(section(PAGE, "Test your plugin without a network"), "python")
    (tmp_path / "datasette_models.py").write_text(plugin)
    [project] = blocks(section(PAGE, "A complete plugin"), "toml")
    (tmp_path / "pyproject.toml").write_text(project)
    (tmp_path / "conftest.py").write_text(INSTALL)
    for number, test in enumerate(tests):
        (tmp_path / f"test_{number}.py").write_text(test)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tmp_path],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert f"{''.join(tests).count('async def test_')} passed" in done.stdout
    assert "warning" not in done.stdout + done.stderr


def test_the_project_names_all_that_its_code_imports() -> None:
    [plugin] = blocks(section(PAGE, "A complete plugin"), "python")
    [project] = map(tomli.loads, blocks(section(PAGE, "A complete plugin"), "toml"))
    imported = set(re.findall(r"(?m)^(?:import|from) (\w+)", plugin))
    required = list(map(Requirement, project["project"]["dependencies"]))
    assert {each.name.replace("-", "_") for each in required} == imported
    for each in required:
        # Prereleases are installed, because the specifier names one.
        assert each.specifier.contains(version(each.name)), each
    module = project["project"]["entry-points"]["datasette"]["models"]
    assert project["tool"]["setuptools"]["py-modules"] == [module]
    tests = blocks(section(PAGE, "Test your plugin without a network"), "python")
    tested = set(re.findall(r"(?m)^(?:import|from) (\w+)", "".join(tests)))
    standard = {"base64", "os"}
    installed = {*imported, *project["dependency-groups"]["test"], module, *standard}
    assert tested <= installed


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module of the page, registered as a plugin."""
    yield from module(tmp_path, monkeypatch, "A complete plugin", "datasette_models")


@pytest.fixture
def oauth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module that keeps a token."""
    heading = "Store a credential that your plugin obtains itself"
    yield from module(tmp_path, monkeypatch, heading, "example_oauth")


def module(
    folder: Path, monkeypatch: pytest.MonkeyPatch, heading: str, name: str
) -> Iterator[Any]:
    [code] = blocks(section(PAGE, heading), "python")
    (folder / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(folder)
    loaded = importlib.import_module(name)
    pm.register(loaded, name)
    yield loaded
    pm.unregister(name=name)
    del sys.modules[name]


async def test_the_plugin_offers_its_link_once_there_is_a_key(
    plugin: Any, make_datasette: MakeDatasette, master_key: str, tmp_path: Path
) -> None:
    path = str(tmp_path / "data.db")
    with closing(sqlite3.connect(path)) as conn:
        conn.execute("create table t (id integer)")
    datasette = make_datasette(master_key, files=[path])
    await datasette.invoke_startup()
    for is_set in (False, True):
        if is_set:
            await set_secret(datasette, plugin.NAME, "sk-good")
        page = await datasette.client.get("/data/t")
        assert page.status_code == 200
        assert ("List the models" in page.text) is is_set
    [secret] = await datasette_secrets.get_secrets(datasette)
    assert secret.looks_like
    assert re.search(secret.looks_like, "sk-good")
    assert not re.search(secret.looks_like, "Bearer sk-good")


class Provider:
    """An OAuth provider that accepts each refresh token once."""

    def __init__(self) -> None:
        self.number = 1
        self.refreshed = 0

    def token(self) -> dict[str, Any]:
        return {
            "access_token": f"access-{self.number}",
            "refresh_token": f"refresh-{self.number}",
            "expires_at": 0,
        }

    async def answer(self, request: httpx2.Request) -> httpx2.Response:
        await asyncio.sleep(0)
        if f"refresh_token=refresh-{self.number}" not in request.content.decode():
            return httpx2.Response(400, json={"error": "invalid_grant"})
        self.number += 1
        self.refreshed += 1
        new = self.token()
        return httpx2.Response(
            200,
            json={
                "access_token": new["access_token"],
                "refresh_token": new["refresh_token"],
                "expires_in": 3600,
            },
        )

    def client(self) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(
            base_url="https://auth.example.com",
            transport=httpx2.MockTransport(self.answer),
        )


@pytest.fixture
def provider(oauth: Any, monkeypatch: pytest.MonkeyPatch) -> Provider:
    provider = Provider()
    monkeypatch.setattr(oauth, "client", provider.client)
    return provider


async def test_a_token_is_refreshed_once_for_all_who_wait(
    oauth: Any, provider: Provider, datasette: Datasette
) -> None:
    assert await oauth.access_token(datasette) is None
    await set_secret(datasette, TOKEN, json.dumps(provider.token()))
    tokens = await asyncio.gather(*[oauth.access_token(datasette) for _ in range(5)])
    assert tokens == ["access-2"] * 5
    assert provider.refreshed == 1


async def test_the_token_of_the_server_that_was_first_is_kept(
    oauth: Any, provider: Provider, datasette: Datasette
) -> None:
    await set_secret(datasette, TOKEN, json.dumps(provider.token()))
    first = {
        **provider.token(),
        "access_token": "other",
        "expires_at": time.time() + 900,
    }

    async def overtaken(request: httpx2.Request) -> httpx2.Response:
        await set_secret(datasette, TOKEN, json.dumps(first))
        return await provider.answer(request)

    transport = httpx2.MockTransport(overtaken)
    oauth.client = lambda: httpx2.AsyncClient(
        base_url="https://auth.example.com", transport=transport
    )
    assert await oauth.access_token(datasette) == "other"
    # The same where the provider refuses the second use of a refresh token.
    await set_secret(
        datasette, TOKEN, json.dumps(provider.token() | {"refresh_token": "x"})
    )
    assert await oauth.access_token(datasette) == "other"
    assert json.loads(str(await get_secret(datasette, TOKEN))) == first


async def test_old_tokens_are_removed(
    oauth: Any, provider: Provider, datasette: Datasette, admin: dict[str, str]
) -> None:
    await set_secret(datasette, TOKEN, json.dumps(provider.token()))
    for _ in range(14):
        assert await oauth.access_token(datasette) == f"access-{provider.number}"
        stored = json.loads(str(await get_secret(datasette, TOKEN))) | {"expires_at": 0}
        await set_secret(datasette, TOKEN, json.dumps(stored))
    await oauth.access_token(datasette)
    page = await datasette.client.get(f"/-/secrets/{TOKEN}.json", cookies=admin)
    assert len(page.json()["versions"]) == 10


def test_every_error_is_listed_with_its_code() -> None:
    listed = dict(
        re.findall(r"(?m)^\| `(\w+)` \| `([\w-]+)` \|", section(PAGE, "Errors"))
    )
    exported = {
        name: vars(datasette_secrets)[name].code
        for name in datasette_secrets.__all__
        if issubclass(vars(errors).get(name, object), SecretsError)
    }
    del exported["SecretsError"]
    assert listed == exported


def test_every_attribute_of_a_state_is_described() -> None:
    text = section(PAGE, "Ask for the state on a page, get the secret when you use it")
    attributes = {*datasette_secrets.SecretState.__dataclass_fields__, "is_set"}
    assert set(re.findall(r"(?m)^\| `(\w+)` \|", text)) == attributes


def test_every_public_name_is_on_the_page() -> None:
    page = read(PAGE)
    for name in datasette_secrets.__all__:
        assert re.search(rf"\b{name}\b", page), name


async def test_asking_before_there_is_a_database_is_as_written(
    datasette: Datasette,
) -> None:
    state = await secret_state(datasette, TOKEN)
    assert (state.state, state.version) == ("not-set", None)
