"""What plugins register: who registered a name, with which check, and what is no use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from types import ModuleType
from typing import Any

import pytest
from datasette import hookimpl
from datasette.app import Datasette
from datasette.plugins import pm

from datasette_secrets import CheckResult, Secret, get_secrets, registry


async def works(_: str) -> CheckResult:
    return CheckResult("works")


async def rejects(_: str) -> bool:
    return False


@contextmanager
def registering(**secrets: list[Any]) -> Iterator[None]:
    """Plugins of these names that register these secrets, in this order."""
    for name, theirs in reversed(secrets.items()):
        plugin = ModuleType(name)
        plugin.register_secrets = hookimpl(lambda theirs=theirs: theirs)  # type: ignore[attr-defined]
        pm.register(plugin, name)
    try:
        yield
    finally:
        for name in secrets:
            pm.unregister(name=name)


async def registered(datasette: Datasette, name: str = "A") -> registry.Registered:
    return (await registry.registered_secrets(datasette))[name]


async def test_every_plugin_that_registered_a_name_is_named(
    datasette: Datasette, admin: dict[str, str]
) -> None:
    with registering(weather=[Secret("A"), Secret("A")], maps=[Secret("A")]):
        answer = await datasette.client.get("/-/secrets/A.json", cookies=admin)
    assert answer.json()["secret"]["registered_by"] == ["weather", "maps"]
    answer = await datasette.client.get("/-/secrets.json", cookies=admin)
    [example] = answer.json()["secrets"]
    assert (example["registered"], example["registered_by"]) == (True, [])


async def test_the_name_from_an_enum_is_its_value(
    datasette: Datasette, admin: dict[str, str]
) -> None:
    class Name(str, Enum):
        MODEL = "OPENAI_API_KEY"

    with registering(models=[Secret(Name.MODEL)]):
        page = await datasette.client.get("/-/secrets", cookies=admin)
        assert 'href="/-/secrets/OPENAI_API_KEY"' in page.text


async def test_the_first_description_the_first_check_and_the_first_pattern_win(
    datasette: Datasette,
) -> None:
    with registering(
        one=[Secret("A", "the first")],
        two=[Secret("A", "the second", check=works, looks_like="^sk-")],
        three=[Secret("A", "the third", check=rejects, looks_like="^pk-")],
    ):
        secret = await registered(datasette)
    assert secret.description == "the first"
    assert (secret.check, secret.checked_by) == (works, "two")
    assert secret.looks_like == "^sk-"
    assert secret.registered_by == ("one", "two", "three")


@pytest.mark.parametrize("pattern", ["(", "[a-", "*", 7, b"a"])
async def test_a_pattern_that_is_no_regular_expression_is_said_and_left_out(
    datasette: Datasette, capsys: pytest.CaptureFixture[str], pattern: Any
) -> None:
    name = f"careless{pattern!r}"
    with registering(**{name: [Secret("A", looks_like=pattern)]}):
        secret = await registered(datasette)
        await registered(datasette)
    assert secret.looks_like is None
    [line] = capsys.readouterr().err.splitlines()
    assert name in line
    assert "looks_like" in line


async def test_a_check_that_is_no_function_is_said_and_left_out(
    datasette: Datasette, capsys: pytest.CaptureFixture[str]
) -> None:
    check: Any = "https://api.example.com/check"
    with registering(odd=[Secret("A", check=check)], good=[Secret("A", check=works)]):
        secret = await registered(datasette)
    assert (secret.check, secret.checked_by) == (works, "good")
    assert "plugin odd has a check for A" in capsys.readouterr().err


async def test_secrets_are_made_as_before_and_the_new_fields_take_keywords() -> None:
    secret = Secret("A", "a description", "https://example.com", "Get one")
    assert (secret.check, secret.looks_like) == (None, None)
    with pytest.raises(TypeError):
        Secret("A", None, None, None, works)  # type: ignore[call-arg]
    assert [each.name for each in await get_secrets(Datasette(memory=True))]
