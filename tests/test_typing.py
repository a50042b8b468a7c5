"""What a type checker makes of the public API. mypy checks this file in `make lint`."""

from __future__ import annotations

from importlib.resources import files

from datasette.app import Datasette
from typing_extensions import assert_type

from datasette_secrets import (
    CheckResult,
    Secret,
    SecretsError,
    SecretState,
    VersionConflict,
    delete_secret,
    get_secret,
    get_secrets,
    restore_secret,
    secret_state,
    set_secret,
)


async def check_the_functions(datasette: Datasette) -> None:
    """Is never called: mypy reads it."""
    assert_type(await get_secret(datasette, "A"), str | None)
    assert_type(
        await get_secret(datasette, secret_name="A", actor_id="ann"), str | None
    )
    assert_type(await get_secrets(datasette), list[Secret])
    assert_type(
        await set_secret(
            datasette,
            "A",
            "a value",
            note="a note",
            actor_id="ann",
            expected_version=0,
            renew_by="2030-01-31",
            keep=2,
        ),
        int,
    )
    assert_type(await delete_secret(datasette, "A", actor_id="ann"), int)
    assert_type(await restore_secret(datasette, "A", expected_version=1), int)
    state = await secret_state(datasette, "A")
    assert_type(state, SecretState)
    assert_type(state.state, str)
    assert_type(state.version, int | None)
    assert_type(state.source, str | None)
    assert_type(state.renew_by, str | None)
    assert_type(state.is_set, bool)

    await get_secret(datasette, 1)  # type: ignore[arg-type]
    await set_secret(datasette, "A", "a value", "a note")  # type: ignore[call-arg]
    await set_secret(datasette, "A", b"a value")  # type: ignore[arg-type]


def check_the_classes(error: SecretsError) -> None:
    async def check(value: str) -> CheckResult:
        return CheckResult("works", f"{len(value)} characters")

    async def simple_check(value: str) -> bool | None:
        return bool(value)

    secret = Secret("A", "a description", check=check, looks_like=r"^sk-")
    assert_type(secret.name, str)
    assert_type(secret.description, str | None)
    Secret("A", check=simple_check)
    assert_type(error.code, str)
    if isinstance(error, VersionConflict):
        assert_type(error.actual, int)

    Secret(1)  # type: ignore[arg-type]


def test_the_types_are_part_of_the_distribution() -> None:
    assert files("datasette_secrets").joinpath("py.typed").is_file()
