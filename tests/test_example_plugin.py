"""The example plugin in scripts/: it checks its key, and looking at its page is no use."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest
from conftest import MakeDatasette
from datasette.app import Datasette
from datasette.plugins import pm

from datasette_secrets import CheckResult, checks, instance, set_secret
from datasette_secrets.envelope import Plaintext

EXAMPLE = Path(__file__).parent.parent / "scripts" / "example_plugin"
NAME = "WEATHER_API_KEY"


@pytest.fixture
async def example(
    make_datasette: MakeDatasette, master_key: str
) -> AsyncIterator[Datasette]:
    before = set(pm.get_plugins())
    datasette = make_datasette(master_key, plugins_dir=str(EXAMPLE))
    await datasette.invoke_startup()
    yield datasette
    for plugin in set(pm.get_plugins()) - before:
        pm.unregister(plugin)


@pytest.mark.parametrize(
    ("value", "outcome"), [("weather-1", "works"), ("maps-1", "rejected")]
)
async def test_the_service_is_asked_whether_the_key_works(
    example: Datasette, value: str, outcome: str
) -> None:
    result = await checks.check_new(example, NAME, Plaintext.parse(value))
    assert result.outcome == outcome
    assert "this key" in result.message


async def test_a_key_that_cannot_be_sent_is_unknown(example: Datasette) -> None:
    result = await checks.check_new(example, NAME, Plaintext.parse("weather-\u20ac"))
    assert result == CheckResult("unknown", "The check failed with UnicodeEncodeError")


async def test_the_page_uses_no_key_and_the_forecast_does(
    example: Datasette, internal: str
) -> None:
    async def state() -> str:
        return str((await example.client.get("/-/weather.json")).json()["state"])

    def last_used() -> object:
        with closing(sqlite3.connect(internal)) as conn:
            return conn.execute(
                "select last_used_at from datasette_secrets"
            ).fetchone()[0]

    assert f"{NAME} is not set" in (await example.client.get("/-/weather")).text
    assert await state() == "not set"
    await set_secret(example, NAME, "weather-1")
    assert "is ready to work" in (await example.client.get("/-/weather")).text
    await instance.stop(example)  # writes the uses that wait
    assert last_used() is None
    assert await state() == "readable"
    await instance.stop(example)
    assert last_used() is not None
