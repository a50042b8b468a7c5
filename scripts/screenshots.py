"""Takes the screenshots under .github/screenshots: every page, in the states that count.

Each scene is a Datasette of its own on files of its own, served on a free port and looked
at by a headless Chromium: make screenshots
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from cryptography.fernet import Fernet
from datasette import hookimpl
from datasette.app import Datasette
from datasette.plugins import pm
from playwright.async_api import Browser, async_playwright

from datasette_secrets import CheckResult, Secret, delete_secret, set_secret
from datasette_secrets.checks import check_stored
from datasette_secrets.envelope import generate_master_key
from datasette_secrets.events import via
from datasette_secrets.service import destroy_versions, set_details

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from support.serving import served  # noqa: E402

FOLDER = ROOT / ".github" / "screenshots"
REJECTED = "sk-proj-a-key-that-was-revoked"
DESKTOP = {"width": 1200, "height": 800}
PHONE = {"width": 360, "height": 740}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


async def check(value: str) -> CheckResult | bool:
    """What the provider of the scenes says."""
    if value == REJECTED:
        return CheckResult("rejected", "OpenAI does not know this key")
    return True


class Plugin:
    """What the plugins of the scenes ask for, and what their people are called."""

    __name__ = "datasette-extract"

    @hookimpl
    def register_secrets(self) -> list[Secret]:
        return [
            Secret(
                "OPENAI_API_KEY",
                "Used to answer questions about your data",
                "https://platform.openai.com/api-keys",
                "Get an API key",
                check=check,
                looks_like="^sk-",
            ),
            Secret(
                "OPENCAGE_API_KEY",
                "Turns addresses into coordinates",
                "https://opencagedata.com/dashboard",
                "Get an OpenCage key",
            ),
            Secret("SLACK_WEBHOOK_URL", "Where <em>alerts</em> are sent"),
            Secret("SMTP_PASSWORD", "Sends the weekly report"),
        ]

    @hookimpl
    def actors_from_ids(self, actor_ids: list[str]) -> dict[str, dict[str, str]]:
        names = {"root": "Root", "17": "ada", "23": "Grace Hopper"}
        return {each: {"id": each, "name": names.get(each, each)} for each in actor_ids}


class Scene:
    """One instance, and the secrets in it."""

    def __init__(self, *keys: str, internal: str | None = "internal.db") -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="datasette-secrets-"))
        self.path = str(self.folder / internal) if internal else None
        self.start(*keys)

    def start(self, *keys: str) -> None:
        settings = {"encryption-key": list(keys)} if keys else {}
        self.datasette = Datasette(
            internal=self.path, config={"plugins": {"datasette-secrets": settings}}
        )
        self.datasette.root_enabled = True

    async def change_keys(self, *keys: str) -> None:
        self.datasette.close()
        self.start(*keys)
        await self.datasette.invoke_startup()

    async def store(self, name: str, note: str, by: str, times: int = 1) -> None:
        for number in range(times):
            value = f"a value, the {number}th"
            await set_secret(self.datasette, name, value, note=note, actor_id=by)

    def sql(self, statement: str, *parameters: Any) -> None:
        with contextlib.closing(sqlite3.connect(str(self.path))) as conn, conn:
            conn.execute(statement, parameters)

    def age(self, name: str, version: int, updated: float, used: float | None) -> None:
        """Let a version have been stored and used so many hours ago."""
        self.sql(
            "update datasette_secrets set created_at = ?, updated_at = ?, "
            "last_used_at = ?, last_used_by = ? where name = ? and version = ?",
            hours_ago(updated),
            hours_ago(updated),
            used and hours_ago(used),
            None if used is None else "23" if version % 2 else "17",
            name,
            version,
        )
        self.sql(
            "update datasette_secrets_log set at = ? where name = ? and version = ? "
            "and action = 'set-secret'",
            hours_ago(updated),
            name,
            version,
        )

    def store_with_0x(self, name: str, key: str, version: int = 1) -> None:
        self.sql(
            "insert into datasette_secrets (name, version, note, encrypted, "
            "encryption_key_name, created_at, created_by, updated_at, updated_by) "
            "values (?, ?, 'Written by 0.3', ?, 'default', ?, '17', ?, '17')",
            name,
            version,
            Fernet(key).encrypt(b"a value of 0.x"),
            hours_ago(9000),
            hours_ago(9000),
        )


def hours_ago(hours: float) -> str:
    moment = datetime.datetime.now(datetime.timezone.utc)
    moment -= datetime.timedelta(hours=hours)
    return moment.strftime("%Y-%m-%d %H:%M:%S")


async def every_state() -> Scene:
    via.set("page")
    lost, old, new = generate_master_key(), generate_master_key(), generate_master_key()
    scene = Scene(lost)
    await scene.datasette.invoke_startup()
    await scene.store("LEGACY_CRM_TOKEN", "The CRM we are leaving", "17")
    await scene.change_keys(old)
    await scene.store("OPENAI_API_KEY", "Team account, limit 50 USD a month", "17", 2)
    await scene.store("STRIPE_SECRET_KEY", "Test mode", "23")
    await scene.change_keys(new, old)
    await scene.store("OPENAI_API_KEY", "Team account, limit 50 USD a month", "17", 2)
    await scene.store("GITHUB_TOKEN", "Read-only, expires in March", "root", 2)
    await scene.store("SERVICE_ACCOUNT_JSON", "", "root")
    await scene.store("MAILGUN_KEY", "Replaced by SMTP", "23")
    await scene.store("SMTP_PASSWORD", "", "23")
    await scene.store("MAPBOX_TOKEN", "Leaked in May", "17")
    await delete_secret(scene.datasette, "MAILGUN_KEY", actor_id="17")
    await destroy_versions(scene.datasette, "MAPBOX_TOKEN", [1])
    await destroy_versions(scene.datasette, "OPENAI_API_KEY", [1], actor_id="17")
    await check_stored(scene.datasette, "OPENAI_API_KEY", actor_id="17")
    today = datetime.datetime.now(datetime.timezone.utc).date()
    for name, days in (("STRIPE_SECRET_KEY", 9), ("GITHUB_TOKEN", 120)):
        date = (today + datetime.timedelta(days)).isoformat()
        await set_details(scene.datasette, name, {"renew_by": date}, actor_id="17")
    for name, version, updated, used in (
        ("LEGACY_CRM_TOKEN", 1, 7000, 5500),
        ("OPENAI_API_KEY", 1, 4300, 2200),
        ("OPENAI_API_KEY", 2, 2200, 1500),
        ("OPENAI_API_KEY", 3, 1500, 75),
        ("OPENAI_API_KEY", 4, 73, 0.06),
        ("STRIPE_SECRET_KEY", 1, 4000, 26),
        ("GITHUB_TOKEN", 1, 900, 300),
        ("GITHUB_TOKEN", 2, 290, 5),
        ("SERVICE_ACCOUNT_JSON", 1, 0.4, None),
        ("MAILGUN_KEY", 1, 6000, 800),
        ("SMTP_PASSWORD", 1, 400, 390),
        ("MAPBOX_TOKEN", 1, 3000, 1200),
    ):
        scene.age(name, version, updated, used)
    scene.store_with_0x("GEOCODER_KEY", old)
    os.environ["DATASETTE_SECRETS_SMTP_PASSWORD"] = "from the environment"
    return scene


async def empty() -> Scene:
    scene = Scene(generate_master_key())
    await scene.datasette.invoke_startup()
    return scene


async def unconfigured() -> Scene:
    scene = Scene()
    await scene.datasette.invoke_startup()
    return scene


async def without_its_key() -> Scene:
    scene = Scene(generate_master_key())
    await scene.datasette.invoke_startup()
    await scene.store("OPENAI_API_KEY", "Team account", "root", 3)
    await destroy_versions(scene.datasette, "OPENAI_API_KEY", [1])
    await scene.change_keys()
    return scene


async def temporary() -> Scene:
    scene = Scene(generate_master_key(), internal=None)
    await scene.datasette.invoke_startup()
    await scene.store("OPENAI_API_KEY", "", "root")
    return scene


@contextlib.asynccontextmanager
async def opened(
    browser: Browser, scene: Scene, address: str, viewport: Any
) -> AsyncIterator[Any]:
    context = await browser.new_context(viewport=viewport)
    cookie = scene.datasette.sign({"a": {"id": "root"}}, "actor")
    await context.add_cookies([{"name": "ds_actor", "value": cookie, "url": address}])
    try:
        yield await context.new_page()
    finally:
        await context.close()


async def conflict(page: Any) -> None:
    """Save on a form that was opened before the newest version."""
    await page.eval_on_selector("[name=expected_version]", "field => field.value = 3")
    await page.fill("[name=secret]", "typed too late")
    await page.click("text=Save without testing")


async def rejected(page: Any) -> None:
    await page.fill("[name=secret]", REJECTED)
    await page.click("[name=check]")


async def typed(page: Any) -> None:
    await page.fill("[name=secret]", "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqh\n")


SECRET = "/-/secrets/OPENAI_API_KEY"
Step = Callable[[Any], Awaitable[None]]
#: The scene, and of it: file name, address, what to do on the page first.
SHOTS: list[
    tuple[Callable[[], Awaitable[Scene]], list[tuple[str, str, Step | None]]]
] = [
    (
        every_state,
        [
            ("list", "/-/secrets", None),
            ("filtered", "/-/secrets?q=key", None),
            ("nothing-found", "/-/secrets?q=zzz", None),
            ("secret", SECRET, typed),
            ("conflict", SECRET, conflict),
            ("rejected", SECRET, rejected),
            ("log", "/-/secrets/-/log", None),
            ("environment", "/-/secrets/SMTP_PASSWORD", None),
            ("not-set", "/-/secrets/OPENCAGE_API_KEY", None),
            ("deleted", "/-/secrets/MAILGUN_KEY", None),
            ("destroyed", "/-/secrets/MAPBOX_TOKEN", None),
            ("key-missing", "/-/secrets/LEGACY_CRM_TOKEN", None),
            ("add", "/-/secrets/-/add", None),
            ("delete", f"{SECRET}/-/delete", None),
            ("restore", "/-/secrets/MAILGUN_KEY/-/restore", None),
            ("rollback", f"{SECRET}/-/rollback?version=3", None),
            ("destroy", f"{SECRET}/-/destroy?old=1", None),
            ("rotate", "/-/secrets/-/rotate", None),
            ("upgrade", "/-/secrets/-/upgrade", None),
            ("not-found", "/-/secrets/NOTHING", None),
        ],
    ),
    (empty, [("empty", "/-/secrets", None)]),
    (unconfigured, [("unconfigured", "/-/secrets", None)]),
    (without_its_key, [("without-its-key", "/-/secrets", None)]),
    (temporary, [("temporary", "/-/secrets", None)]),
]
ALSO_ON_A_PHONE = (
    *("list", "secret", "conflict", "destroy", "unconfigured", "rotate", "add", "log"),
)


async def take(browser: Browser, only: list[str]) -> None:
    for build, shots in SHOTS:
        wanted = [shot for shot in shots if not only or shot[0] in only]
        if not wanted:
            continue
        os.environ.pop("DATASETTE_SECRETS_SMTP_PASSWORD", None)
        scene = await build()
        try:
            with served(scene.datasette) as address:
                for name, path, step in wanted:
                    for suffix, viewport in views_of(name):
                        async with opened(browser, scene, address, viewport) as page:
                            await page.goto(address + path)
                            if step:
                                await step(page)
                            file = FOLDER / f"{name}{suffix}.png"
                            await page.screenshot(path=file, full_page=True)
                            print(file.relative_to(FOLDER.parent.parent))
        finally:
            shutil.rmtree(scene.folder)


def views_of(name: str) -> Iterator[tuple[str, dict[str, int]]]:
    yield "", DESKTOP
    if name in ALSO_ON_A_PHONE:
        yield "-phone", PHONE


async def main() -> None:
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        sys.exit("No Chromium is installed")
    for name in [name for name in os.environ if name.startswith("DATASETTE_SECRETS_")]:
        del os.environ[name]
    FOLDER.mkdir(exist_ok=True)
    pm.register(Plugin(), name="screenshots")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=executable, args=["--no-sandbox", "--disable-gpu"]
        )
        await take(browser, sys.argv[1:])
        await browser.close()


if __name__ == "__main__":
    asyncio.run(main())
