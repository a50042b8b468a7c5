"""Testing a value before it is saved, and dates to renew by, on the pages and in the API."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator
from typing import Any

import pytest
from datasette.app import Datasette
from support.visitor import Visitor, plugin

from datasette_secrets import CheckResult, Secret, get_secret, set_secret

GOOD, BAD, ODD = "sk-live-4f9c0d1e", "sk-bad-77aa0b1c", "sk-odd-90ff8d7e"


async def check(value: str) -> CheckResult | None:
    if value == BAD:
        return CheckResult("rejected", "The provider does not know this key")
    return CheckResult("works", "Signed in as ann") if value == GOOD else None


def register_secrets() -> list[Secret]:
    return [Secret("KEY", check=check, looks_like="^sk-"), Secret("PLAIN")]


@pytest.fixture
def visitor(datasette: Datasette) -> Iterator[Visitor]:
    with plugin(register_secrets=register_secrets):
        yield Visitor(datasette)


async def post_json(visitor: Visitor, path: str, sent: dict[str, Any]) -> Any:
    return await visitor.datasette.client.post(
        f"/-/secrets{path}", json=sent, cookies=visitor.cookies
    )


def days_from_now(days: int) -> str:
    today = datetime.datetime.now(datetime.timezone.utc).date()
    return (today + datetime.timedelta(days)).isoformat()


async def test_a_rejected_value_is_not_stored_and_can_be_saved_untested(
    visitor: Visitor, datasette: Datasette
) -> None:
    form = await visitor.get("/KEY")
    assert "Testing gives the value to the plugin Plugin" in form.text
    refused = await visitor.post("/KEY", secret=BAD, note="mine", check="1")
    assert refused.status_code == 400
    assert "was rejected: The provider does not know this key" in refused.text
    assert 'value="Save without testing"' in refused.text
    assert 'name="note" id="secrets-note" value="mine"' in refused.text
    assert (BAD in refused.text) is False
    assert await get_secret(datasette, "KEY") is None
    saved = await visitor.post("/KEY", secret=BAD)
    assert await visitor.messages(saved) == ["Secret KEY stored"]
    assert (await get_secret(datasette, "KEY") == BAD) is True


@pytest.mark.parametrize(
    ("value", "outcome", "said"),
    [
        (GOOD, "works", "Works: Signed in as ann"),
        (ODD, "unknown", "Could not be tested"),
    ],
    ids=["works", "unknown"],
)
async def test_a_value_that_is_not_rejected_is_stored_and_the_outcome_shown(
    visitor: Visitor, value: str, outcome: str, said: str
) -> None:
    saved = await visitor.post("/KEY", secret=value, check="1")
    assert await visitor.messages(saved) == [f"Secret KEY stored. {said}"]
    page = (await visitor.get()).text
    tested = "tested " if outcome == "works" else ""
    assert f"{said.partition(':')[0]}, {tested}<time" in page
    secret = (await visitor.get("/KEY.json")).json()["secret"]
    assert secret["check"] == outcome and secret["checked_at"]
    await visitor.post("/KEY", secret=value)
    secret = (await visitor.get("/KEY.json")).json()["secret"]
    assert (secret["check"], secret["checked_at"]) == (None, None)


async def test_the_stored_value_is_tested_by_its_button_and_never_by_a_get(
    visitor: Visitor, datasette: Datasette
) -> None:
    await set_secret(datasette, "KEY", BAD)
    assert 'action="/-/secrets/KEY/-/check"' in (await visitor.get("/KEY")).text
    assert (await visitor.get("/KEY/-/check")).status_code == 405
    done = await visitor.post("/KEY/-/check")
    assert await visitor.messages(done) == [
        "KEY was tested. Rejected: The provider does not know this key"
    ]
    assert "Rejected, <time" in (await visitor.get("/KEY")).text


async def test_a_program_tests_before_it_stores(
    visitor: Visitor, datasette: Datasette
) -> None:
    refused = await post_json(visitor, "/KEY/-/set", {"value": BAD, "check": True})
    assert refused.status_code == 400 and refused.json()["ok"] is False
    assert await get_secret(datasette, "KEY") is None
    stored = await post_json(visitor, "/KEY/-/set", {"value": GOOD, "check": True})
    assert stored.json() == {
        **{"ok": True, "name": "KEY", "version": 1, "check": "works"},
        "message": "Signed in as ann",
    }
    tested = await post_json(visitor, "/KEY/-/check", {})
    assert tested.json() == {
        **{"ok": True, "name": "KEY", "outcome": "works"},
        "message": "Signed in as ann",
    }
    for path, sent in (
        ("/PLAIN/-/check", {}),
        ("/PLAIN/-/set", {"value": GOOD, "check": True}),
        ("/KEY/-/set", {"value": GOOD, "check": "yes"}),
        ("/KEY/-/check", {"value": GOOD}),
    ):
        assert (await post_json(visitor, path, sent)).status_code == 400
    assert await get_secret(datasette, "PLAIN") is None


async def test_the_plugins_that_registered_a_secret_are_named(visitor: Visitor) -> None:
    assert "Registered by Plugin" in (await visitor.get("/KEY")).text
    secret = (await visitor.get("/KEY.json")).json()["secret"]
    assert secret["registered_by"] == ["Plugin"]


async def test_a_pattern_is_in_the_page_for_the_browser_alone(visitor: Visitor) -> None:
    assert 'data-looks-like="^sk-"' in (await visitor.get("/KEY")).text
    saved = await visitor.post("/KEY", secret="nothing of the kind")
    assert saved.status_code == 302


async def test_a_secret_that_is_due_stands_first_with_its_date(
    visitor: Visitor, datasette: Datasette
) -> None:
    for name, days in (("SOON", 14), ("PAST", -3), ("LATER", 15)):
        saved = await visitor.post(
            "/-/add", name=name, secret=GOOD, renew_by=days_from_now(days)
        )
        assert saved.status_code == 302
    page = (await visitor.get()).text
    urgent = page[page.index("Needs attention") : page.index("Waiting to be set")]
    assert re.findall(r'data-secret="([^"]*)"', urgent) == ["PAST", "SOON"]
    assert f"Renew by {days_from_now(-3)}" in urgent
    assert (await get_secret(datasette, "PAST") == GOOD) is True


async def test_a_date_is_changed_and_cleared_without_a_value(visitor: Visitor) -> None:
    async def renew_by() -> Any:
        return (await visitor.get("/KEY.json")).json()["secret"]["renew_by"]

    await visitor.post("/KEY", secret=GOOD, note="n", renew_by="2031-01-02")
    assert await renew_by() == "2031-01-02"
    assert 'value="2031-01-02"' in (await visitor.get("/KEY")).text
    form = {"secret": "", "note": "n", "expected_version": "1"}
    changed = await visitor.post("/KEY", renew_by="2032-01-02", **form)
    assert await visitor.messages(changed) == ["Renewal date of KEY updated"]
    assert await renew_by() == "2032-01-02"
    refused = await visitor.post("/KEY", renew_by="2032-02-30", **form)
    assert refused.status_code == 400 and await renew_by() == "2032-01-02"
    await visitor.post("/KEY", renew_by="", **form)
    assert await renew_by() is None
    await visitor.post("/KEY", secret=GOOD, renew_by="2031-01-02")
    # The date of the value before stands in the form, and is not one for the new value.
    shown = {"renew_by": "2031-01-02", "expected_renew_by": "2031-01-02"}
    form = (await visitor.get("/KEY")).text
    assert 'name="expected_renew_by" value="2031-01-02"' in form
    done = await visitor.post("/KEY", secret=GOOD, **shown)
    [message] = await visitor.messages(done)
    assert message == "Secret KEY updated, and its renewal date cleared"
    assert await renew_by() is None
    sent = {"value": GOOD, "renew_by": "2033-01-02"}
    await post_json(visitor, "/KEY/-/set", sent)
    assert await renew_by() == "2033-01-02"
    await post_json(visitor, "/KEY/-/set", {"value": GOOD})
    assert await renew_by() is None


async def test_a_conflict_shows_what_is_stored_now_where_nothing_was_typed(
    visitor: Visitor, datasette: Datasette
) -> None:
    def field(page: Any, name: str) -> str:
        return str(re.findall(rf'name="{name}"[^>]* value="([^"]*)"', page.text)[0])

    await set_secret(datasette, "KEY", GOOD, note="old", renew_by="2031-01-02")
    shown = {"expected_version": "1", "expected_note": "old"}
    shown |= {
        "expected_renew_by": "2031-01-02",
        "note": "old",
        "renew_by": "2031-01-02",
    }
    await set_secret(datasette, "KEY", GOOD, note="new")
    late = await visitor.post("/KEY", secret=BAD, **shown)
    assert (late.status_code, BAD in late.text) == (409, False)
    assert (field(late, "note"), field(late, "renew_by")) == ("new", "")
    assert field(late, "expected_renew_by") == ""
    late = await visitor.post("/KEY", secret=BAD, **{**shown, "renew_by": "2032-01-02"})
    assert (field(late, "note"), field(late, "renew_by")) == ("new", "2032-01-02")
