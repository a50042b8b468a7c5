"""The pages as a browser gets them: what they show, and that no value is ever in them."""

from __future__ import annotations

import base64
import html
import re
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeDatasette
from cryptography.fernet import Fernet
from datasette.app import Datasette
from support.documents import read
from support.visitor import Visitor, plugin

from datasette_secrets import Secret, delete_secret, get_secret, set_secret
from datasette_secrets.envelope import generate_master_key
from datasette_secrets.listing import STATES, find_secret
from datasette_secrets.service import destroy_row, destroy_versions, set_details
from datasette_secrets.web import answer as answer_module

VALUE = "sk-live-4f9c0d1e"


@pytest.fixture
def visitor(datasette: Datasette) -> Visitor:
    return Visitor(datasette)


def rows(page: Any) -> dict[str, str]:
    """The state of each secret on a list page."""
    return dict(re.findall(r'data-secret="([^"]*)" data-state="([^"]*)"', page.text))


def sections(page: Any) -> dict[str, list[str]]:
    """The names under each heading of a list page, in their order."""
    parts = re.split(r'<(?:h2|summary) id="[^"]*">([^<]*)</(?:h2|summary)>', page.text)
    names = [re.findall(r'data-secret="([^"]*)"', part) for part in parts[2::2]]
    return {
        heading: each for heading, each in zip(parts[1::2], names, strict=True) if each
    }


def field(page: Any, name: str) -> str:
    """What a text field of a form holds."""
    return str(re.findall(rf'name="{name}"[^>]* value="([^"]*)"', page.text)[0])


def plant(internal: str, name: str, key: str) -> None:
    """A row as datasette-secrets 0.x wrote it."""
    with sqlite3.connect(internal) as conn:
        conn.execute(
            "insert into datasette_secrets (name, version, encrypted, encryption_key_name)"
            " values (?, 1, ?, 'default')",
            [name, Fernet(key).encrypt(VALUE.encode())],
        )
    conn.close()


# The list.


async def test_the_list_shows_every_state(
    make_datasette: MakeDatasette, master_key: str, monkeypatch: Any, internal: str
) -> None:
    lost = make_datasette(generate_master_key())
    await lost.invoke_startup()
    await set_secret(lost, "LOST", VALUE)
    datasette = make_datasette(master_key)
    await datasette.invoke_startup()
    for name in ("STORED", "DELETED", "DESTROYED", "OVERRIDDEN"):
        await set_secret(datasette, name, VALUE)
    await delete_secret(datasette, "DELETED")
    await destroy_versions(datasette, "DESTROYED", [1])
    plant(internal, "OLD", master_key)
    for name in ("OVERRIDDEN", "IN_THE_ENVIRONMENT"):
        monkeypatch.setenv(f"DATASETTE_SECRETS_{name}", VALUE)

    def register_secrets() -> list[Secret]:
        return [Secret("WAITING"), Secret("IN_THE_ENVIRONMENT")]

    with plugin(register_secrets=register_secrets):
        page = await Visitor(datasette).get()
    assert rows(page) == {
        "WAITING": "not-set",
        "IN_THE_ENVIRONMENT": "environment",
        "OVERRIDDEN": "environment",
        "STORED": "stored",
        "DELETED": "deleted",
        "DESTROYED": "destroyed",
        "OLD": "needs-upgrade",
        "LOST": "needs-key",
    }
    assert set(rows(page).values()) == set(STATES)
    assert (VALUE in page.text) is False


async def test_what_plugins_wait_for_is_described_and_can_be_obtained(
    visitor: Visitor,
) -> None:
    secrets = [
        Secret("A", "For <em>maps</em>", "https://example.com/?a=1&b=2", "Get a <key>"),
        Secret("B", None, "javascript:alert(1)", "Click"),
        Secret("C", None, "http://["),
    ]
    with plugin(register_secrets=lambda: secrets):
        page = await visitor.get()
        form = await visitor.get("/A")
    for text in (page.text, form.text):
        assert "For <em>maps</em>" in text
        assert 'href="https://example.com/?a=1&amp;b=2"' in text
        assert "Get a &lt;key&gt;" in text
    assert "javascript:" not in page.text and "http://[" not in page.text


async def test_people_are_named_by_username_else_name_else_id(
    visitor: Visitor, datasette: Datasette
) -> None:
    actors = {
        "1": {"id": "1", "username": "ada", "name": "Ada L."},
        "2": {"id": "2", "name": "Grace <H>"},
        "3": {"id": "3"},
    }
    for actor_id in ("1", "2", "3", "gone"):
        await set_secret(datasette, f"KEY_{actor_id}", VALUE, actor_id=actor_id)

    async def actors_from_ids(actor_ids: list[str]) -> dict[str, Any]:
        return {each: actors[each] for each in actor_ids if each in actors}

    with plugin(actors_from_ids=actors_from_ids):
        page = await visitor.get()
    who = re.findall(r'secrets-who">([^<]*)<', page.text)
    assert who == ["ada", "Grace &lt;H&gt;", "3", "gone"]


async def test_a_hook_that_fails_costs_names_and_not_the_page(
    visitor: Visitor, datasette: Datasette
) -> None:
    await set_secret(datasette, "KEY", VALUE, actor_id="17")

    def actors_from_ids(actor_ids: list[str]) -> dict[str, Any]:
        raise RuntimeError("no such service")

    with plugin(actors_from_ids=actors_from_ids):
        page = await visitor.get()
        secret = await visitor.get("/KEY")
    assert 'secrets-who">17<' in page.text
    assert 'secrets-who">17<' in secret.text


async def test_a_time_is_relative_with_the_exact_one_for_everybody(
    visitor: Visitor, datasette: Datasette, internal: str
) -> None:
    await set_secret(datasette, "KEY", VALUE)
    with sqlite3.connect(internal) as conn:
        conn.execute("update datasette_secrets set updated_at = '2001-02-03 04:05:06'")
    conn.close()
    page = await visitor.get()
    assert re.search(
        r'<time datetime="2001-02-03T04:05:06Z" title="2001-02-03 04:05:06 UTC">'
        r"\d+ years ago<span[^>]*> \(2001-02-03 04:05:06 UTC\)</span></time>",
        page.text,
    )


async def test_the_list_is_paged_and_every_secret_is_on_one_page(
    visitor: Visitor, datasette: Datasette
) -> None:
    for number in range(205):
        await set_secret(datasette, f"KEY_{number:03}", VALUE)
    seen: list[str] = []
    path = ""
    for _ in range(3):
        page = await visitor.get(path)
        seen += rows(page)
        link = re.search(r'href="/-/secrets(\?[^"]*)" rel="next"', page.text)
        path = link[1].replace("&amp;", "&") if link else ""
    assert not link
    assert sorted(seen) == ["EXAMPLE_SECRET"] + [f"KEY_{n:03}" for n in range(205)]


@pytest.mark.parametrize(
    "name", ["ENCRYPTION_KEY", "encryption_key", "ENCRYPT\u0131ON_KEY"]
)
async def test_a_planted_reserved_name_takes_no_place_on_a_page(
    visitor: Visitor, datasette: Datasette, internal: str, name: str
) -> None:
    for number in range(101):
        await set_secret(datasette, f"zz_{number:03}", VALUE)
    with sqlite3.connect(internal) as conn:
        conn.execute(
            "insert into datasette_secrets (name, version, encryption_key_name) "
            "values (?, 1, '')",
            [name],
        )
    conn.close()
    first = await visitor.get()
    assert 'href="/-/secrets?_next=' in first.text and len(rows(first)) == 101
    assert name not in rows(first)
    for size in (1, 100):
        paged = (await visitor.get(f".json?_size={size}")).json()
        assert len(paged["secrets"]) == size and paged["next"]


async def test_a_planted_reserved_name_is_not_counted(
    visitor: Visitor, datasette: Datasette, internal: str
) -> None:
    await set_secret(datasette, "KEY", VALUE)
    with sqlite3.connect(internal) as conn:
        conn.execute("update datasette_secrets set name = 'encryption_key'")
    conn.close()
    assert "1 secret</p>" in (await visitor.get()).text


async def test_the_list_sorts_without_regard_to_case_and_shows_trouble_first(
    make_datasette: MakeDatasette, master_key: str
) -> None:
    lost = make_datasette(generate_master_key())
    await lost.invoke_startup()
    await set_secret(lost, "zz_broken", VALUE)
    visitor = Visitor(make_datasette(master_key))
    await visitor.datasette.invoke_startup()
    for name in ("b", "A", "C", "GONE", "deleted"):
        await set_secret(visitor.datasette, name, VALUE)
    await destroy_versions(visitor.datasette, "GONE", [1])
    await delete_secret(visitor.datasette, "deleted")
    page = await visitor.get()
    assert sections(page) == {
        "Needs attention": ["zz_broken"],
        "Waiting to be set": ["EXAMPLE_SECRET"],
        "Secrets": ["A", "b", "C"],
        "Deleted and destroyed: 2 secrets": ["deleted", "GONE"],
    }
    assert re.search(r"<details[^>]*>\s*<summary id=\"secrets-removed\"", page.text)
    for state, names in (
        ("stored", ["A", "b", "C"]),
        ("deleted", ["deleted"]),
        ("needs-key", ["zz_broken"]),
        ("not-set", ["EXAMPLE_SECRET"]),
        ("environment", []),
    ):
        assert list(rows(await visitor.get(f"?state={state}"))) == names
    assert list(rows(await visitor.get("?state=stored&q=B"))) == ["b"]


async def test_every_secret_is_on_a_page_however_many_need_attention(
    make_datasette: MakeDatasette, master_key: str
) -> None:
    lost = make_datasette(generate_master_key())
    await lost.invoke_startup()
    names = [f"KEY_{number:03}" for number in range(250)]
    for name in names:
        await set_secret(lost, name, VALUE)
    visitor = Visitor(make_datasette(master_key))
    await visitor.datasette.invoke_startup()
    first = await visitor.get()
    assert sections(first)["Needs attention"] == names[:100]
    assert sections(first)["Secrets"] == names[100:200]
    [link] = re.findall(r'href="/-/secrets(\?[^"]*)" rel="next"', first.text)
    assert rows(await visitor.get(link)) == dict.fromkeys(names[200:], "needs-key")


async def test_pages_of_the_list_lead_forwards_and_back(
    visitor: Visitor, datasette: Datasette
) -> None:
    for number in range(250):
        await set_secret(datasette, f"KEY_{number:03}", VALUE)
    shown, path = [], ""
    for rel in ("next", "next", "prev", "prev"):
        page = await visitor.get(path)
        shown.append([name for name in rows(page) if name.startswith("KEY")])
        [link] = re.findall(rf'href="/-/secrets(\?[^"]*)?" rel="{rel}"', page.text)
        path = link.replace("&amp;", "&")
    assert [(each[0], len(each)) for each in shown] == [
        *(("KEY_000", 100), ("KEY_100", 100), ("KEY_200", 50), ("KEY_100", 100)),
    ]
    assert path == ""


@pytest.mark.parametrize("query", ["mail", "MAIL", "Mail"])
async def test_the_list_is_filtered_whatever_the_case(
    visitor: Visitor, datasette: Datasette, query: str
) -> None:
    for name in ("MAILGUN_KEY", "email_password", "MAPS"):
        await set_secret(datasette, name, VALUE)
    assert set(rows(await visitor.get(f"?q={query}"))) == {
        "MAILGUN_KEY",
        "email_password",
    }


async def test_a_filter_is_text_and_nothing_else(visitor: Visitor) -> None:
    page = await visitor.get("?q=%22%3E%3Cscript%3Ealert(1)%3C/script%3E%25_'")
    assert page.status_code == 200
    assert rows(page) == {}
    assert "<script>alert(1)" not in page.text


async def test_names_and_notes_are_escaped(visitor: Visitor) -> None:
    name = 'A"><script>alert(1)</script>'
    note = "<img src=x onerror=alert(2)> 🔑 \x07"
    with plugin(register_secrets=lambda: [Secret(name)]):
        await visitor.datasette.client.post(
            "/-/secrets/A~22~3E~3Cscript~3Ealert~281~29~3C~2Fscript~3E",
            data={"secret": VALUE, "note": note},
            cookies=visitor.cookies,
        )
        for path in ("", "/A~22~3E~3Cscript~3Ealert~281~29~3C~2Fscript~3E"):
            page = await visitor.get(path)
            assert "&lt;img src=x onerror=alert(2)&gt; 🔑" in page.text
            assert "<script>alert" not in page.text and "<img" not in page.text


# The form.


async def test_a_secret_is_stored_through_the_form(
    visitor: Visitor, datasette: Datasette
) -> None:
    page = await visitor.get("/EXAMPLE_SECRET")
    assert 'name="expected_version" value="0"' in page.text
    saved = await visitor.post(
        "/EXAMPLE_SECRET", secret=VALUE, note="a note", expected_version="0"
    )
    assert (saved.status_code, saved.headers["location"]) == (302, "/-/secrets")
    assert await visitor.messages(saved) == ["Secret EXAMPLE_SECRET stored"]
    assert await get_secret(datasette, "EXAMPLE_SECRET") == VALUE
    after = await visitor.get("/EXAMPLE_SECRET")
    assert 'name="expected_version" value="1"' in after.text
    assert 'value="a note"' in after.text


async def test_white_space_at_the_ends_is_stripped_and_lines_stay(
    visitor: Visitor, datasette: Datasette
) -> None:
    pem = "-----BEGIN KEY-----\r\nMIIE\r\n\r\n  indented\r\n-----END KEY-----"
    await visitor.post("/EXAMPLE_SECRET", secret=f" \r\n\t{pem}\r\n\r\n", note="")
    stored = await get_secret(datasette, "EXAMPLE_SECRET")
    assert (stored == pem.replace("\r\n", "\n")) is True


async def test_a_blank_value_changes_only_the_note(
    visitor: Visitor, datasette: Datasette
) -> None:
    await set_secret(datasette, "KEY", VALUE, note="before")
    saved = await visitor.post(
        "/KEY", secret=" \r\n ", note="after", expected_version="1"
    )
    assert (saved.status_code, saved.headers["location"]) == (302, "/-/secrets")
    assert await visitor.messages(saved) == ["Note of KEY updated"]
    page = await visitor.get("/KEY")
    assert (
        'value="after"' in page.text
        and 'name="expected_version" value="1"' in page.text
    )
    assert await get_secret(datasette, "KEY") == VALUE


async def test_a_note_is_kept_or_cleared_as_the_form_says(
    visitor: Visitor, datasette: Datasette
) -> None:
    await set_secret(datasette, "KEY", VALUE, note="before")
    await visitor.post("/KEY", secret="x")
    assert 'value="before"' in (await visitor.get("/KEY")).text
    await visitor.post("/KEY", secret="", note="")
    assert (
        "before"
        not in re.findall(r'name="note"[^>]*', (await visitor.get("/KEY")).text)[0]
    )


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"secret": ""}, "needs a value"),
        ({"secret": " \r\n "}, "needs a value"),
        ({"secret": "", "note": "n"}, "needs a value"),
        ({"secret": VALUE * 10_000}, "65,536"),
        ({"secret": f"{VALUE}\0x"}, "NUL"),
        ({"secret": VALUE, "note": "n" * 101}, "at most 100 characters"),
        ({"secret": VALUE, "expected_version": "x"}, "whole number"),
        ({"secret": VALUE, "expected_version": "9" * 40}, "whole number"),
    ],
    ids=["empty", "blank", "note alone", "long", "NUL", "long note", "text", "huge"],
)
async def test_a_bad_form_says_why_and_sends_nothing_back(
    visitor: Visitor, datasette: Datasette, fields: dict[str, str], reason: str
) -> None:
    answer = await visitor.post("/EXAMPLE_SECRET", **fields)
    assert answer.status_code == 400
    alert = re.search(r'role="alert"[^>]*>([^<]*)<', answer.text)
    assert alert and reason in alert[1]
    assert (VALUE in answer.text, "nnn" in answer.text) == (False, False)
    assert await get_secret(datasette, "EXAMPLE_SECRET") is None


async def test_a_form_for_a_new_name_is_refused_with_the_reason(
    visitor: Visitor,
) -> None:
    refused = await visitor.post("/NEW_NAME/-/set", secret=VALUE, note="x" * 101)
    assert refused.status_code == 400
    assert "A note has at most 100 characters" in refused.text
    assert VALUE not in refused.text


async def test_whoever_saves_second_is_told_who_was_first(
    visitor: Visitor, datasette: Datasette
) -> None:
    await set_secret(datasette, "KEY", "first")
    await set_secret(datasette, "KEY", "second", actor_id="17")

    def actors_from_ids(actor_ids: list[str]) -> dict[str, Any]:
        return {"17": {"id": "17", "name": "Ada"}}

    with plugin(actors_from_ids=actors_from_ids):
        for fields in ({"secret": VALUE}, {"secret": "", "note": "late"}):
            late = await visitor.post("/KEY", **fields, expected_version="1")
            assert late.status_code == 409
            assert re.search(
                r"Ada saved version 2 of KEY at \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC while "
                "you were editing version 1",
                late.text,
            )
            assert (VALUE in late.text) is False
            way_out = "enter the value again, and save" if fields["secret"] else "then"
            assert f"Review it, {way_out}" in late.text
            assert 'name="expected_version" value="2"' in late.text
    assert await get_secret(datasette, "KEY") == "second"


async def test_a_form_that_was_refused_still_knows_which_version_was_edited(
    visitor: Visitor, datasette: Datasette
) -> None:
    await set_secret(datasette, "KEY", "first")
    await set_secret(datasette, "KEY", "second", actor_id="ada")
    await set_details(datasette, "KEY", {"note": "of bob"}, actor_id="bob")
    refused = await visitor.post("/KEY", secret=VALUE * 10_000, expected_version="1")
    assert (refused.status_code, field(refused, "expected_version")) == (400, "1")
    late = await visitor.post(
        "/KEY", secret=VALUE, expected_version=field(refused, "expected_version")
    )
    assert (late.status_code, field(late, "expected_version")) == (409, "2")
    assert "ada saved version 2 of KEY" in late.text
    nonsense = await visitor.post("/KEY", secret=VALUE, expected_version="x")
    assert (nonsense.status_code, field(nonsense, "expected_version")) == (400, "2")
    assert await get_secret(datasette, "KEY") == "second"


async def test_a_form_that_was_refused_still_knows_which_note_and_date_were_edited(
    visitor: Visitor, datasette: Datasette
) -> None:
    await set_secret(datasette, "KEY", "first", note="n", renew_by="2031-01-01")
    page = await visitor.get("/KEY")
    shown = ("expected_version", "expected_note", "expected_renew_by")
    form = {name: field(page, name) for name in (*shown, "note", "renew_by")}
    changed: dict[str, str | None] = {"note": "of bob", "renew_by": "2032-02-02"}
    await set_details(datasette, "KEY", changed, actor_id="bob")
    form["note"] = "of ada"
    refused = await visitor.post("/KEY", **{**form, "secret": VALUE * 10_000})
    assert refused.status_code == 400
    assert {name: field(refused, name) for name in form} == form
    late = await visitor.post("/KEY", **form, secret="")
    assert late.status_code == 409
    assert "bob changed the note or the date of KEY" in late.text
    assert [field(late, name) for name in form] == [
        *("1", "of bob", "2032-02-02"),
        *("of ada", "2032-02-02"),
    ]


async def test_a_note_that_contains_a_refused_value_stays_as_it_is(
    visitor: Visitor, datasette: Datasette
) -> None:
    note = "for the test server"
    await set_secret(datasette, "KEY", "first", note=note)
    form = {"note": note, "expected_note": note, "expected_version": "1"}
    sent = {**form, "secret": "test", "renew_by": "nonsense"}
    refused = await visitor.post("/KEY", **sent)
    assert refused.status_code == 400
    assert field(refused, "note") == field(refused, "expected_note") == note


async def test_only_what_can_be_decrypted_is_offered_to_roll_back_to(
    make_datasette: MakeDatasette, master_key: str
) -> None:
    lost = make_datasette(generate_master_key())
    await lost.invoke_startup()
    await set_secret(lost, "KEY", VALUE)
    await delete_secret(lost, "KEY")
    visitor = Visitor(make_datasette(master_key))
    await visitor.datasette.invoke_startup()
    await set_secret(visitor.datasette, "KEY", VALUE)
    await destroy_versions(visitor.datasette, "KEY", [2])
    page = await visitor.get("/KEY")
    assert 'data-version="1" data-state="deleted"' in page.text
    assert "roll back" not in page.text.lower()


async def test_a_note_of_several_lines_stays_as_it_is(
    visitor: Visitor, datasette: Datasette
) -> None:
    await set_secret(datasette, "KEY", "first", note="line 1\nline 2")
    # A browser leaves out the line breaks of a text field, and keeps those of a hidden one.
    sent = {"note": "line 1line 2", "expected_note": "line 1\r\nline 2"}
    await visitor.post("/KEY", secret=VALUE, expected_version="1", **sent)
    assert (await find_secret(datasette, "KEY")).newest.note == "line 1\nline 2"  # type: ignore[union-attr]


async def test_a_form_that_was_too_large_comes_back_with_what_is_stored(
    visitor: Visitor, datasette: Datasette
) -> None:
    stored = {"note": "of Anna", "renew_by": "2031-01-01"}
    await set_secret(datasette, "KEY", "first", note="of Anna", renew_by="2031-01-01")
    refused = await visitor.post("/KEY", secret=VALUE * 300_000, note="x")
    assert refused.status_code == 413
    assert {name: field(refused, name) for name in stored} == stored


async def test_a_master_key_in_a_note_is_refused_and_not_shown(
    visitor: Visitor, datasette: Datasette, master_key: str
) -> None:
    await set_secret(datasette, "KEY", "first", note="before")
    for path, secret in (("/KEY", ""), ("/KEY", VALUE), ("/KEY/-/set", VALUE)):
        answer = await visitor.post(path, secret=secret, note=f"key {master_key}")
        assert answer.status_code == 400
        assert "The note contains a master key" in answer.text
        assert (master_key in answer.text) is False
    assert 'value="before"' in (await visitor.get("/KEY")).text


async def test_a_master_key_as_a_name_is_refused_and_not_shown(
    make_datasette: MakeDatasette,
) -> None:
    key = base64.urlsafe_b64encode(b"\0" * 32).decode()
    name = key.rstrip("=")
    visitor = Visitor(make_datasette(key))
    for fields, said in (
        ({"name": name, "secret": VALUE}, "The name contains a master key"),
        ({"name": name, "secret": "a\0b"}, "The value cannot be stored"),
        ({"name": "A", "secret": VALUE, "renew_by": key}, "A date must be valid"),
    ):
        answer = await visitor.post("/-/add", **fields)
        assert answer.status_code == 400
        assert said in answer.text
        assert (name in answer.text) is False


async def test_a_variable_that_overrides_is_said_and_its_value_is_not(
    visitor: Visitor, datasette: Datasette, monkeypatch: Any
) -> None:
    await set_secret(datasette, "KEY", "stored")
    monkeypatch.setenv("DATASETTE_SECRETS_KEY", VALUE)
    page = await visitor.get("/KEY")
    assert "<code>DATASETTE_SECRETS_KEY</code> is set on this server" in page.text
    assert "The stored value is used once the variable is unset" in page.text
    assert (VALUE in page.text) is False
    await delete_secret(datasette, "KEY")
    page = await visitor.get("/KEY")
    assert "A value stored here is not used until the variable is unset" in page.text
    assert "Plugins see it as unset" not in page.text


async def test_a_value_stored_under_a_variable_warns_that_it_is_not_read(
    visitor: Visitor, datasette: Datasette, monkeypatch: Any
) -> None:
    monkeypatch.setenv("DATASETTE_SECRETS_KEY", "of the environment")
    warning = (
        "Stored, but plugins still read the environment variable DATASETTE_SECRETS_KEY."
    )
    added = await visitor.post("/-/add", name="KEY", secret=VALUE)
    assert await visitor.messages(added) == ["Secret KEY added", warning]
    saved = await visitor.post("/KEY", secret=VALUE)
    assert await visitor.messages(saved) == ["Secret KEY updated", warning]


async def test_a_refused_form_keeps_what_was_typed_but_the_value(
    visitor: Visitor, datasette: Datasette
) -> None:
    added = await visitor.post("/-/add", name="NEW", secret="", note="mine")
    assert (field(added, "name"), field(added, "note")) == ("NEW", "mine")
    await set_secret(datasette, "KEY", "first", note="stored")
    late = await visitor.post(
        "/KEY", secret=VALUE, note="typed", expected_version="0", expected_note="stored"
    )
    assert (late.status_code, field(late, "note")) == (409, "typed")
    assert (VALUE in late.text) is False
    pasted = await visitor.post("/-/add", name="", secret=VALUE, note=f"it is {VALUE}")
    assert pasted.status_code == 400
    assert (VALUE in pasted.text) is False


async def test_two_tabs_that_change_only_the_note_conflict(
    visitor: Visitor, datasette: Datasette
) -> None:
    await set_secret(datasette, "KEY", VALUE, note="before")
    form = {"secret": "", "expected_version": "1", "expected_note": "before"}
    first = await visitor.post("/KEY", note="of the first tab", **form)
    assert first.status_code == 302
    second = await visitor.post("/KEY", note="of the second tab", **form)
    assert second.status_code == 409
    assert "root changed the note or the date of KEY at" in second.text
    assert "Stored note: “of the first tab”" in second.text
    assert field(second, "note") == "of the second tab"
    assert field(second, "expected_note") == "of the first tab"
    form["expected_note"] = "of the first tab"
    again = await visitor.post("/KEY", note="of the second tab", **form)
    assert await visitor.messages(again) == ["Note of KEY updated"]


# Adding one that nobody registered.


async def test_a_name_that_differs_only_in_case_asks_first(
    visitor: Visitor, datasette: Datasette
) -> None:
    await set_secret(datasette, "OPENAI_API_KEY", VALUE)
    form = {"name": "openai_api_key", "secret": VALUE}
    question = await visitor.post("/-/add", **form)
    assert question.status_code == 409
    assert "OPENAI_API_KEY already exists" in question.text
    assert 'name="allow_twin"' in question.text
    assert field(question, "name") == "openai_api_key"
    assert await get_secret(datasette, "openai_api_key") is None
    added = await visitor.post("/-/add", **form, allow_twin="1")
    assert await visitor.messages(added) == ["Secret openai_api_key added"]
    assert await get_secret(datasette, "openai_api_key") == VALUE


async def test_a_secret_is_added_by_name(
    visitor: Visitor, datasette: Datasette
) -> None:
    added = await visitor.post("/-/add", name=" NEW_KEY ", secret=VALUE, note="mine")
    assert (added.status_code, added.headers["location"]) == (302, "/-/secrets")
    assert await visitor.messages(added) == ["Secret NEW_KEY added"]
    assert await get_secret(datasette, "NEW_KEY") == VALUE
    assert rows(await visitor.get())["NEW_KEY"] == "stored"


@pytest.mark.parametrize("kept", ["stored", "deleted"])
async def test_adding_never_replaces_what_is_there(
    visitor: Visitor, datasette: Datasette, kept: str
) -> None:
    await set_secret(datasette, "KEY", "there")
    if kept == "deleted":
        await delete_secret(datasette, "KEY")
    answer = await visitor.post("/-/add", name="KEY", secret=VALUE)
    assert answer.status_code == 409
    assert "KEY is already stored" in answer.text
    assert (VALUE in answer.text) is False
    assert rows(await visitor.get())["KEY"] == kept


async def test_a_value_pasted_as_the_name_is_not_sent_back(visitor: Visitor) -> None:
    answer = await visitor.post("/-/add", name=VALUE, secret="x")
    assert answer.status_code == 400
    assert (VALUE in answer.text) is False


# Actions.


ACTIONS: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "delete": ({}, "Secret KEY deleted", None),
    "rollback": (
        {"version": "1"},
        "Secret KEY rolled back to version 1, as version 3",
        "one",
    ),
    "destroy": ({"version": ["1", "2"]}, "Versions 1 and 2 of KEY destroyed", None),
}


@pytest.mark.parametrize("action", ACTIONS)
async def test_an_action_is_confirmed_done_and_said(
    visitor: Visitor, datasette: Datasette, action: str
) -> None:
    fields, message, value = ACTIONS[action]
    for each in ("one", "two"):
        await set_secret(datasette, "KEY", each)
    question = await visitor.get(f"/KEY/-/{action}?version=1")
    assert question.status_code == 200
    assert f'action="/-/secrets/KEY/-/{action}" method="post"' in question.text
    assert await get_secret(datasette, "KEY") == "two"
    done = await visitor.post(f"/KEY/-/{action}", **fields)
    assert (done.status_code, done.headers["location"]) == (302, "/-/secrets/KEY")
    assert await visitor.messages(done) == [message]
    assert await get_secret(datasette, "KEY") == value


async def test_what_cannot_be_restored_or_deleted_again_is_not_promised(
    visitor: Visitor, datasette: Datasette
) -> None:
    await set_secret(datasette, "KEY", VALUE)
    page = await visitor.get("/KEY/-/restore")
    assert "nothing to restore: KEY is not deleted" in page.text
    assert 'type="submit"' not in page.text.partition('class="secrets-what"')[2]
    await delete_secret(datasette, "KEY")
    assert "KEY is already deleted" in (await visitor.get("/KEY/-/delete")).text
    await destroy_versions(datasette, "KEY", [1])
    page = await visitor.get("/KEY/-/restore")
    assert "nothing to restore: the value of version 1 was destroyed" in page.text
    for action, why in {
        "delete": "nothing to delete: the value of version 1 was destroyed",
        "destroy": "All versions of KEY are already destroyed",
    }.items():
        page = (await visitor.get(f"/KEY/-/{action}")).text
        assert why in page and "core secrets-form" not in page
        assert "You can restore it" not in page


async def test_the_questions_say_what_plugins_will_get(
    visitor: Visitor, datasette: Datasette, monkeypatch: Any
) -> None:
    for value in ("one", "two"):
        await set_secret(datasette, "KEY", value)

    async def asks(action: str) -> str:
        return str((await visitor.get(f"/KEY/-/{action}?version=1")).text)

    assert "use it instead of version 2" in await asks("rollback")
    await delete_secret(datasette, "KEY")
    assert "KEY is deleted now. Plugins will use the new version" in await asks(
        "rollback"
    )
    assert ">Current<" not in await asks("destroy")
    await set_secret(datasette, "KEY", "three")
    page = (await visitor.get("/KEY/-/rollback?version=2")).text
    assert "Version 2 was deleted" in page and "instead of version 3" in page
    monkeypatch.setenv("DATASETTE_SECRETS_KEY", VALUE)
    for action in ("rollback", "destroy", "delete"):
        page = await asks(action)
        assert "Plugins will still read the environment variable" in page
        assert "instead of version" not in page and "as unset" not in page
    monkeypatch.delenv("DATASETTE_SECRETS_KEY")
    await destroy_versions(datasette, "KEY", [3])
    assert "KEY is destroyed now." in await asks("rollback")


async def test_saving_neither_a_value_nor_another_note_changes_nothing(
    visitor: Visitor, datasette: Datasette, internal: str
) -> None:
    await set_secret(datasette, "KEY", VALUE, note="a note", actor_id="ann")
    done = await visitor.post("/KEY", secret="  ", note="a note", expected_version="1")
    assert await visitor.messages(done) == [
        "Nothing to save: enter a value, or change the note or the date"
    ]
    listed = await find_secret(datasette, "KEY")
    assert listed is not None
    assert listed.newest is not None
    assert (listed.newest.version, listed.newest.updated_by) == (1, "ann")


async def test_a_deleted_secret_is_restored(
    visitor: Visitor, datasette: Datasette
) -> None:
    await set_secret(datasette, "KEY", VALUE)
    await delete_secret(datasette, "KEY", actor_id="ada")
    assert "Restore KEY?" in (await visitor.get("/KEY/-/restore")).text
    done = await visitor.post("/KEY/-/restore", expected_version="1")
    assert await visitor.messages(done) == ["Secret KEY restored"]
    assert await get_secret(datasette, "KEY") == VALUE


async def test_an_action_on_what_has_changed_since_is_refused(
    visitor: Visitor, datasette: Datasette
) -> None:
    for each in ("one", "two", "three"):
        await set_secret(datasette, "KEY", each)
    for action in ("delete", "restore", "rollback"):
        late = await visitor.post(f"/KEY/-/{action}", version="1", expected_version="2")
        assert late.status_code == 409
        assert "saved version 3 of KEY" in late.text
    assert await get_secret(datasette, "KEY") == "three"


async def test_nothing_is_selected_to_be_destroyed_until_somebody_selects_it(
    visitor: Visitor, datasette: Datasette
) -> None:
    for each in ("one", "two", "three"):
        await set_secret(datasette, "KEY", each, note=f"the {each}", actor_id="ann")
    await get_secret(datasette, "KEY", "bob")

    def ticked(page: Any) -> list[str]:
        return re.findall(r'name="version" value="(\d+)"[^>]* checked', page.text)

    question = await visitor.get("/KEY/-/destroy")
    assert ticked(question) == []
    [row] = re.findall(r'value="3".*?</label>', question.text, re.S)
    assert "the three" in row and "Last used" in row and ">bob<" in row
    assert 'href="/-/secrets/KEY/-/destroy?old=1"' in question.text
    assert ticked(await visitor.get("/KEY/-/destroy?old=1")) == ["2", "1"]
    refused = await visitor.post("/KEY/-/destroy", version=["1", "7"])
    assert (refused.status_code, ticked(refused)) == (400, ["1"])


async def test_an_action_with_nothing_chosen_asks_again(
    visitor: Visitor, datasette: Datasette
) -> None:
    await set_secret(datasette, "KEY", VALUE)
    answer = await visitor.post("/KEY/-/destroy")
    assert answer.status_code == 400
    assert "Select at least one version" in answer.text
    assert 'name="version" value="1"' in answer.text


async def test_a_message_about_many_versions_is_a_cookie_that_browsers_keep(
    visitor: Visitor, datasette: Datasette, internal: str
) -> None:
    await set_secret(datasette, "KEY", VALUE)
    with sqlite3.connect(internal) as conn:
        conn.execute(
            """insert into datasette_secrets (name, version, encrypted,
            encryption_key_name, wrapped_key, envelope_version)
            with recursive n(i) as (select 2 union all select i + 1 from n limit 1498)
            select name, i, encrypted, encryption_key_name, wrapped_key, 1
            from n, datasette_secrets"""
        )
    conn.close()
    done = await visitor.post("/KEY/-/destroy", version=[*range(1, 1500)])
    assert len(done.headers["set-cookie"]) < 4096
    assert await visitor.messages(done) == ["1,499 versions of KEY destroyed"]


async def test_a_secret_without_any_value_offers_only_what_can_be_done(
    visitor: Visitor, datasette: Datasette
) -> None:
    for value in ("one", "two"):
        await set_secret(datasette, "KEY", value)
    await destroy_versions(datasette, "KEY", [2])
    page = (await visitor.get("/KEY")).text
    assert "or roll back to an earlier version" in page and ">Danger zone<" in page
    await destroy_versions(datasette, "KEY", [1])
    page = (await visitor.get("/KEY")).text
    assert "roll back" not in page and ">Danger zone<" not in page
    assert "keep the value" not in page
    assert "Leave blank to change only the note" in page


async def test_what_a_plugin_waits_for_waits_again_when_it_is_destroyed(
    visitor: Visitor, datasette: Datasette
) -> None:
    secrets = [Secret("SET"), Secret("DELETED"), Secret("DESTROYED"), Secret("NEVER")]
    for secret in secrets[:3]:
        await set_secret(datasette, secret.name, VALUE)
    await delete_secret(datasette, "DELETED")
    await destroy_versions(datasette, "DESTROYED", [1])
    with plugin(register_secrets=lambda: secrets):
        page = await visitor.get()
    assert sections(page) == {
        "Waiting to be set": ["DESTROYED", "NEVER"],
        "Secrets": ["SET"],
        "Deleted and destroyed: 1 secret": ["DELETED"],
    }


async def test_the_example_is_said_to_be_used_by_nothing(
    visitor: Visitor, datasette: Datasette
) -> None:
    said = "No plugin uses it. It is here to try, until a plugin registers a secret"
    for path in ("", "/EXAMPLE_SECRET"):
        assert said in (await visitor.get(path)).text
    with plugin(register_secrets=lambda: [Secret("EXAMPLE_SECRET", "Mine")]):
        assert said not in (await visitor.get()).text


async def test_a_use_of_an_earlier_version_still_is_the_last_use_of_the_secret(
    visitor: Visitor, datasette: Datasette
) -> None:
    await set_secret(datasette, "KEY", "one")
    await get_secret(datasette, "KEY", "ada")
    await set_secret(datasette, "KEY", "two")
    for path in ("", "/KEY"):
        page = (await visitor.get(path)).text
        part = page.partition('id="secrets-history"')[0]
        assert re.findall(r'secrets-who">([^<]*)<', part) == ["ada"]
    newest, first = re.findall(r"data-version=.*?</tr>", page, re.S)
    assert "never" in newest and "ada" in first
    shown = (await visitor.get("/KEY.json")).json()
    assert shown["secret"]["last_used_by"] == "ada"
    assert [each["last_used_by"] for each in shown["versions"]] == [None, "ada"]


async def test_rolling_back_says_which_note_is_kept(
    visitor: Visitor, datasette: Datasette
) -> None:
    await set_secret(datasette, "KEY", "one", note="the <first>", renew_by="2031-01-01")
    await delete_secret(datasette, "KEY")
    await set_secret(datasette, "KEY", "two", note="the second", renew_by="2032-02-02")
    [link] = re.findall(
        r'href="/-/secrets([^"]*rollback[^"]*)"', (await visitor.get("/KEY")).text
    )
    question = (await visitor.get(link)).text
    assert "note of version 1: “the &lt;first&gt;”" in question
    assert "The new version has no renewal date" in question
    await visitor.post("/KEY/-/rollback", version="1", expected_version="2")
    newest = (await find_secret(datasette, "KEY")).newest  # type: ignore[union-attr]
    assert (newest.note, newest.renew_by) == ("the <first>", None)  # type: ignore[union-attr]
    assert await get_secret(datasette, "KEY") == "one"


async def test_the_history_shows_a_note_wherever_it_changes(
    visitor: Visitor, datasette: Datasette
) -> None:
    for note in ("a", "b", "b", "b", "b", "c"):
        await set_secret(datasette, "KEY", VALUE, note=note)
    page = (await visitor.get("/KEY")).text
    shown = {
        int(version): re.findall(r'secrets-note">([^<]*)<', row)
        for version, row in re.findall(r'data-version="(\d)"(.*?)</tr>', page, re.S)
    }
    assert shown == {6: ["c"], 5: ["b"], 4: [], 3: [], 2: ["b"], 1: ["a"]}


@pytest.mark.parametrize("version", [2**53, 2**53 + 1, 2**63 - 1, -5])
async def test_a_number_that_was_planted_is_removed_before_the_form_saves(
    visitor: Visitor, datasette: Datasette, internal: str, version: int
) -> None:
    await set_secret(datasette, "KEY", "one")
    with sqlite3.connect(internal) as conn:
        conn.execute("update datasette_secrets set version = ?", [version])
    conn.close()
    assert (await visitor.get("/KEY")).status_code == 200
    refused = await visitor.post("/KEY", secret="two")
    assert refused.status_code == 503
    # Where the whole table was checked at the start, `verify` prints that command.
    ways_out = ("datasette secrets destroy-row 1", "datasette secrets verify")
    assert any(each in html.unescape(refused.text) for each in ways_out)
    await destroy_row(datasette, 1)
    assert await set_secret(datasette, "KEY", "two") == 1
    assert await get_secret(datasette, "KEY") == "two"


async def test_the_history_names_versions_people_and_keys(
    visitor: Visitor, datasette: Datasette
) -> None:
    await set_secret(datasette, "KEY", "one", actor_id="ada", note="first")
    await set_secret(datasette, "KEY", "two", actor_id="bob", note="second")
    await destroy_versions(datasette, "KEY", [1])
    page = await visitor.get("/KEY")
    shown = re.findall(r'data-version="(\d+)" data-state="([^"]*)"', page.text)
    assert shown == [("2", "stored"), ("1", "destroyed")]
    assert {"ada", "bob"} <= set(re.findall(r'secrets-who">([^<]*)<', page.text))
    assert "rollback?version=1" not in page.text


async def test_a_long_history_is_paged(visitor: Visitor, datasette: Datasette) -> None:
    for _ in range(120):
        await set_secret(datasette, "KEY", VALUE)
    first = await visitor.get("/KEY")
    last = await visitor.get("/KEY?_start=100")
    pages = [re.findall(r'data-version="(\d+)"', page.text) for page in (first, last)]
    assert [*map(int, pages[0] + pages[1])] == list(range(120, 0, -1))
    assert "?_start=100" in first.text and "?_start=0" in last.text


# Encryption.


async def test_older_keys_are_shown_and_re_wrapped(
    make_datasette: MakeDatasette, master_key: str
) -> None:
    before = make_datasette(master_key)
    await before.invoke_startup()
    await set_secret(before, "KEY", VALUE)
    visitor = Visitor(make_datasette(generate_master_key(), master_key))
    await visitor.datasette.invoke_startup()
    assert "/-/secrets/-/rotate" in (await visitor.get()).text
    question = await visitor.get("/-/rotate")
    assert "1 version will change" in question.text and "KEY" in question.text
    done = await visitor.post("/-/rotate")
    [message] = await visitor.messages(done)
    assert message.startswith("1 version re-encrypted with master key ")
    assert message.endswith("keep a copy for backups and empty its file or entry")
    after = (await visitor.get()).text
    assert "keep a copy of the older key for backups and empty its file" in after
    assert "Not used" in after and "/-/secrets/-/rotate" not in after
    assert await get_secret(visitor.datasette, "KEY") == VALUE


async def test_rows_of_0x_are_upgraded(
    visitor: Visitor, datasette: Datasette, master_key: str, internal: str
) -> None:
    await set_secret(datasette, "OTHER", VALUE)
    plant(internal, "OLD", master_key)
    assert "1 version stored by datasette-secrets 0.x" in (await visitor.get()).text
    question = await visitor.get("/-/upgrade")
    assert "OLD" in question.text and "OTHER" not in question.text
    done = await visitor.post("/-/upgrade")
    assert await visitor.messages(done) == ["1 version upgraded"]
    assert await get_secret(datasette, "OLD") == VALUE
    assert "Nothing to do." in (await visitor.get("/-/upgrade")).text


async def test_rotating_is_not_offered_where_only_a_missing_key_can_decrypt(
    make_datasette: MakeDatasette, master_key: str
) -> None:
    lost = make_datasette(generate_master_key())
    await lost.invoke_startup()
    await set_secret(lost, "KEY", VALUE)
    visitor = Visitor(make_datasette(master_key))
    await visitor.datasette.invoke_startup()
    page = await visitor.get()
    assert "/-/secrets/-/rotate" not in page.text
    assert "cannot be rotated, because its master key is not configured" in page.text


async def test_a_row_whose_key_is_missing_says_which_and_what_to_do(
    make_datasette: MakeDatasette, master_key: str
) -> None:
    lost = make_datasette(generate_master_key())
    await lost.invoke_startup()
    await set_secret(lost, "KEY", VALUE)
    visitor = Visitor(make_datasette(master_key))
    await visitor.datasette.invoke_startup()
    page = await visitor.get()
    key_id = re.findall(r'data-key="([0-9a-f]{16})"', page.text)[-1]
    assert f"needs master key {key_id}, which is not configured: add it to" in page.text
    refused = await visitor.post("/-/rotate")
    assert refused.status_code == 409
    assert "Nothing was changed" in refused.text


async def test_more_versions_than_a_page_can_do_are_left_to_the_shell(
    make_datasette: MakeDatasette, master_key: str, internal: str
) -> None:
    before = make_datasette(master_key)
    await before.invoke_startup()
    await set_secret(before, "KEY", VALUE)
    with sqlite3.connect(internal) as conn:
        conn.execute(
            """insert into datasette_secrets (name, version, encrypted,
            encryption_key_name, wrapped_key, envelope_version)
            with recursive n(i) as (select 1 union all select i + 1 from n limit 10000)
            select 'KEY_' || i, 1, encrypted, encryption_key_name, wrapped_key, 1
            from n, datasette_secrets"""
        )
    conn.close()
    visitor = Visitor(make_datasette(generate_master_key(), master_key))
    await visitor.datasette.invoke_startup()
    page = await visitor.get("/-/rotate")
    assert "<code>datasette secrets rotate-key</code>" in page.text
    assert "<form" not in re.findall(r"<main.*</main>", page.text, re.S)[0]
    refused = await visitor.post("/-/rotate")
    assert refused.status_code == 400
    assert "datasette secrets rotate-key" in refused.text


# When something is missing.


async def test_without_a_key_the_pages_say_how_to_make_one(
    make_datasette: MakeDatasette,
) -> None:
    visitor = Visitor(make_datasette())
    await visitor.datasette.invoke_startup()
    for path in ("", "/EXAMPLE_SECRET", "/-/add"):
        page = await visitor.get(path)
        assert page.status_code == 200
        assert "datasette secrets generate-encryption-key" in page.text
        notice = re.findall(r'secrets-notice".*?</section>', page.text, re.S)[0]
        commands = re.findall(r"<pre.*?<code>(.*?)</code>", notice, re.S)
        readme = read("README.md")
        assert [html.unescape(each) in readme for each in commands] == [True] * 3
        assert "<textarea" not in page.text
    refused = await visitor.post("/EXAMPLE_SECRET", secret=VALUE)
    assert refused.status_code == 400
    assert (VALUE in refused.text) is False


async def test_without_the_key_of_what_is_stored_the_pages_ask_for_that_key(
    make_datasette: MakeDatasette, master_key: str
) -> None:
    before = make_datasette(master_key)
    await before.invoke_startup()
    await set_secret(before, "KEY", VALUE)
    [key_id] = re.findall(
        r'data-key="([0-9a-f]{16})"', (await Visitor(before).get()).text
    )
    visitor = Visitor(make_datasette())
    await visitor.datasette.invoke_startup()
    for path in ("", "/KEY", "/-/add"):
        page = (await visitor.get(path)).text
        notice = re.findall(r'secrets-notice".*?</section>', page, re.S)[0]
        assert "1 version is already stored, and needs master key" in notice
        assert key_id in notice and "Configure that key" in notice
        assert "generate-encryption-key" not in notice
        assert "use the primary key" not in page


async def test_an_unset_variable_is_named(make_datasette: MakeDatasette) -> None:
    visitor = Visitor(make_datasette({"$env": "MY_MASTER_KEY"}))
    await visitor.datasette.invoke_startup()
    assert "MY_MASTER_KEY" in (await visitor.get()).text


async def test_a_temporary_database_is_warned_of(
    make_datasette: MakeDatasette, master_key: str
) -> None:
    visitor = Visitor(make_datasette(master_key, internal=None))
    await visitor.datasette.invoke_startup()
    for path in ("", "/-/add", "/EXAMPLE_SECRET"):
        assert "is temporary" in (await visitor.get(path)).text


async def test_the_keys_fold_to_one_line_while_one_protects_everything(
    make_datasette: MakeDatasette, master_key: str
) -> None:
    visitor = Visitor(make_datasette(master_key))
    await visitor.datasette.invoke_startup()
    await set_secret(visitor.datasette, "KEY", VALUE)
    assert "One master key protects everything" in (await visitor.get()).text
    visitor = Visitor(make_datasette(generate_master_key(), master_key))
    await visitor.datasette.invoke_startup()
    assert "One master key protects everything" not in (await visitor.get()).text


async def test_a_visitor_who_is_not_signed_in_is_told_how_to(
    visitor: Visitor,
) -> None:
    visitor.cookies = {}
    page = await visitor.get("/KEY")
    assert page.status_code == 403
    assert "You are not signed in" in page.text and "--root" in page.text
    assert "not signed in" not in (await visitor.get(".json")).text


async def test_an_immutable_database_is_shown_and_offers_no_change(
    make_datasette: MakeDatasette, master_key: str, tmp_path: Path
) -> None:
    path = str(tmp_path / "data.db")
    sqlite3.connect(path).execute("vacuum").connection.close()
    writable = make_datasette(master_key, database="data", files=[path])
    await writable.invoke_startup()
    await set_secret(writable, "KEY", VALUE)
    writable.close()
    visitor = Visitor(make_datasette(master_key, database="data", immutables=[path]))
    await visitor.datasette.invoke_startup()
    page = await visitor.get()
    assert rows(page)["KEY"] == "stored" and "is immutable" in page.text
    assert "can download the database" in page.text
    assert "<textarea" not in (await visitor.get("/KEY")).text
    assert (await visitor.post("/KEY", secret="x")).status_code == 503


async def test_rows_that_are_damaged_are_shown_all_the_same(
    visitor: Visitor, datasette: Datasette, internal: str
) -> None:
    with sqlite3.connect(internal) as conn:
        conn.executemany(
            "insert into datasette_secrets (name, version, encrypted, wrapped_key, "
            "encryption_key_name, note, updated_at, envelope_version) "
            "values (?, ?, ?, ?, ?, ?, ?, 1)",
            [
                ("TEXT", "one", b"x", b"y", "not a key", 5, "yesterday"),
                ("BYTES", b"\xff", "text", "text", b"\xff", b"\xff", b"\xff"),
                (b"\xff\xfe", 1, b"x", b"y", "0" * 16, None, None),
                ("NEGATIVE", -5, b"", b"", "", "", "2001-01-01"),
            ],
        )
    conn.close()
    assert {"TEXT", "BYTES", "NEGATIVE"} <= set(rows(await visitor.get()))
    for name in ("TEXT", "BYTES", "NEGATIVE"):
        assert (await visitor.get(f"/{name}")).status_code == 200
        assert (await visitor.get(f"/{name}/-/destroy")).status_code == 200
        assert (await visitor.get(f"/{name}.json")).status_code == 200
    assert (await visitor.get(".json")).status_code == 200
    refused = await visitor.get("/-/rotate")
    assert refused.status_code == 503
    assert "datasette secrets destroy-row" in refused.text
    assert (await visitor.post("/TEXT/-/destroy", version="one")).status_code == 400


async def test_an_unexpected_failure_shows_nothing_of_itself(
    visitor: Visitor, capfd: pytest.CaptureFixture[str]
) -> None:
    def register_secrets() -> list[Secret]:
        raise ValueError(VALUE)

    with plugin(register_secrets=register_secrets):
        page = await visitor.get()
        body = await visitor.get(".json")
    assert (page.status_code, body.status_code) == (500, 500)
    assert body.json()["error"] == "Something went wrong. See the server's log"
    written = "".join(capfd.readouterr())
    assert (
        "datasette-secrets: unexpected ValueError while answering a request" in written
    )
    for text in (page.text, body.text, written):
        assert (VALUE in text) is False


# Whatever the page.


@pytest.fixture
async def under_a_path(make_datasette: MakeDatasette, master_key: str) -> Visitor:
    datasette = make_datasette(master_key, settings={"base_url": "/prefix/"})
    await datasette.invoke_startup()
    return Visitor(datasette)


async def test_every_link_is_under_the_base_url(under_a_path: Visitor) -> None:
    visitor = under_a_path
    await set_secret(visitor.datasette, "KEY", "one")
    await set_secret(visitor.datasette, "KEY", VALUE)
    for path in ("", "/KEY", "/KEY/-/delete", "/KEY/-/destroy", "/-/add", "/-/rotate"):
        page = await visitor.get(path)
        main = re.findall(r'<p class="crumbs".*</main>', page.text, re.S)[0]
        for link in re.findall(r'(?:href|action)="([^"]*)"', main):
            assert link.startswith("/prefix/"), (path, link)
    saved = await visitor.post("/KEY", secret="x")
    assert saved.headers["location"] == "/prefix/-/secrets"
    deleted = await visitor.post("/KEY/-/delete")
    assert deleted.headers["location"] == "/prefix/-/secrets/KEY"


async def test_script_and_style_are_files_and_are_loaded_here_alone(
    visitor: Visitor, datasette: Datasette
) -> None:
    page = await visitor.get()
    main = re.findall(r"<main.*</main>", page.text, re.S)[0]
    assert "<script" not in main and "<style" not in main
    assert not re.search(r"\s(?:style|on[a-z]+)=", main)
    for file in re.findall(r'"(/-/static-plugins/[^"]*)"', page.text):
        assert (await datasette.client.get(file)).status_code == 200
    assert len(re.findall(r"/-/static-plugins/", page.text)) == 2
    home = await datasette.client.get("/", cookies=visitor.cookies)
    assert "secrets.css" not in home.text


@pytest.mark.parametrize("setting", ["template_debug", "trace_debug"])
async def test_debug_output_holds_no_value(
    make_datasette: MakeDatasette, master_key: str, setting: str, monkeypatch: Any
) -> None:
    monkeypatch.setenv("DATASETTE_SECRETS_EXAMPLE_SECRET", VALUE)
    datasette = make_datasette(master_key, settings={setting: True})
    await datasette.invoke_startup()
    visitor = Visitor(datasette)
    for query in ("?_trace=1", "?_context=1"):
        stored = await visitor.post(f"/KEY/-/set{query}", value=VALUE)
        late = await visitor.post(f"/KEY{query}", secret=VALUE, expected_version="0")
        shown = [
            await visitor.get(path + query)
            for path in ("", "/KEY", "/EXAMPLE_SECRET", "/KEY/-/rollback", ".json")
        ]
        for answer in (stored, late, *shown):
            assert (VALUE in answer.text) is False
            assert (master_key in answer.text) is False


async def test_a_form_from_another_site_is_refused(
    visitor: Visitor, datasette: Datasette
) -> None:
    for headers, status in (
        ({"Sec-Fetch-Site": "cross-site", "Origin": "https://evil.example"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 302),
        ({}, 302),
    ):
        answer = await datasette.client.post(
            "/-/secrets/EXAMPLE_SECRET",
            data={"secret": VALUE},
            cookies=visitor.cookies,
            headers=headers,
        )
        assert answer.status_code == status


@pytest.mark.parametrize(
    ("path", "status", "heading", "said"),
    [
        (
            "/NOTHING/-/delete",
            404,
            "Not found",
            "No secret has this name: none is registered, and none is stored.",
        ),
        ("/-/add", 405, "Not done", "This address accepts GET, POST only."),
    ],
)
async def test_a_refusal_is_a_page_with_a_heading(
    visitor: Visitor, path: str, status: int, heading: str, said: str
) -> None:
    allow = "GET, POST" if status == 405 else None
    answer = await visitor.datasette.client.request(
        "PUT" if allow else "GET", f"/-/secrets{path}", cookies=visitor.cookies
    )
    assert (answer.status_code, answer.headers.get("allow")) == (status, allow)
    assert f"<h1>{heading}</h1>" in answer.text
    assert re.findall(r'role="alert">([^<]*)<', answer.text) == [said]


async def test_a_program_is_told_which_methods_there_are(visitor: Visitor) -> None:
    answer = await visitor.datasette.client.put(
        "/-/secrets/-/add",
        cookies=visitor.cookies,
        headers={"accept": "application/json"},
    )
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, POST")
    assert answer.json()["error"] == "This address accepts GET, POST only"


async def test_a_page_that_cannot_be_made_is_a_sentence(
    visitor: Visitor, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    async def broken(*_: Any, **options: Any) -> Any:
        raise ZeroDivisionError(VALUE)

    monkeypatch.setattr(answer_module, "page", broken)
    answer = await visitor.get("/NOTHING/-/delete")
    assert answer.status_code == 404
    assert answer.headers["content-type"].startswith("text/plain")
    assert answer.text.startswith("No secret has this name")
    said = capsys.readouterr().err
    assert "unexpected ZeroDivisionError" in said
    assert (VALUE in said) is False


async def test_a_conflict_with_nobody_in_particular_says_somebody(
    visitor: Visitor, datasette: Datasette
) -> None:
    await set_secret(datasette, "KEY", "first")
    await set_secret(datasette, "KEY", "second")
    answer = await visitor.post("/KEY", secret=VALUE, expected_version="1")
    assert answer.status_code == 409
    assert "Nothing was changed: somebody saved version 2 of KEY at" in answer.text
    assert "while you were editing version 1" in answer.text
    answer = await visitor.post("/KEY", secret=VALUE, expected_version="0")
    assert "while you were editing a new secret" in answer.text


async def test_the_fields_say_how_long_a_name_and_a_note_can_be(
    visitor: Visitor,
) -> None:
    page = (await visitor.get("/-/add")).text
    lengths = re.findall(r'name="(name|note)"[^>]* maxlength="(\d+)"', page)
    assert dict(lengths) == {"name": "128", "note": "100"}
