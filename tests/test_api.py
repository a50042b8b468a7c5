"""The JSON API: what it does, what it refuses, and that it says so in Datasette's way."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeDatasette
from cryptography.fernet import Fernet
from datasette import hookimpl
from datasette.app import Datasette
from datasette.plugins import pm
from datasette.utils import tilde_encode

from datasette_secrets import Secret, get_secret, set_secret
from datasette_secrets.envelope import generate_master_key

VALUE = "sk-live-4f9c0d1e"


@pytest.fixture
def api(datasette: Datasette, admin: dict[str, str]) -> Any:
    """`api(path, sent)`: post JSON as root, or get where nothing is sent."""

    async def call(path: str, sent: Any = None, **options: Any) -> Any:
        path = "/-/secrets" + path
        if sent is None and not options:
            return await datasette.client.get(path, cookies=admin)
        if sent is not None:
            options["json"] = sent
        return await datasette.client.post(path, cookies=admin, **options)

    return call


def assert_refused(answer: Any, status: int) -> None:
    """An error in Datasette's form, without the value, and not to be cached."""
    body = answer.json()
    assert (answer.status_code, body["ok"], body["status"]) == (status, False, status)
    assert body["error"] == "; ".join(body["errors"]) != ""
    assert VALUE not in answer.text
    assert answer.headers["cache-control"].endswith("no-store")


# What it does.


async def test_a_secret_is_set_listed_and_shown_without_its_value(
    api: Any, datasette: Datasette
) -> None:
    set_ = await api("/OPENAI_API_KEY/-/set", {"value": VALUE, "note": "team"})
    assert set_.json() == {"ok": True, "name": "OPENAI_API_KEY", "version": 1}
    assert await get_secret(datasette, "OPENAI_API_KEY", "sam") == VALUE

    listed = await api(".json")
    shown = await api("/OPENAI_API_KEY.json")
    assert VALUE not in listed.text + shown.text
    [secret] = [
        each for each in listed.json()["secrets"] if each["name"] != "EXAMPLE_SECRET"
    ]
    assert secret == shown.json()["secret"]
    key_id = listed.json()["keys"][0]["id"]
    assert {
        key: secret[key] for key in ("name", "state", "version", "note", "key_id")
    } == {
        "name": "OPENAI_API_KEY",
        "state": "stored",
        "version": 1,
        "note": "team",
        "key_id": key_id,
    }
    assert (secret["updated_by"], secret["last_used_by"]) == ("root", "sam")
    assert listed.json()["keys"] == [
        {
            "id": key_id,
            "primary": True,
            "configured": True,
            "removable": False,
            "versions": 1,
        }
    ]
    assert listed.json()["next"] is None
    [version] = shown.json()["versions"]
    assert (version["version"], version["state"]) == (1, "stored")


async def test_a_value_sent_as_json_is_stored_to_the_letter(
    api: Any, datasette: Datasette
) -> None:
    value = " \r\n two\nlines\t \n"
    await api("/KEY/-/set", {"value": value})
    assert (await get_secret(datasette, "KEY") == value) is True


async def test_a_note_alone_changes_no_version(api: Any, datasette: Datasette) -> None:
    await api("/KEY/-/set", {"value": VALUE, "note": "before"})
    changed = await api("/KEY/-/set", {"note": "after", "expected_version": 1})
    assert changed.json() == {"ok": True, "name": "KEY", "version": 1}
    assert (await api("/KEY.json")).json()["secret"]["note"] == "after"
    assert await get_secret(datasette, "KEY") == VALUE


async def test_delete_restore_roll_back_and_destroy(
    api: Any, datasette: Datasette
) -> None:
    for value in ("one", "two"):
        await api("/KEY/-/set", {"value": value})
    assert (await api("/KEY/-/delete", {})).json()["version"] == 2
    assert await get_secret(datasette, "KEY") is None
    assert (await api("/KEY/-/restore", {})).json()["version"] == 2
    assert await get_secret(datasette, "KEY") == "two"
    rolled = await api("/KEY/-/rollback", {"version": 1, "expected_version": 2})
    assert rolled.json() == {"ok": True, "name": "KEY", "version": 3}
    assert await get_secret(datasette, "KEY") == "one"
    destroyed = (await api("/KEY/-/destroy", {"versions": [1, 2]})).json()
    assert (destroyed["versions"], destroyed["destroyed"]) == ([1, 2], 2)
    assert destroyed["remains"] is None
    assert (await api("/KEY/-/destroy", {"version": 3})).json()["destroyed"] == 1
    assert await get_secret(datasette, "KEY") is None
    states = [each["state"] for each in (await api("/KEY.json")).json()["versions"]]
    assert states == ["destroyed"] * 3


@pytest.mark.parametrize(
    ("content_type", "content"),
    [
        ("application/json; charset=utf-8", b'{"value": "caf\xc3\xa9"}'),
        ("APPLICATION/JSON", b'{"value": "caf\\u00e9"}'),
        ("application/x-www-form-urlencoded", b"value=caf%C3%A9%0D%0A"),
        ("application/x-www-form-urlencoded; charset=UTF-8", b"secret=+caf%C3%A9"),
    ],
    ids=["JSON", "JSON in capitals", "form", "form with a charset"],
)
async def test_every_kind_of_body_is_understood(
    api: Any, datasette: Datasette, content_type: str, content: bytes
) -> None:
    headers = {"content-type": content_type, "accept": "application/json"}
    answer = await api("/KEY/-/set", content=content, headers=headers)
    assert answer.json() == {"ok": True, "name": "KEY", "version": 1}
    assert await get_secret(datasette, "KEY") == "café"


async def test_an_action_that_needs_nothing_takes_an_empty_body(
    api: Any, admin: dict[str, str], datasette: Datasette
) -> None:
    await set_secret(datasette, "KEY", VALUE)
    answer = await datasette.client.post(
        "/-/secrets/KEY/-/delete", cookies=admin, headers={"accept": "application/json"}
    )
    assert answer.json() == {"ok": True, "name": "KEY", "version": 1}


async def test_a_program_may_add_as_the_page_does(
    api: Any, datasette: Datasette
) -> None:
    sent = {"name": "KEY", "secret": VALUE}
    assert (await api("/-/add", sent)).json() == {
        "ok": True,
        "name": "KEY",
        "version": 1,
    }
    assert_refused(await api("/-/add", sent), 409)
    assert await get_secret(datasette, "KEY") == VALUE


ODD_NAMES = (
    "a/b",
    "a b",
    "100%",
    "a.json",
    "a.b",
    "naïve 🔑",
    "~",
    "-",
    "add",
    "..",
    "a~b",
)


class OddNames:
    @hookimpl
    def register_secrets(self) -> list[Secret]:
        return [Secret(name) for name in ODD_NAMES]


@pytest.fixture
async def odd_names() -> AsyncIterator[None]:
    pm.register(OddNames(), name="odd-names")
    yield
    pm.unregister(name="odd-names")


@pytest.mark.usefixtures("odd_names")
async def test_names_of_any_text_have_addresses(
    api: Any, datasette: Datasette, admin: dict[str, str]
) -> None:
    for name in ODD_NAMES:
        path = f"/{tilde_encode(name)}"
        assert (await api(f"{path}/-/set", {"value": VALUE})).json()["name"] == name
        assert (await api(f"{path}.json")).json()["secret"]["name"] == name
        assert (await api(path)).status_code == 200
        assert await get_secret(datasette, name) == VALUE
    listed = (await api(".json")).json()["secrets"]
    assert sorted(each["name"] for each in listed) == sorted(ODD_NAMES)
    page = await api("")
    for name in ODD_NAMES:
        assert f'href="/-/secrets/{tilde_encode(name)}"' in page.text
    percent_encoded = await datasette.client.get("/-/secrets/a%20b.json", cookies=admin)
    assert percent_encoded.json()["secret"]["name"] == "a b"


async def test_the_list_can_be_paged_and_filtered(
    api: Any, datasette: Datasette
) -> None:
    for number in range(5):
        await set_secret(datasette, f"KEY_{number}", VALUE)
    first = (await api(".json?_size=2&q=key_")).json()
    rest = (await api(f".json?_size=10&q=key_&_next={first['next']}")).json()
    assert [each["name"] for each in first["secrets"]] == ["KEY_0", "KEY_1"]
    assert [each["name"] for each in rest["secrets"]] == ["KEY_2", "KEY_3", "KEY_4"]
    assert rest["next"] is None
    everything = (await api(".json")).json()
    assert len(everything["secrets"]) == 6 and everything["next"] is None


async def test_every_change_is_an_event(api: Any, datasette: Datasette) -> None:
    seen: list[tuple[str, dict[str, Any]]] = []

    class Listener:
        @hookimpl
        def track_event(self, event: Any) -> None:
            if event.name.endswith(("-secret", "-key", "-secrets")):
                seen.append((event.name, {**event.properties(), "actor": event.actor}))

    pm.register(Listener(), name="listener")
    try:
        await api("/KEY/-/set", {"value": VALUE})
        await api("/KEY/-/rollback", {"version": 1})
        await api("/KEY/-/delete", {})
        await api("/KEY/-/delete", {})  # changes nothing, so is none
        await api("/KEY/-/restore", {})
        await api("/KEY/-/destroy", {"versions": [1]})
        await api("/KEY/-/rollback", {"version": 1})  # refused, so is none
    finally:
        pm.unregister(name="listener")
    actor = {"id": "root"}
    assert seen == [
        ("set-secret", {"secret": "KEY", "version": 1, "actor": actor}),
        ("set-secret", {"secret": "KEY", "version": 2, "actor": actor}),
        ("delete-secret", {"secret": "KEY", "version": 2, "actor": actor}),
        ("restore-secret", {"secret": "KEY", "version": 2, "actor": actor}),
        ("destroy-secret", {"secret": "KEY", "versions": [1], "actor": actor}),
    ]
    assert VALUE not in repr(seen)


async def test_the_key_is_rotated_through_the_api(
    make_datasette: MakeDatasette, master_key: str
) -> None:
    before = make_datasette(master_key)
    await before.invoke_startup()
    await set_secret(before, "KEY", VALUE)
    after = make_datasette(generate_master_key(), master_key)
    await after.invoke_startup()
    cookies = {"ds_actor": after.client.actor_cookie({"id": "root"})}
    answer = await after.client.post("/-/secrets/-/rotate", json={}, cookies=cookies)
    body = answer.json()
    assert (body["ok"], body["rewrapped"], body["complete"]) == (True, 1, True)
    listed = (await after.client.get("/-/secrets.json", cookies=cookies)).json()
    assert [(key["primary"], key["removable"]) for key in listed["keys"]] == [
        (True, False),
        (False, True),
    ]
    assert await get_secret(after, "KEY") == VALUE


async def test_nothing_is_rotated_past_a_row_that_cannot_be_decrypted(
    make_datasette: MakeDatasette, master_key: str
) -> None:
    for keys, name in (([generate_master_key()], "LOST"), ([master_key], "KEY")):
        datasette = make_datasette(*keys)
        await datasette.invoke_startup()
        await set_secret(datasette, name, VALUE)
    datasette = make_datasette(generate_master_key(), master_key)
    await datasette.invoke_startup()
    cookies = {"ds_actor": datasette.client.actor_cookie({"id": "root"})}
    refused = await datasette.client.post(
        "/-/secrets/-/rotate", json={}, cookies=cookies
    )
    assert_refused(refused, 409)
    assert "LOST version 1" in refused.json()["error"]
    rest = await datasette.client.post(
        "/-/secrets/-/rotate", json={"skip_unopenable": True}, cookies=cookies
    )
    assert (rest.json()["rewrapped"], rest.json()["complete"]) == (1, False)
    assert [each["name"] for each in rest.json()["problems"]] == ["LOST"]


# What it refuses.


BAD_BODIES: dict[str, tuple[int, dict[str, Any]]] = {
    "not JSON": (400, {"content": b'{"value": "' + VALUE.encode()}),
    "an array": (400, {"json": [VALUE]}),
    "a string": (400, {"json": VALUE}),
    "null": (400, {"content": b"null"}),
    "nothing at all": (400, {"content": b""}),
    "not UTF-8": (400, {"content": b'{"value": "' + VALUE.encode() + b'\xff"}'}),
    "nested without end": (400, {"content": b'{"value": ' + b"[" * 200_000}),
    "a key that nobody knows": (400, {"json": {"value": VALUE, "expected": 1}}),
    "a number of a million digits": (
        400,
        {"content": b'{"value": ' + b"1" * 1_000_000},
    ),
    "larger than the server takes": (413, {"json": {"value": VALUE * 300_000}}),
}


@pytest.mark.parametrize("kind", BAD_BODIES)
async def test_a_bad_body_is_refused_in_json(
    api: Any, datasette: Datasette, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    status, options = BAD_BODIES[kind]
    options = {"headers": {"content-type": "application/json"}, **options}
    assert_refused(await api("/KEY/-/set", **options), status)
    assert await get_secret(datasette, "KEY") is None
    written = "".join(capfd.readouterr())
    assert VALUE not in written and "Traceback" not in written


async def test_a_chunked_body_without_end_is_refused(
    api: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b'{"value": "'
        for _ in range(300):
            yield VALUE.encode() * 500

    answer = await api(
        "/KEY/-/set", content=chunks(), headers={"content-type": "application/json"}
    )
    assert_refused(answer, 413)
    assert VALUE not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("content_type", "content"),
    [
        ("text/plain", b"value=x"),
        ("application/xml", b"<value>x</value>"),
        ("application/x-www-form-urlencoded", b"value=%FF"),
        ("application/x-www-form-urlencoded", b"value=\xff"),
        ("application/x-www-form-urlencoded", b"a=&" * 30_000),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="value"\r\n\r\nx\r\n--b--\r\n',
        ),
    ],
    ids=[
        *("text", "XML", "escaped Latin-1", "Latin-1", "many fields"),
        "multipart",
    ],
)
async def test_a_body_of_another_kind_is_refused(
    api: Any, datasette: Datasette, content_type: str, content: bytes
) -> None:
    headers = {"content-type": content_type, "accept": "application/json"}
    assert_refused(await api("/KEY/-/set", content=content, headers=headers), 400)
    assert await get_secret(datasette, "KEY") is None


BAD_FIELDS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "null": {"value": None},
    "empty": {"value": ""},
    "number": {"value": 5},
    "array": {"value": [VALUE]},
    "object": {"value": {"x": VALUE}},
    "NUL": {"value": VALUE + "\0"},
    "lone surrogate": {"value": VALUE + "\ud800"},
    "over-long": {"value": VALUE * 10_000},
    "over-long note": {"value": VALUE, "note": "n" * 101},
    "number as note": {"value": VALUE, "note": 5},
    "NUL in the note": {"value": VALUE, "note": "a\0b"},
    "text as version": {"value": VALUE, "expected_version": "1"},
    "true as version": {"value": VALUE, "expected_version": True},
    "fraction as version": {"value": VALUE, "expected_version": 1.0},
    "negative version": {"value": VALUE, "expected_version": -1},
    "huge version": {"value": VALUE, "expected_version": 10**30},
    "note for nothing": {"note": "a note for nothing"},
}


@pytest.mark.parametrize("kind", BAD_FIELDS)
async def test_a_bad_field_is_refused(
    api: Any, datasette: Datasette, kind: str
) -> None:
    sent = json.dumps(BAD_FIELDS[kind]).encode()
    headers = {"content-type": "application/json"}
    assert_refused(await api("/KEY/-/set", content=sent, headers=headers), 400)
    assert await get_secret(datasette, "KEY") is None


@pytest.mark.parametrize(
    "name",
    ["", "1KEY", "A-B", "A B", "Ä", "<script>", "A\nB", "ENCRYPTION_KEY", "K" * 129],
)
async def test_a_bad_name_is_refused(api: Any, name: str) -> None:
    if name:
        answer = await api(f"/{tilde_encode(name)}/-/set", {"value": VALUE})
        assert_refused(answer, 400)
    added = await api(
        "/-/add",
        data={"name": name, "secret": VALUE},
        headers={"accept": "application/json"},
    )
    assert_refused(added, 400)


@pytest.mark.parametrize(
    ("action", "content", "status"),
    [
        ("set", {"value": VALUE, "expected_version": 2}, 409),
        ("set", {"note": "x", "expected_version": 2}, 409),
        ("delete", {"expected_version": 2}, 409),
        ("restore", {"expected_version": 2}, 409),
        ("rollback", {"version": 1, "expected_version": 2}, 409),
        ("rollback", {}, 400),
        ("rollback", {"version": 9}, 400),
        ("rollback", {"version": 0}, 400),
        ("rollback", {"version": "1"}, 400),
        ("rollback", {"version": 2}, 400),  # destroyed
        ("destroy", {}, 400),
        ("destroy", {"version": 9}, 400),
        ("destroy", {"versions": [1, 9]}, 400),
        ("destroy", {"versions": []}, 400),
        ("destroy", {"versions": [None]}, 400),
        ("destroy", {"versions": [[1]]}, 400),
        ("destroy", {"versions": ["1 "]}, 400),
        ("destroy", {"versions": ["9"]}, 400),
        ("destroy", {"version": True}, 400),
        ("delete", {"version": 1}, 400),
    ],
    ids=str,
)
async def test_an_impossible_action_changes_nothing(
    api: Any, action: str, content: dict[str, Any], status: int
) -> None:
    for value in ("one", "two", "three"):
        await api("/KEY/-/set", {"value": value})
    await api("/KEY/-/destroy", {"version": 2})
    before = (await api("/KEY.json")).json()
    assert_refused(await api(f"/KEY/-/{action}", content), status)
    assert before == (await api("/KEY.json")).json()


@pytest.mark.parametrize("field", ["versions", "version"])
async def test_a_version_to_destroy_can_be_text(api: Any, field: str) -> None:
    await api("/KEY/-/set", {"value": VALUE})
    sent = {field: ["1"] if field == "versions" else "1"}
    destroyed = (await api("/KEY/-/destroy", sent)).json()
    assert (destroyed["versions"], destroyed["destroyed"]) == ([1], 1)


async def test_what_is_only_registered_has_nothing_to_act_on(api: Any) -> None:
    for action, content in (
        ("delete", {}),
        ("restore", {}),
        ("rollback", {"version": 1}),
        ("destroy", {"version": 1}),
    ):
        assert_refused(await api(f"/EXAMPLE_SECRET/-/{action}", content), 400)


async def test_a_destroyed_version_cannot_be_restored(api: Any) -> None:
    await api("/KEY/-/set", {"value": VALUE})
    await api("/KEY/-/delete", {})
    await api("/KEY/-/destroy", {"version": 1})
    assert_refused(await api("/KEY/-/restore", {}), 400)


@pytest.mark.parametrize("skip", ["no", "false", 1, 0, [], {}])
async def test_what_cannot_be_decrypted_is_left_out_only_for_true(
    api: Any, datasette: Datasette, skip: Any
) -> None:
    assert_refused(await api("/-/rotate", {"skip_unopenable": skip}), 400)
    for flag in (True, False, None):
        assert (await api("/-/rotate", {"skip_unopenable": flag})).status_code == 200


async def test_a_destroyed_version_needs_no_key(api: Any) -> None:
    for value in ("one", "two"):
        await api("/KEY/-/set", {"value": value})
    await api("/KEY/-/destroy", {"version": 1})
    newest, first = (await api("/KEY.json")).json()["versions"]
    assert len(newest["key_id"]) == 16 and first["key_id"] is None
    await api("/KEY/-/destroy", {"version": 2})
    assert (await api("/KEY.json")).json()["secret"]["key_id"] is None


async def test_an_upgrade_takes_no_field(
    api: Any, datasette: Datasette, master_key: str
) -> None:
    await datasette.get_internal_database().execute_write(
        "insert into datasette_secrets (name, version, encrypted, encryption_key_name) "
        "values ('OLD', 1, ?, 'default')",
        [Fernet(master_key).encrypt(VALUE.encode())],
    )
    assert_refused(await api("/-/upgrade", {"digest": "0" * 64}), 400)
    assert (await api("/OLD.json")).json()["secret"]["state"] == "needs-upgrade"
    assert (await api("/-/upgrade", {})).json()["upgraded"] == 1
    assert (await api("/-/upgrade", {})).json()["upgraded"] == 0


async def test_a_reserved_name_is_nowhere(api: Any) -> None:
    assert_refused(await api("/encryption_key.json"), 404)
    assert_refused(await api("/ENCRYPTION_KEY/-/delete", {}), 404)


@pytest.mark.parametrize("size", ["0", "-1", "x", "", "1" * 30])
async def test_a_bad_size_is_refused(api: Any, size: str) -> None:
    assert_refused(await api(f".json?_size={size}"), 400)


async def test_an_empty_date_clears_the_date_and_null_leaves_it(
    api: Any, datasette: Datasette
) -> None:
    await set_secret(datasette, "KEY", VALUE, note="a note", renew_by="2031-01-31")
    for sent, date in (
        ({"note": "another", "renew_by": None}, "2031-01-31"),
        ({"renew_by": ""}, None),
    ):
        done = await api("/KEY/-/set", sent)
        assert (done.status_code, done.json()["ok"]) == (200, True)
        secret = (await api("/KEY.json")).json()["secret"]
        assert (secret["note"], secret["renew_by"]) == ("another", date)
    for wrong in (0, False, " "):
        assert_refused(await api("/KEY/-/set", {"renew_by": wrong}), 400)


async def test_without_a_key_changes_are_refused_and_the_list_is_shown(
    make_datasette: MakeDatasette,
) -> None:
    datasette = make_datasette()
    await datasette.invoke_startup()
    cookies = {"ds_actor": datasette.client.actor_cookie({"id": "root"})}
    refused = await datasette.client.post(
        "/-/secrets/KEY/-/set", json={"value": VALUE}, cookies=cookies
    )
    assert_refused(refused, 400)
    listed = await datasette.client.get("/-/secrets.json", cookies=cookies)
    assert listed.json()["keys"] == []
    assert [each["state"] for each in listed.json()["secrets"]] == ["not-set"]


async def test_a_database_that_cannot_be_written_is_read_all_the_same(
    make_datasette: MakeDatasette, master_key: str, tmp_path: Path
) -> None:
    path = str(tmp_path / "data.db")
    sqlite3.connect(path).execute("vacuum").connection.close()
    writable = make_datasette(master_key, database="data", files=[path])
    await writable.invoke_startup()
    await set_secret(writable, "KEY", VALUE)
    writable.close()
    datasette = make_datasette(master_key, database="data", immutables=[path])
    await datasette.invoke_startup()
    cookies = {"ds_actor": datasette.client.actor_cookie({"id": "root"})}
    for action, sent in (("set", {"value": "x"}), ("delete", {})):
        refused = await datasette.client.post(
            f"/-/secrets/KEY/-/{action}", json=sent, cookies=cookies
        )
        assert_refused(refused, 503)
    listed = await datasette.client.get("/-/secrets.json", cookies=cookies)
    assert listed.json()["secrets"][0]["state"] == "not-set"
    assert listed.json()["secrets"][1]["state"] == "stored"
    assert await get_secret(datasette, "KEY") == VALUE


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("encrypted = zeroblob(296)", "damaged, moved or tampered with"),
        ("encryption_key_name = '0123456789abcdef'", "which is not configured"),
        ("envelope_version = null, wrapped_key = null", "datasette-secrets 0.x"),
    ],
)
async def test_a_version_that_cannot_be_decrypted_is_a_conflict(
    api: Any, datasette: Datasette, internal: str, damage: str, said: str
) -> None:
    await set_secret(datasette, "KEY", VALUE)
    await set_secret(datasette, "KEY", "another")
    conn = sqlite3.connect(internal)
    with conn:
        conn.execute(f"update datasette_secrets set {damage} where version = 1")
    conn.close()
    answer = await api("/KEY/-/rollback", {"version": 1})
    assert_refused(answer, 409)
    assert said in answer.json()["error"]
