"""What somebody with a browser does here: with JavaScript, without it, by keyboard alone."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from cryptography.fernet import Fernet
from datasette import hookimpl
from datasette.app import Datasette
from datasette.plugins import pm
from datasette.utils.asgi import Response
from playwright.sync_api import Browser, Page, ViewportSize, expect, sync_playwright
from support.serving import served

from datasette_secrets import CheckResult, Secret, get_secret, set_secret
from datasette_secrets.envelope import generate_master_key

pytestmark = pytest.mark.browser

VALUE = "sk-live-4f9c0d1e"
PEM = "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADAN\n-----END PRIVATE KEY-----"
WIDE = {"width": 1100, "height": 800}
PHONE: ViewportSize = {"width": 360, "height": 740}


class Site(Datasette):
    """An instance that is served."""

    address = ""


async def check(value: str) -> CheckResult:
    """What the provider of TESTED says: it knows one key."""
    if value == VALUE:
        return CheckResult("works", "Signed in as ann")
    return CheckResult("rejected", "Nobody has this key")


class Plugin:
    """Registers secrets, and reads one on a page of its own: does it know this value?"""

    @hookimpl
    def register_secrets(self) -> list[Secret]:
        url = "https://example.com/keys"
        return [
            Secret("WAITED_FOR", "Used for <em>maps</em>", url, "Get a key"),
            Secret("WAITED_FOR_TOO", "Used for maps", url, "Get a key"),
            Secret("NEVER_SET", "Used for nothing"),
            Secret("TESTED", "Used for tests", check=check, looks_like="^sk-"),
            Secret("TESTED_TOO", "Used for tests", check=check),
        ]

    @hookimpl
    def register_routes(self) -> list[Any]:
        async def read(datasette: Datasette, request: Any) -> Any:
            value = await get_secret(datasette, request.args["name"])
            return Response.text(value or "not set")

        return [(r"^/-/read$", read)]


def make(internal: str, *keys: str) -> Site:
    settings = {"encryption-key": list(keys)} if keys else {}
    datasette = Site(
        internal=internal,
        config={"plugins": {"datasette-secrets": settings}},
        settings={"base_url": "/"},
    )
    datasette.root_enabled = True
    return datasette


async def plant(internal: str, key: str) -> None:
    """A version that an older key wraps, one that 0.x wrote, and one with a history."""
    datasette = make(internal, key)
    await datasette.invoke_startup()
    await set_secret(datasette, "UNDER_THE_OLD_KEY", "old", note="an older one")
    for value in ("one", "two", "three"):
        await set_secret(datasette, "WITH_HISTORY", value, note=f"the {value}")
    await datasette.get_internal_database().execute_write(
        "insert into datasette_secrets (name, version, encrypted, "
        "encryption_key_name) values ('FROM_0X', 1, ?, 'default')",
        [Fernet(key).encrypt(b"old")],
    )
    datasette.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """An instance with two keys; its address is `site.address`."""
    internal = str(tmp_path_factory.mktemp("site") / "internal.db")
    old_key = generate_master_key()
    asyncio.run(plant(internal, old_key))
    pm.register(Plugin(), name="browser-plugin")
    datasette = make(internal, generate_master_key(), old_key)
    with served(datasette) as datasette.address:
        yield datasette
    datasette.close()
    pm.unregister(name="browser-plugin")


@pytest.fixture(scope="module")
def bare_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """An instance without a key."""
    datasette = make(str(tmp_path_factory.mktemp("bare") / "internal.db"))
    with served(datasette) as datasette.address:
        yield datasette
    datasette.close()


@pytest.fixture(scope="module")
def browser(site: Site, bare_site: Site, chromium: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield browser
        browser.close()


Visit = Callable[..., Page]


@pytest.fixture
def visit(browser: Browser, site: Site) -> Iterator[Visit]:
    """`visit(path)`: a page that root sees. It fails the test that its script fails in."""
    with contextlib.ExitStack() as stack:

        def open_page(
            path: str = "/-/secrets", to: Site = site, **options: Any
        ) -> Page:
            options.setdefault("viewport", WIDE)
            context = stack.enter_context(browser.new_context(**options))
            context.set_default_timeout(10_000)
            cookie = to.sign({"a": {"id": "root"}}, "actor")
            context.add_cookies(
                [{"name": "ds_actor", "value": cookie, "url": to.address}]
            )
            page = context.new_page()
            page.on("pageerror", lambda error: failures.append(error))
            page.goto(to.address + path)
            return page

        failures: list[Any] = []
        yield open_page
        assert not failures


def read(page: Page, site: Site, name: str) -> str:
    """What a plugin reads."""
    return page.request.get(f"{site.address}/-/read?name={name}").text()


def add(page: Page, name: str, value: str = VALUE) -> None:
    page.get_by_role("link", name="Add a secret").click()
    page.get_by_label("Name").fill(name)
    page.get_by_label("Value", exact=True).fill(value)
    page.get_by_role("button", name="Add secret").click()


def message(page: Page) -> Any:
    return page.get_by_role("status").first


# Journeys.


@pytest.mark.parametrize("javascript", [True, False], ids=["script", "no script"])
def test_a_secret_is_stored_changed_rolled_back_deleted_restored_and_destroyed(
    visit: Visit, site: Site, javascript: bool
) -> None:
    name = f"JOURNEY_{javascript}".upper()
    page = visit(java_script_enabled=javascript)

    add(page, name, PEM)
    expect(message(page)).to_contain_text(f"Secret {name} added")
    assert (read(page, site, name) == PEM) is True

    page.get_by_role("link", name=name).click()
    page.get_by_label("New value").fill(VALUE)
    page.get_by_label("Note").fill("the second")
    page.get_by_role("button", name="Save").click()
    expect(message(page)).to_contain_text(f"Secret {name} updated")
    assert (read(page, site, name) == VALUE) is True

    page.get_by_role("link", name=name).click()
    page.get_by_role("link", name="Roll back to version 1").click()
    expect(page.get_by_role("heading", level=1)).to_have_text(
        f"Roll back {name} to version 1?"
    )
    page.get_by_role("button", name="Roll back").click()
    expect(message(page)).to_contain_text("rolled back to version 1, as version 3")
    assert (read(page, site, name) == PEM) is True

    page.get_by_role("link", name="Delete…").click()
    page.get_by_role("button", name="Delete").click()
    expect(message(page)).to_contain_text(f"Secret {name} deleted")
    assert read(page, site, name) == "not set"

    page.get_by_role("link", name="Restore…").first.click()
    page.get_by_role("button", name="Restore").click()
    expect(message(page)).to_contain_text(f"Secret {name} restored")
    assert (read(page, site, name) == PEM) is True

    page.get_by_role("link", name="Destroy versions…").click()
    boxes = page.get_by_role("checkbox")
    assert [boxes.nth(each).is_checked() for each in range(3)] == [False] * 3
    page.get_by_role("link", name="Select all but the newest").click()
    for each in range(3):
        expect(boxes.nth(each)).to_be_checked(checked=each > 0)
    button = "Destroy 2 versions" if javascript else "Destroy selected versions"
    page.get_by_role("button", name=button, exact=True).click()
    expect(message(page)).to_contain_text(f"Versions 1 and 2 of {name} destroyed")
    assert (read(page, site, name) == PEM) is True
    assert VALUE not in page.content()


@pytest.mark.parametrize("javascript", [True, False], ids=["script", "no script"])
def test_a_secret_that_a_plugin_waits_for_is_found_and_set(
    visit: Visit, site: Site, javascript: bool
) -> None:
    name = "WAITED_FOR" if javascript else "WAITED_FOR_TOO"
    page = visit(java_script_enabled=javascript)
    page.get_by_role("link", name=f"Set {name}", exact=True).click()
    page.get_by_label("Value", exact=True).fill(VALUE)
    page.get_by_role("button", name="Save").click()
    expect(page.locator(f'[data-secret="{name}"]')).to_have_attribute(
        "data-state", "stored"
    )
    assert (read(page, site, name) == VALUE) is True


def test_the_keyboard_alone_is_enough(visit: Visit, site: Site) -> None:
    page = visit()

    def tab_to(role: Any, name: str) -> None:
        wanted = page.get_by_role(role, name=name, exact=True).first
        for _ in range(60):
            page.keyboard.press("Tab")
            if wanted.evaluate("element => element === document.activeElement"):
                return
        pytest.fail(f"Tab never reaches the {role} {name!r}")

    tab_to("link", "Add a secret")
    page.keyboard.press("Enter")
    tab_to("textbox", "Name")
    page.keyboard.type("BY_KEYBOARD")
    tab_to("textbox", "Value")
    page.keyboard.type(VALUE)
    tab_to("checkbox", "Show what I type")
    page.keyboard.press("Space")
    tab_to("button", "Add secret")
    page.keyboard.press("Enter")
    expect(message(page)).to_contain_text("Secret BY_KEYBOARD added")
    assert (read(page, site, "BY_KEYBOARD") == VALUE) is True
    tab_to("link", "BY_KEYBOARD")
    page.keyboard.press("Enter")
    tab_to("link", "Delete…")
    page.keyboard.press("Enter")
    tab_to("button", "Delete")
    page.keyboard.press("Enter")
    expect(message(page)).to_contain_text("Secret BY_KEYBOARD deleted")


def test_of_two_people_at_once_the_second_is_told_of_the_first(
    visit: Visit, site: Site
) -> None:
    first, second = visit(), visit()
    add(first, "SHARED", "one")
    for page in (first, second):
        page.goto(f"{site.address}/-/secrets/SHARED")
    first.get_by_label("New value").fill("two")
    first.get_by_role("button", name="Save").click()
    expect(message(first)).to_contain_text("Secret SHARED updated")
    second.get_by_label("New value").fill(VALUE)
    second.get_by_role("button", name="Save").click()
    expect(second.get_by_role("alert")).to_contain_text(
        "root saved version 2 of SHARED"
    )
    expect(second.get_by_label("New value")).to_have_value("")
    assert read(second, site, "SHARED") == "two"


def test_the_older_key_and_what_0x_stored_are_dealt_with(
    visit: Visit, site: Site
) -> None:
    page = visit()
    page.get_by_role("link", name="Upgrade…").click()
    expect(page.get_by_text("FROM_0X")).to_be_visible()
    page.get_by_role("button", name="Upgrade").click()
    expect(message(page)).to_contain_text("1 version upgraded")
    page.get_by_role("link", name="Rotate…").click()
    expect(page.get_by_text("UNDER_THE_OLD_KEY")).to_be_visible()
    page.get_by_role("button", name="Rotate").click()
    expect(message(page)).to_contain_text("re-encrypted with master key")
    expect(page.get_by_text("Not used", exact=True)).to_be_visible()
    assert read(page, site, "UNDER_THE_OLD_KEY") == "old"
    assert read(page, site, "FROM_0X") == "old"


@pytest.mark.parametrize("javascript", [True, False], ids=["script", "no script"])
def test_a_value_is_tested_before_it_is_saved_on_a_phone(
    visit: Visit, site: Site, javascript: bool
) -> None:
    name = "TESTED" if javascript else "TESTED_TOO"
    page = visit(f"/-/secrets/{name}", java_script_enabled=javascript, viewport=PHONE)
    page.get_by_label("Value", exact=True).fill("sk-of-nobody")
    page.get_by_label("Note").fill("of the phone")
    page.get_by_role("button", name="Test and save").click()
    expect(page.get_by_role("alert")).to_contain_text("Nobody has this key")
    expect(page.get_by_label("Value", exact=True)).to_have_value("")
    expect(page.get_by_label("Note")).to_have_value("of the phone")
    assert read(page, site, name) == "not set"

    page.get_by_label("Value", exact=True).fill("sk-of-nobody")
    page.get_by_role("button", name="Save without testing").click()
    expect(message(page)).to_contain_text(f"Secret {name} stored")
    page.get_by_role("link", name=name, exact=True).click()
    page.get_by_role("button", name="Test", exact=True).click()
    expect(message(page)).to_contain_text("Rejected: Nobody has this key")

    page.get_by_label("New value").fill(VALUE)
    page.get_by_role("button", name="Test and save").click()
    expect(message(page)).to_contain_text("Works: Signed in as ann")
    expect(page.locator(f'[data-secret="{name}"]')).to_contain_text("Works, tested")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


@pytest.mark.parametrize("javascript", [True, False], ids=["script", "no script"])
def test_what_was_done_is_in_the_log(
    visit: Visit, site: Site, javascript: bool
) -> None:
    name = f"LOGGED_{javascript}".upper()
    page = visit(java_script_enabled=javascript)
    add(page, name)
    page.get_by_role("link", name="Change log").click()
    page.get_by_label("Name").fill(name)
    page.get_by_role("button", name="Find").click()
    row = page.locator("[data-change]")
    expect(row).to_have_count(1)
    expect(row).to_contain_text("Saved version 1")
    expect(row).to_contain_text("by root")


# What the script adds.


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("'sk-live'", "in quotes"),
        ("OPENAI_API_KEY=sk-live", "NAME=value"),
        ("OPENAI_API_KEY", "looks like the name of a secret"),
        ("pk-live", "does not look like a typical value"),
    ],
    ids=["quotes", "assignment", "name", "pattern"],
)
def test_a_value_that_looks_wrong_gets_a_hint(
    visit: Visit, value: str, hint: str
) -> None:
    page = visit("/-/secrets/TESTED")
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url))
    field = page.get_by_label(re.compile("^(New v|V)alue$"))
    field.fill(value)
    expect(page.locator(".secrets-hint")).to_contain_text(hint)
    field.fill(VALUE)
    expect(page.locator(".secrets-hint")).to_be_hidden()
    assert sent == []


def test_the_button_that_destroys_counts(visit: Visit) -> None:
    page = visit("/-/secrets/WITH_HISTORY/-/destroy")
    button = page.locator(".secrets-danger")
    expect(button).to_be_disabled()
    page.get_by_role("checkbox").first.check()
    expect(button).to_have_value("Destroy 1 version")
    page.get_by_role("link", name="Select all but the newest").click()
    expect(button).to_have_value("Destroy 2 versions")


@pytest.mark.parametrize(
    ("path", "label"),
    [("/-/secrets/-/add", "Name"), ("/-/secrets/WITH_HISTORY", "New value")],
    ids=["add", "secret"],
)
def test_the_first_field_has_the_focus(visit: Visit, path: str, label: str) -> None:
    expect(visit(path).get_by_label(label, exact=True)).to_be_focused()


def test_the_list_is_filtered_by_state(visit: Visit) -> None:
    page = visit()
    page.get_by_label("State").select_option("Not set")
    expect(page.locator('[data-secret="NEVER_SET"]')).to_be_visible()
    expect(page.locator('[data-secret="WITH_HISTORY"]')).to_have_count(0)


def test_the_list_is_filtered_as_one_types(visit: Visit) -> None:
    page = visit()
    page.evaluate("window.stayed = true")
    field = page.get_by_label("Find by name")
    field.press_sequentially("with_hist")
    rows = page.locator("[data-secret]")
    expect(rows).to_have_count(1)
    expect(rows).to_have_attribute("data-secret", "WITH_HISTORY")
    expect(page.locator("#secrets-count")).to_have_text(
        "1 secret with “with_hist” in the name"
    )
    assert page.url.endswith("?q=with_hist") and page.evaluate("window.stayed")
    field.fill("no such name")
    expect(rows).to_have_count(0)
    expect(page.get_by_text("No secret has")).to_be_visible()
    field.fill("")
    expect(page.locator('[data-secret="UNDER_THE_OLD_KEY"]')).to_be_visible()


@pytest.mark.parametrize("javascript", [True, False], ids=["script", "no script"])
def test_a_value_is_hidden_until_it_is_to_be_shown(
    visit: Visit, javascript: bool
) -> None:
    page = visit("/-/secrets/-/add", java_script_enabled=javascript)
    field = page.get_by_label("Value", exact=True)
    field.fill(VALUE)
    expect(field).to_have_css("-webkit-text-security", "disc")
    hidden = field.screenshot()
    page.get_by_label("Show what I type").check()
    expect(field).to_have_css("-webkit-text-security", "none")
    assert field.screenshot() != hidden


def test_a_note_says_how_much_room_is_left(visit: Visit) -> None:
    page = visit("/-/secrets/-/add")
    page.get_by_label("Note").fill("🔑🔑")
    expect(page.locator("#secrets-note-help")).to_contain_text("98 left")


def test_two_clicks_are_one_change(visit: Visit, site: Site) -> None:
    page = visit()
    add(page, "CLICKED", "one")
    page.goto(f"{site.address}/-/secrets/CLICKED")
    page.get_by_label("New value").fill("two")
    page.get_by_role("button", name="Save").dblclick()
    expect(message(page)).to_contain_text("Secret CLICKED updated")
    page.get_by_role("link", name="CLICKED").click()
    expect(page.locator("[data-version]")).to_have_count(2)


def test_going_back_finds_the_value_gone(visit: Visit, site: Site) -> None:
    page = visit()
    add(page, "GONE_BACK")
    expect(message(page)).to_contain_text("added")
    page.go_back()
    expect(page.get_by_label("Value", exact=True)).to_have_value("")


# Every page.


PAGES = {
    "list": "/-/secrets",
    "nothing found": "/-/secrets?q=zzz",
    "stored": "/-/secrets/WITH_HISTORY",
    "not set": "/-/secrets/NEVER_SET",
    "not found": "/-/secrets/NOBODY",
    "add": "/-/secrets/-/add",
    "delete": "/-/secrets/WITH_HISTORY/-/delete",
    "restore": "/-/secrets/WITH_HISTORY/-/restore",
    "roll back": "/-/secrets/WITH_HISTORY/-/rollback?version=1",
    "destroy": "/-/secrets/WITH_HISTORY/-/destroy?old=1",
    "log": "/-/secrets/-/log",
    "with a check": "/-/secrets/TESTED",
    "rotate": "/-/secrets/-/rotate",
    "upgrade": "/-/secrets/-/upgrade",
}


def violations(page: Page) -> list[str]:
    # axe fails to write selectors on any page of Datasette, the home page included.
    found = Axe().run(page, options={"selectors": False}).response["violations"]
    return [f"{each['id']}: {node['html']}" for each in found for node in each["nodes"]]


def test_axe_finds_what_there_is_to_find(visit: Visit) -> None:
    page = visit()
    page.evaluate("document.querySelector('label').remove()")
    assert [each.split(":")[0] for each in violations(page)] == ["label"]


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_accessible_and_fits_a_phone(visit: Visit, name: str) -> None:
    page = visit(PAGES[name])
    assert violations(page) == []
    page.set_viewport_size(PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


@pytest.fixture(params=["nothing stored", "something stored"])
def keyless_site(
    request: Any, tmp_path: Path, site: Site, bare_site: Site
) -> Iterator[Site]:
    """An instance without a key, and one that lacks the key of what is in it."""
    if request.param == "nothing stored":
        yield bare_site
        return
    internal = str(tmp_path / "internal.db")
    with contextlib.closing(site.get_internal_database().connect()) as conn:
        conn.execute("vacuum into ?", [internal])
    datasette = make(internal)
    with served(datasette) as datasette.address:
        yield datasette
    datasette.close()


def test_the_page_without_a_key_is_accessible_and_fits_a_phone(
    visit: Visit, keyless_site: Site
) -> None:
    page = visit(to=keyless_site)
    assert violations(page) == []
    page.set_viewport_size(PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_an_error_is_accessible(visit: Visit) -> None:
    page = visit("/-/secrets/WITH_HISTORY")
    page.get_by_label("New value").fill(VALUE)
    page.evaluate("document.querySelector('[name=expected_version]').value = 1")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("alert")).to_contain_text("Nothing was changed")
    assert violations(page) == []


def test_a_message_is_accessible(visit: Visit) -> None:
    page = visit()
    add(page, "SAID")
    expect(message(page)).to_contain_text("Secret SAID added")
    assert violations(page) == []


@pytest.mark.parametrize("path", ["/-/secrets", "/-/secrets/WITH_HISTORY"])
def test_a_page_is_as_accessible_on_a_phone_in_the_dark(
    visit: Visit, path: str
) -> None:
    page = visit(path, viewport=PHONE, color_scheme="dark")
    assert violations(page) == []


def test_long_names_and_notes_fit_a_phone(visit: Visit, site: Site) -> None:
    page = visit(viewport=PHONE)
    add(page, "L" * 128)
    page.goto(f"{site.address}/-/secrets/{'L' * 128}")
    page.get_by_label("Note").fill("n" * 100)
    page.get_by_role("button", name="Save").click()
    expect(message(page)).to_contain_text("Note of")
    for path in ("", "/" + "L" * 128, "/" + "L" * 128 + "/-/destroy", "/-/log"):
        page.goto(f"{site.address}/-/secrets{path}")
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    # A long name in the next column leaves this one its width.
    for width, cell in ((PHONE["width"], "th"), (1280, "td:last-child")):
        page.set_viewport_size({"width": width, "height": 800})
        box = page.locator(f"[data-change] {cell}").first.bounding_box()
        assert box is not None and box["width"] > 80


# Other sites.


def test_a_form_on_another_site_changes_nothing(visit: Visit, site: Site) -> None:
    page = visit()
    target = f"{site.address}/-/secrets/WITH_HISTORY/-/delete"
    page.route(
        "http://evil.example/",
        lambda route: route.fulfill(
            content_type="text/html",
            body=f'<form method="post" action="{target}"><button>Win a prize</button></form>',
        ),
    )
    page.goto("http://evil.example/")
    with page.expect_response(target) as refused:
        page.get_by_role("button").click()
    assert refused.value.status == 403
    assert read(page, site, "WITH_HISTORY") == "three"
