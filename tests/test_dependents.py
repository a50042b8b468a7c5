"""What the plugins that depend on this one expect of it, and those plugins themselves."""

from __future__ import annotations

import inspect
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeDatasette
from datasette import hookimpl
from datasette.app import Datasette
from datasette.plugins import pm
from support.environments import environment

import datasette_secrets
from datasette_secrets import Secret, get_config, get_secret, get_secrets

WHEEL = os.environ.get("WHEEL", "")  # set by scripts/dependents.py

# The contract, which every run of the suite proves.


def test_secret_takes_its_fields_in_the_order_of_0_x() -> None:
    secret = Secret("A", "Description", "https://example.com/", "Get one")
    assert secret == Secret(
        name="A",
        description="Description",
        obtain_url="https://example.com/",
        obtain_label="Get one",
    )
    assert Secret("A") == Secret("A", None, None, None)


def test_get_secret_takes_its_parameters_in_the_order_of_0_x() -> None:
    parameters = inspect.signature(get_secret).parameters
    assert list(parameters) == ["datasette", "secret_name", "actor_id"]
    assert parameters["actor_id"].default is None


class Sync:
    @hookimpl
    def register_secrets(self) -> Any:
        return [Secret("SYNC")]


class SyncWithDatasette:
    @hookimpl
    def register_secrets(self, datasette: Datasette) -> Any:
        assert datasette.setting("default_page_size")
        return [Secret("SYNC_WITH_DATASETTE")]


class Async:
    @hookimpl
    async def register_secrets(self) -> Any:
        return [Secret("ASYNC")]


class AsyncWithDatasette:
    @hookimpl
    async def register_secrets(self, datasette: Datasette) -> Any:
        await datasette.get_internal_database().execute("select 1")
        return [Secret("ASYNC_WITH_DATASETTE")]


class AsyncFunction:
    @hookimpl
    def register_secrets(self, datasette: Datasette) -> Any:
        async def inner() -> Any:
            return [Secret("ASYNC_FUNCTION")]

        return inner


class Nothing:
    @hookimpl
    def register_secrets(self) -> Any:
        return []


@pytest.mark.parametrize(
    "plugin",
    [Sync, SyncWithDatasette, Async, AsyncWithDatasette, AsyncFunction, Nothing],
)
async def test_every_kind_of_hook_implementation_registers(
    datasette: Datasette, plugin: Any
) -> None:
    implementation = plugin()
    pm.register(implementation)
    try:
        names = [secret.name for secret in await get_secrets(datasette)]
    finally:
        pm.unregister(implementation)
    expected = {
        Sync: "SYNC",
        SyncWithDatasette: "SYNC_WITH_DATASETTE",
        Async: "ASYNC",
        AsyncWithDatasette: "ASYNC_WITH_DATASETTE",
        AsyncFunction: "ASYNC_FUNCTION",
        Nothing: "EXAMPLE_SECRET",
    }
    assert names == [expected[plugin]]


async def test_get_config_says_where_secrets_are_and_hands_out_no_key(
    make_datasette: MakeDatasette, master_key: str, tmp_path: Path
) -> None:
    assert get_config(make_datasette()) is None
    assert get_config(make_datasette(master_key)) == {"database": "_internal"}
    named = str(tmp_path / "named.db")
    sqlite3.connect(named).close()
    datasette = make_datasette(master_key, database="named", files=[named])
    assert get_config(datasette) == {"database": "named"}


async def test_startup_can_be_called_as_0_x_s_could(
    make_datasette: MakeDatasette, master_key: str
) -> None:
    datasette = make_datasette(master_key)
    await datasette_secrets.startup(datasette)
    assert await get_secret(datasette, "A") is None


async def test_an_environment_variable_counts_unless_it_is_empty(
    datasette: Datasette, monkeypatch: pytest.MonkeyPatch
) -> None:
    await datasette_secrets.set_secret(datasette, "A", "stored")
    monkeypatch.setenv("DATASETTE_SECRETS_A", "")
    assert await get_secret(datasette, "A") == "stored"
    monkeypatch.setenv("DATASETTE_SECRETS_A", "from the environment")
    assert await get_secret(datasette, "A") == "from the environment"


async def test_the_form_takes_the_fields_of_0_x_and_redirects_to_the_list(
    datasette: Datasette, admin: dict[str, str]
) -> None:
    for _ in range(2):
        await post_form(datasette, admin, "EXAMPLE_SECRET", "a value", "a note")
    assert await get_secret(datasette, "EXAMPLE_SECRET") == "a value"


async def post_form(
    datasette: Datasette, cookies: dict[str, str], name: str, value: str, note: str = ""
) -> None:
    response = await datasette.client.post(
        f"/-/secrets/{name}", data={"secret": value, "note": note}, cookies=cookies
    )
    assert response.status_code == 302
    assert response.headers["location"] == "/-/secrets"


# The plugins themselves, which `make test-dependents` installs.


def last_used_by(path: str, name: str) -> str | None:
    conn = sqlite3.connect(path)
    used_by: str | None
    [(used_by, used_at)] = conn.execute(
        "select last_used_by, last_used_at is not null from datasette_secrets "
        "where name = ? order by version desc limit 1",
        (name,),
    ).fetchall()
    conn.close()
    assert used_at
    return used_by


@pytest.fixture
def keyed_model() -> Iterator[type]:
    """A model of `llm` that needs the key WEATHER_API_KEY and answers with it reversed."""
    import llm
    from llm.plugins import pm as llm_plugins

    class Model:
        model_id = "weather"
        needs_key = "weather"
        key_env_var = "NO_SUCH_VARIABLE"

    class SyncWeather(Model, llm.KeyModel):
        def execute(self, *_: Any) -> Any:
            """Datasette never runs this one."""

    class Weather(Model, llm.AsyncKeyModel):
        async def execute(
            self, prompt: Any, stream: Any, response: Any, conversation: Any, key: Any
        ) -> Any:
            yield key[::-1]

    class Models:
        @llm.hookimpl
        def register_models(self, register: Any) -> None:
            register(SyncWeather(), async_model=Weather())

    llm_plugins.register(Models(), name="weather models")
    yield Weather
    llm_plugins.unregister(name="weather models")


@pytest.mark.dependents
async def test_an_enrichment_reads_a_key_that_was_stored_through_the_form(
    datasette: Datasette, admin: dict[str, str], internal: str
) -> None:
    from datasette_enrichments import Enrichment

    class Geocoder(Enrichment):
        name = "Geocoder"
        slug = "geocoder"
        description = "Needs a key"
        secret = Secret("GEOCODER_KEY", "For the geocoder")

        async def enrich_batch(self, **_: Any) -> None:
            """Not run here."""

    class Enrichments:
        @hookimpl
        def register_enrichments(self) -> Any:
            return [Geocoder()]

    plugin = Enrichments()
    pm.register(plugin)
    try:
        names = [secret.name for secret in await get_secrets(datasette)]
        assert "GEOCODER_KEY" in names
        await post_form(datasette, admin, "GEOCODER_KEY", "key of the geocoder")
        assert await Geocoder().get_secret(datasette, {}) == "key of the geocoder"
    finally:
        pm.unregister(plugin)
    # It does not say for whom it asks.
    assert last_used_by(internal, "GEOCODER_KEY") is None


@pytest.mark.dependents
async def test_llm_reads_a_key_that_was_stored_through_the_form_for_an_actor(
    datasette: Datasette, admin: dict[str, str], internal: str, keyed_model: type
) -> None:
    from datasette_llm import LLM

    names = [secret.name for secret in await get_secrets(datasette)]
    assert "WEATHER_API_KEY" in names
    await post_form(datasette, admin, "WEATHER_API_KEY", "key of the model")
    models = LLM(datasette)
    assert await models.get_key_for_model(keyed_model(), {"id": "ann"}) == (
        "key of the model"
    )
    assert last_used_by(internal, "WEATHER_API_KEY") == "ann"
    response = await (await models.model("weather", actor={"id": "bob"})).prompt("?")
    assert await response.text() == "ledom eht fo yek"
    assert last_used_by(internal, "WEATHER_API_KEY") == "bob"


@pytest.fixture
async def places(
    make_datasette: MakeDatasette, master_key: str, tmp_path: Path
) -> Datasette:
    """A Datasette with a table of two places to enrich."""
    data = str(tmp_path / "data.db")
    conn = sqlite3.connect(data)
    with conn:
        conn.execute("create table places (id integer primary key, name text)")
        conn.execute("insert into places (name) values ('Paris'), ('Lima')")
    conn.close()
    datasette = make_datasette(master_key, files=[data])
    await datasette.invoke_startup()
    return datasette


async def enrich(
    datasette: Datasette, cookies: dict[str, str], enrichment: str, **fields: str
) -> list[str]:
    """Run an enrichment on the places; what it writes to the column `weather`."""
    from datasette_enrichments.utils import wait_for_job

    response = await datasette.client.post(
        f"/-/enrich/data/places/{enrichment}",
        data={"prompt": "{{ name }}", "output_column": "weather", **fields},
        cookies=cookies,
    )
    assert response.status_code == 302
    job = response.headers["location"].split("=")[-1]
    await wait_for_job(datasette, job, "data", timeout=10)
    rows = await datasette.get_database("data").execute("select weather from places")
    return [row[0] for row in rows.rows]


@pytest.mark.dependents
@pytest.mark.filterwarnings("ignore::DeprecationWarning:wtforms")
async def test_the_llm_enrichment_runs_with_a_key_that_was_stored_through_the_form(
    places: Datasette, internal: str, keyed_model: type
) -> None:
    cookies = {"ds_actor": places.client.actor_cookie({"id": "root"})}
    await post_form(places, cookies, "WEATHER_API_KEY", "key of the model")
    fields = {"system_prompt": "", "use_media": "", "media_url": ""}
    written = await enrich(places, cookies, "llm", model="weather", **fields)
    assert written == ["ledom eht fo yek"] * 2
    assert last_used_by(internal, "WEATHER_API_KEY") == "root"


@pytest.mark.dependents
@pytest.mark.filterwarnings("ignore::DeprecationWarning:wtforms")
async def test_the_gpt_enrichment_sends_a_key_that_was_stored_through_the_form(
    places: Datasette, httpx_mock: Any
) -> None:
    cookies = {"ds_actor": places.client.actor_cookie({"id": "root"})}
    await post_form(places, cookies, "OPENAI_API_KEY", "key of OpenAI")
    answer = {"choices": [{"message": {"content": "sunny"}}]}
    httpx_mock.add_response(json=answer, is_reusable=True)
    assert await enrich(places, cookies, "gpt", model="gpt-4o") == ["sunny"] * 2
    sent = [each.headers["Authorization"] for each in httpx_mock.get_requests()]
    assert sent == ["Bearer key of OpenAI"] * 2


@pytest.fixture(scope="module")
def with_two_plugins() -> Path:
    """A Python with plugins of which none imports another.

    datasette_enrichments cannot be imported first where a plugin is installed that
    imports it in its turn: it loads that plugin while it is half built itself.
    """
    programs = environment(
        "imports",
        "datasette-enrichments>=0.6a0",
        "datasette-llm>=0.1a8",
        wheel=Path(WHEEL),
    )
    return programs / "python"


REAL_IMPORTS = """
import importlib, json, sys
importlib.import_module(sys.argv[1])
import datasette_secrets
from datasette.app import Datasette
from datasette.plugins import pm

Datasette(memory=True)
missing = []
for name, plugin in pm.list_name_plugin():
    known = {caller.name for caller in pm.get_hookcallers(plugin)}
    for attribute in dir(plugin):
        options = pm.parse_hookimpl_opts(plugin, attribute)
        if options and (options.get("specname") or attribute) not in known:
            missing.append(f"{name}.{attribute}")
print(json.dumps({"missing": missing, "plugins": [n for n, _ in pm.list_name_plugin()]}))
"""


@pytest.mark.dependents
@pytest.mark.parametrize(
    "first",
    [
        "datasette_secrets",
        "datasette_enrichments",
        "datasette_llm",
        "datasette.app",
        "datasette.plugins",
        "datasette.cli",
    ],
)
def test_every_hook_of_the_real_plugins_is_registered_whatever_is_imported_first(
    with_two_plugins: Path, first: str
) -> None:
    found = run_program(with_two_plugins, first)
    assert found["missing"] == []
    assert {"secrets", "enrichments", "llm"} <= set(found["plugins"])


@pytest.mark.dependents
@pytest.mark.parametrize(
    "first",
    ["datasette_secrets", "datasette_llm", "datasette.app", "datasette.plugins"],
)
def test_every_hook_is_registered_beside_all_of_the_real_plugins(first: str) -> None:
    found = run_program(Path(sys.executable), first)
    assert found["missing"] == []
    assert {
        "secrets",
        "agent",
        "enrichments",
        "enrichments_gpt",
        "enrichments_llm",
        "enrichments_opencage",
        "extract",
        "llm",
    } <= set(found["plugins"])


def run_program(python: Path, first: str) -> dict[str, Any]:
    done = subprocess.run(
        [python, "-c", REAL_IMPORTS, first],
        cwd=python.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr.splitlines()[-1]
    return dict(json.loads(done.stdout))
