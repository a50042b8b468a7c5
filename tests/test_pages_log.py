"""The change log on the pages and in the JSON API."""

from __future__ import annotations

import re
import sqlite3
from typing import Any

import pytest
from datasette.app import Datasette
from support.visitor import Visitor

from datasette_secrets import delete_secret, get_secret, set_secret
from datasette_secrets.events import via
from datasette_secrets.service import log_read

VALUE = "sk-live-4f9c0d1e"


@pytest.fixture
def visitor(datasette: Datasette) -> Visitor:
    return Visitor(datasette)


def actions(page: Any) -> list[str]:
    return re.findall(r'data-change="([^"]*)"', page.text)


async def test_the_log_says_who_did_what_and_from_where(
    visitor: Visitor, datasette: Datasette
) -> None:
    await set_secret(datasette, "KEY", VALUE, actor_id="ann")
    await visitor.post("/KEY", secret="", note="a note")
    await visitor.post("/KEY/-/delete")
    page = await visitor.get("/-/log")
    assert actions(page) == ["delete-secret", "set-note", "set-secret"]
    [saved] = re.findall(r'data-change="set-secret".*?</tr>', page.text, re.S)
    assert "Saved version 1" in saved and ">ann<" in saved and ">plugin<" in saved
    log = (await visitor.get("/-/log.json")).json()["log"]
    assert [(each["action"], each["via"], each["actor_id"]) for each in log] == [
        ("delete-secret", "page", "root"),
        ("set-note", "page", "root"),
        ("set-secret", "plugin", "ann"),
    ]
    assert (VALUE in page.text) is False


async def test_the_log_of_one_secret_is_on_its_page_and_behind_its_name(
    visitor: Visitor, datasette: Datasette
) -> None:
    await set_secret(datasette, "KEY", VALUE)
    await delete_secret(datasette, "KEY")
    await set_secret(datasette, "OTHER", VALUE)
    for path in ("/KEY", "/-/log?name=KEY"):
        assert actions(await visitor.get(path)) == ["delete-secret", "set-secret"]
    assert 'href="/-/secrets/-/log?name=KEY"' in (await visitor.get("/KEY")).text
    log = (await visitor.get("/-/log.json?name=OTHER")).json()["log"]
    assert [each["name"] for each in log] == ["OTHER"]
    assert "Nothing is logged" in (await visitor.get("/-/log?name=NOBODY")).text


async def test_the_log_is_paged(visitor: Visitor, datasette: Datasette) -> None:
    for _ in range(105):
        await set_secret(datasette, "KEY", VALUE)
    first = await visitor.get("/-/log")
    [link] = re.findall(r'href="/-/secrets(/-/log\?[^"]*)" rel="next"', first.text)
    second = await visitor.get(link)
    assert (len(actions(first)), len(actions(second))) == (100, 5)
    newest = (await visitor.get("/-/log.json")).json()
    older = (await visitor.get(f"/-/log.json?_next={newest['next']}")).json()
    assert (len(newest["log"]), len(older["log"]), older["next"]) == (100, 5, None)
    assert (await visitor.get("/-/log.json?_next=x")).status_code == 400


async def test_names_and_actors_in_the_log_are_escaped(
    visitor: Visitor, datasette: Datasette
) -> None:
    await set_secret(datasette, "KEY", VALUE, actor_id="<script>alert(1)</script>")
    page = await visitor.get("/-/log?name=%22%3E%3Cscript%3E")
    assert "<script>alert" not in (await visitor.get("/-/log")).text
    assert '"><script>' not in page.text


async def test_rows_that_somebody_wrote_into_the_log_do_no_harm(
    visitor: Visitor, datasette: Datasette, internal: str
) -> None:
    await set_secret(datasette, "KEY", VALUE)
    with sqlite3.connect(internal) as conn:
        for name, version, detail in (
            ("KEY", "one", '{"outcome": [], "versions": 5, "renew_by": {}}'),
            ("KEY", 1, '{"rolled_back_from": 1, "versions": [[], {}, 1], "pruned": 7}'),
            (7, b"\xff", "[" * 9_000),
            (b"\xff", 1, b"\xff"),
        ):
            conn.execute(
                "insert into datasette_secrets_log "
                "(at, actor_id, via, action, name, version, detail) "
                "values ('yesterday', x'ff', 5, '<b>', ?, ?, ?)",
                [name, version, detail],
            )
    conn.close()
    for path in ("/-/log", "/-/log.json", "/KEY", "/KEY.json", "/KEY/-/destroy", ""):
        page = await visitor.get(path)
        assert page.status_code == 200
        assert "<b>" not in page.text or path.endswith(".json")


async def test_only_those_who_may_manage_secrets_see_the_log(visitor: Visitor) -> None:
    visitor.cookies = {}
    assert (await visitor.get("/-/log")).status_code == 403
    assert (await visitor.get("/-/log.json")).status_code == 403


async def test_the_history_says_when_and_by_whom_a_version_was_destroyed(
    visitor: Visitor, datasette: Datasette
) -> None:
    for value in ("one", "two"):
        await set_secret(datasette, "KEY", value, actor_id="ann")
    await visitor.post("/KEY/-/destroy", version="1")
    page = await visitor.get("/KEY")
    [row] = re.findall(r'data-version="1".*?</tr>', page.text, re.S)
    assert re.search(r"Destroyed</span>.*just now.*>root<", row, re.S)
    newest, oldest = (await visitor.get("/KEY.json")).json()["versions"]
    assert (oldest["destroyed_by"], newest["destroyed_by"]) == ("root", None)
    assert oldest["destroyed_at"] and newest["destroyed_at"] is None


async def test_a_rollback_names_its_version_and_its_copies_are_warned_of(
    visitor: Visitor, datasette: Datasette
) -> None:
    for value in ("leaked", "two"):
        await set_secret(datasette, "KEY", value, note=f"the {value}")
    await visitor.post("/KEY/-/rollback", version="1")
    page = (await visitor.get("/KEY")).text
    [row] = re.findall(r'data-version="3".*?</tr>', page, re.S)
    assert "from version 1" in row and "the leaked" in row
    newest, *_ = (await visitor.get("/KEY.json")).json()["versions"]
    assert (newest["rolled_back_from"], newest["note"]) == (1, "the leaked")
    question = (await visitor.get("/KEY/-/destroy")).text
    [leaked] = re.findall(r'value="1".*?</label>', question, re.S)
    assert "Version 3 has the same value." in leaked
    [other] = re.findall(r'value="2".*?</label>', question, re.S)
    assert "the same value" not in other


async def test_the_last_use_says_which_version_was_used(
    visitor: Visitor, datasette: Datasette, monkeypatch: Any
) -> None:
    def last_used(page: Any) -> str:
        [told] = re.findall(r"<dt>Last used</dt><dd>(.*?)</dd>", page.text, re.S)
        return " ".join(re.sub(r"<[^>]*>", "", told).split())

    await set_secret(datasette, "KEY", "one")
    assert last_used(await visitor.get("/KEY")) == "never"
    await get_secret(datasette, "KEY", "bob")
    await set_secret(datasette, "KEY", "two")
    told = last_used(await visitor.get("/KEY"))
    assert told.startswith(
        "not yet used; version 1 was used just now"
    ) and told.endswith("bob")
    monkeypatch.setenv("DATASETTE_SECRETS_KEY", VALUE)
    assert last_used(await visitor.get("/KEY")) == "not tracked"


async def test_a_value_that_was_read_in_the_shell_is_in_the_log(
    visitor: Visitor, datasette: Datasette
) -> None:
    await set_secret(datasette, "KEY", VALUE)
    token = via.set("shell")
    await log_read(datasette, "KEY", 1, actor_id="ann")
    via.reset(token)
    page = await visitor.get("/-/log")
    [read] = re.findall(r'data-change="get-secret".*?</tr>', page.text, re.S)
    assert "Read version 1" in read and ">ann<" in read and ">shell<" in read
