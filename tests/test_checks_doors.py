"""Every outcome of a check through every door: what is said, stored and logged."""

from __future__ import annotations

import html
import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
from datasette.app import Datasette
from support.console import Console
from test_registered import registering

from datasette_secrets import CheckResult, Secret, get_secret, set_secret
from datasette_secrets.checks import check_new, check_stored
from datasette_secrets.envelope import Plaintext
from datasette_secrets.events import via

STORED, TYPED = "stored-4f9c0d1e83", "typed-77aa01bc42"


async def works(_: str) -> bool:
    return True


async def rejects(_: str) -> CheckResult:
    return CheckResult("rejected", "no such account")


async def is_unsure(_: str) -> None:
    return None


async def fails(value: str) -> bool:
    raise ValueError(value)


async def shows(value: str) -> CheckResult:
    return CheckResult("works", f"{value} works")


async def talks_nonsense(value: str) -> Any:
    return {"value": value}


CHECKS: dict[str, tuple[Callable[[str], Any], str, str]] = {
    "works": (works, "works", ""),
    "rejects": (rejects, "rejected", "no such account"),
    "is unsure": (is_unsure, "unknown", ""),
    "fails": (fails, "unknown", "The check failed with ValueError"),
    "shows the value": (shows, "works", "is not shown"),
    "talks nonsense": (talks_nonsense, "unknown", "did not return a CheckResult"),
}
WORDS = {"works": "Works", "rejected": "ejected", "unknown": "ould not"}
EXIT_CODES = {"works": 0, "rejected": 1, "unknown": 3}
EACH = pytest.mark.parametrize("kind", CHECKS)


def logged(path: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as conn:
        rows = conn.execute(
            "select actor_id, via, name, version, detail from datasette_secrets_log "
            "where action = 'check-secret' order by id"
        ).fetchall()
    return [(*row[:-1], json.loads(row[-1])) for row in rows]


def assert_says_nothing_of_the_values(text: str) -> None:
    assert STORED[:10] not in text
    assert TYPED[:10] not in text


@EACH
async def test_the_core(datasette: Datasette, internal: str, kind: str) -> None:
    check, outcome, message = CHECKS[kind]
    await set_secret(datasette, "A", STORED)
    via.set("page")
    with registering(plugin=[Secret("A", check=check)]):
        for result in (
            await check_stored(datasette, "A", actor_id="ann"),
            await check_new(datasette, "A", Plaintext.parse(TYPED), actor_id="ann"),
        ):
            assert result.outcome == outcome
            assert message in result.message
            assert_says_nothing_of_the_values(repr(result))
    rejected = [("ann", "page", "A", None, {"outcome": "rejected"})]
    assert logged(internal) == [
        ("ann", "page", "A", 1, {"outcome": outcome}),
        *(rejected if outcome == "rejected" else []),
    ]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"value": "KEY"}, "The value of A contains a master key"),
        ({"note": "KEY"}, "The note contains a master key"),
        ({"note": "n" * 101}, "at most 100 characters"),
        ({"renew_by": "2031-02-30"}, "2031-02-30"),
        ({"expected_version": "x"}, "whole number"),
        ({"expected_version": "0"}, "saved version 1 of A"),
    ],
    ids=["key", "key in the note", "note", "date", "version", "conflict"],
)
async def test_a_plugin_is_given_nothing_if_what_was_sent_is_refused(
    datasette: Datasette,
    internal: str,
    admin: dict[str, str],
    master_key: str,
    fields: dict[str, str],
    said: str,
) -> None:
    given = []

    async def check(value: str) -> bool:
        given.append(len(value))
        return True

    await set_secret(datasette, "A", STORED)
    sent = {"value": TYPED, "check": "1", **fields}
    sent = {name: each.replace("KEY", master_key) for name, each in sent.items()}
    with registering(plugin=[Secret("A", check=check)]):
        for path in ("/-/secrets/A", "/-/secrets/A/-/set"):
            answer = await datasette.client.post(path, data=sent, cookies=admin)
            assert answer.status_code == (409 if "saved" in said else 400)
            assert said in html.unescape(answer.text)
    assert (given, logged(internal)) == ([], [])
    assert await get_secret(datasette, "A") == STORED


@EACH
async def test_test_and_save_on_the_page(
    datasette: Datasette, internal: str, admin: dict[str, str], kind: str
) -> None:
    check, outcome, message = CHECKS[kind]
    await set_secret(datasette, "A", STORED)
    with registering(plugin=[Secret("A", check=check)]):
        answer = await datasette.client.post(
            "/-/secrets/A", data={"secret": TYPED, "check": "1"}, cookies=admin
        )
        listed = await datasette.client.get(
            "/-/secrets", cookies={**admin, **answer.cookies}
        )
        stored = await get_secret(datasette, "A")
        if outcome == "rejected":
            assert answer.status_code == 400
            assert stored == STORED
            assert message in answer.text
            assert "Save without testing" in answer.text
            page = answer.text
        else:
            assert answer.status_code == 302
            assert stored == TYPED
            page = listed.text
    assert WORDS[outcome] in page
    assert message in page
    assert_says_nothing_of_the_values(page + str(answer.headers) + listed.text)
    version = None if outcome == "rejected" else 2
    assert logged(internal) == [("root", "page", "A", version, {"outcome": outcome})]


@EACH
async def test_test_on_the_page(
    datasette: Datasette, internal: str, admin: dict[str, str], kind: str
) -> None:
    check, outcome, message = CHECKS[kind]
    await set_secret(datasette, "A", STORED)
    with registering(plugin=[Secret("A", check=check)]):
        page = await datasette.client.get("/-/secrets/A", cookies=admin)
        assert logged(internal) == []  # to look at it asks nobody
        answer = await datasette.client.post("/-/secrets/A/-/check", cookies=admin)
        assert answer.status_code == 302
        told = await datasette.client.get(
            answer.headers["location"], cookies={**admin, **answer.cookies}
        )
    assert "plugin" in page.text  # that is given the value
    assert WORDS[outcome] in told.text
    assert message in told.text
    assert_says_nothing_of_the_values(told.text + str(answer.headers))
    assert logged(internal) == [("root", "page", "A", 1, {"outcome": outcome})]


@EACH
async def test_the_api(
    datasette: Datasette, internal: str, admin: dict[str, str], kind: str
) -> None:
    check, outcome, message = CHECKS[kind]
    await set_secret(datasette, "A", STORED)
    with registering(plugin=[Secret("A", check=check)]):
        checked = await datasette.client.post(
            "/-/secrets/A/-/check", json={}, cookies=admin
        )
        assert checked.json()["outcome"] == outcome
        assert message in checked.json()["message"]
        set_ = await datasette.client.post(
            "/-/secrets/A/-/set", json={"value": TYPED, "check": True}, cookies=admin
        )
        stored = await get_secret(datasette, "A")
        secret = await datasette.client.get("/-/secrets/A.json", cookies=admin)
    assert checked.status_code == 200
    if outcome == "rejected":
        assert set_.status_code == 400
        assert message in set_.json()["error"]
        assert stored == STORED
    else:
        assert set_.status_code == 200
        assert set_.json()["check"] == outcome
        assert message in set_.json()["message"]
        assert stored == TYPED
    assert secret.json()["secret"]["check"] == outcome
    assert_says_nothing_of_the_values(checked.text + set_.text + secret.text)
    version = None if outcome == "rejected" else 2
    assert logged(internal) == [
        ("root", "api", "A", 1, {"outcome": outcome}),
        ("root", "api", "A", version, {"outcome": outcome}),
    ]


@EACH
def test_the_shell(console: Console, kind: str) -> None:
    check, outcome, message = CHECKS[kind]
    console.ok("set", "A", "--create", input=STORED)
    with registering(plugin=[Secret("A", check=check)]):
        result = console.run("check", "A", "--actor", "ann")
    assert result.exit_code == EXIT_CODES[outcome]
    assert WORDS[outcome].lower() in result.stdout.lower()
    assert message in result.stdout
    assert_says_nothing_of_the_values(result.output)
    assert logged(str(console.internal)) == [
        ("ann", "shell", "A", 1, {"outcome": outcome})
    ]


async def test_nothing_else_runs_a_check(
    datasette: Datasette, internal: str, admin: dict[str, str]
) -> None:
    async def check(_: str) -> bool:
        raise AssertionError("it was called")

    await set_secret(datasette, "A", STORED)
    with registering(plugin=[Secret("A", check=check)]):
        for path in (
            "/-/secrets",
            "/-/secrets.json",
            "/-/secrets/A",
            "/-/secrets/A.json",
        ):
            assert (await datasette.client.get(path, cookies=admin)).status_code == 200
        asked = await datasette.client.get("/-/secrets/A/-/check", cookies=admin)
        assert asked.status_code == 405
        await datasette.client.post(
            "/-/secrets/A", data={"secret": TYPED}, cookies=admin
        )
        await datasette.client.post(
            "/-/secrets/A/-/set", json={"value": TYPED, "check": False}, cookies=admin
        )
        refused = await datasette.client.post("/-/secrets/A/-/check", json={})
        assert refused.status_code == 403
    assert logged(internal) == []
