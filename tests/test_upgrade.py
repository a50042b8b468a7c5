"""The explicit upgrade converts every value that 0.x stored, and changes nothing else."""

from __future__ import annotations

import base64
import itertools
import json
import os
import re
import sqlite3
import subprocess
import sys
import traceback
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeDatasette
from datasette import hookimpl
from datasette.app import Datasette
from datasette.plugins import pm
from support import documents, zero
from support.console import Console
from support.environments import environment, install
from support.servers import Server

from datasette_secrets import (
    CannotOpen,
    DatabaseUnavailable,
    InvalidSecret,
    NeedsUpgrade,
    SecretsError,
    envelope,
    get_secret,
    restore_secret,
    rotation,
    service,
    set_secret,
    store,
    upgrade,
)
from datasette_secrets.instance import get_instance

WHEEL = os.environ.get("WHEEL", "")  # set by scripts/dependents.py
OLD, NEW, OTHER = (envelope.generate_master_key() for _ in range(3))
NEW_ID = envelope.MasterKey.parse(NEW).id

# 0.x had no limits. What is larger than a value can be is left: see test_attacks.py.
VALUES = {
    "ONE_CHARACTER": "x",
    "ORDINARY": "sk-proj-0123456789abcdef",
    "UNICODE": "schlüssel-鍵-🔑",
    "LINES": "-----BEGIN KEY-----\r\nabc\n\n-----END KEY-----",
    "BLANKS": "  kept as it is\t",
    "WITH_NUL": "a\0b",
    "LONG": "long " * 13_107,
    "name of any kind / 鍵": "odd name",
}


def opened(make_datasette: MakeDatasette, *keys: str, **options: Any) -> Datasette:
    """As a command opens it: nothing is started."""
    return make_datasette(*keys, **options)


async def start(make_datasette: MakeDatasette, *keys: str, **options: Any) -> Datasette:
    datasette = opened(make_datasette, *keys, **options)
    await datasette.invoke_startup()
    return datasette


def write_values(path: str, key: str = OLD, **columns: Any) -> None:
    zero.write(
        path,
        [(name, 1, zero.token(key, value)) for name, value in VALUES.items()],
        **columns,
    )


def select(path: str, columns: str) -> list[Any]:
    conn = sqlite3.connect(path)
    rows = conn.execute(f"select {columns} from datasette_secrets order by id")
    found = rows.fetchall()
    conn.close()
    return found


def alter(path: str, sql: str, parameters: Iterable[Any] = ()) -> None:
    conn = sqlite3.connect(path)
    with conn:
        conn.execute(sql, tuple(parameters))
    conn.close()


async def differing(
    datasette: Datasette, values: Mapping[str, str | None]
) -> list[str]:
    """The names whose value is another one: a failing test shows no value."""
    return [
        name
        for name, value in values.items()
        if await get_secret(datasette, name) != value
    ]


async def test_every_value_is_the_same_after_upgrade_and_rotation_and_without_the_old_key(
    make_datasette: MakeDatasette, internal: str
) -> None:
    write_values(internal)
    datasette = opened(make_datasette, OLD)
    report = await upgrade.upgrade(datasette)
    assert report.complete
    assert report.changed == len(VALUES)
    assert await differing(datasette, VALUES) == []
    datasette.close()

    datasette = await start(make_datasette, NEW, OLD)
    assert await differing(datasette, VALUES) == []
    assert (await rotation.rotate(datasette)).complete
    assert await differing(datasette, VALUES) == []
    datasette.close()

    assert await differing(await start(make_datasette, NEW), VALUES) == []


async def test_upgrade_seals_under_a_new_primary_key_with_the_old_one_in_the_ring(
    make_datasette: MakeDatasette, internal: str
) -> None:
    write_values(internal)
    alter(
        internal,
        "update datasette_secrets set encrypted = ? where name = 'UNICODE'",
        [zero.token(OTHER, VALUES["UNICODE"])],
    )
    datasette = opened(make_datasette, NEW, OLD, OTHER)
    assert (await upgrade.upgrade(datasette)).complete
    assert set(select(internal, "encryption_key_name, envelope_version")) == {
        (NEW_ID, 1)
    }
    datasette.close()

    assert await differing(await start(make_datasette, NEW), VALUES) == []


async def test_upgrade_changes_nothing_of_a_row_but_its_envelope(
    make_datasette: MakeDatasette, internal: str
) -> None:
    write_values(
        internal,
        note="a note",
        created_by="ann",
        updated_by="bob",
        deleted_at="2025-05-05 05:05:05",
        deleted_by="somebody",
        last_used_at="2025-04-04 04:04:04",
        last_used_by="a plugin",
    )
    others = zero.COLUMNS.replace("encryption_key_name, ", "")
    before = select(internal, others)
    datasette = opened(make_datasette, OLD)
    await upgrade.upgrade(datasette)

    assert select(internal, others) == before
    assert await get_secret(datasette, "ORDINARY") is None
    await restore_secret(datasette, "ORDINARY")
    assert await differing(datasette, {"ORDINARY": VALUES["ORDINARY"]}) == []


async def test_the_version_that_0_x_served_is_the_one_that_counts(
    make_datasette: MakeDatasette, internal: str
) -> None:
    order = [("1", 1), ("3, served", 2), ("2", 2), ("0", 1)]
    zero.write(
        internal, [("A", version, zero.token(OLD, value)) for value, version in order]
    )
    datasette = opened(make_datasette, OLD)
    assert (await upgrade.upgrade(datasette)).complete
    assert await get_secret(datasette, "A") == "3, served"
    newest = (await store.history(get_instance(datasette).db, "A"))[0]
    for version in range(1, newest.version + 1):
        await service.roll_back(datasette, "A", version)
    assert await get_secret(datasette, "A") == "3, served"


BAD = {
    "another key's": zero.token(OTHER, "a"),
    "garbage": b"not a token",
    "empty": b"",
    "text": "not a token: ünïcode",
    "cut short": zero.token(OLD, "a")[:-8],
    "changed": zero.token(OLD, "a")[:-8] + b"AAAAAAA=",
    "no UTF-8": zero.token(OLD, b"\xff\xfe"),
    "number": 5,
}


async def test_what_cannot_be_decrypted_is_named_and_left_and_the_rest_upgraded(
    make_datasette: MakeDatasette, internal: str
) -> None:
    zero.write(internal, [(name, 1, encrypted) for name, encrypted in BAD.items()])
    write_values(internal)
    before = select(internal, "name, version, encrypted, encryption_key_name")[
        : len(BAD)
    ]
    datasette = opened(make_datasette, OLD)

    report = await upgrade.upgrade(datasette)

    assert not report.complete
    assert report.changed == len(VALUES)
    assert len(report.found) == len(BAD) + len(VALUES)
    assert [problem.name for problem in report.problems] == [*BAD]
    assert {problem.code for problem in report.problems} == {"cannot-upgrade"}
    assert all("destroy" in problem.remedy for problem in report.problems)
    after = select(internal, "name, version, encrypted, encryption_key_name")
    assert after[: len(BAD)] == before
    assert await differing(datasette, VALUES) == []
    for name in BAD:
        with pytest.raises(NeedsUpgrade):
            await get_secret(datasette, name)


async def test_a_row_whose_name_is_no_text_is_named_once_the_rest_is_upgraded(
    make_datasette: MakeDatasette, internal: str
) -> None:
    zero.write(internal, [(b"name", 1, zero.token(OLD, "a"))])
    write_values(internal)
    datasette = opened(make_datasette, OLD)
    with pytest.raises(DatabaseUnavailable, match=r"secrets destroy-row 1$"):
        await upgrade.upgrade(datasette)
    assert await differing(datasette, VALUES) == []
    await service.destroy_row(datasette, 1)
    assert (await upgrade.upgrade(datasette)).complete
    assert await differing(datasette, VALUES) == []


async def test_a_token_that_sqlite_holds_as_text_is_upgraded(
    make_datasette: MakeDatasette, internal: str
) -> None:
    zero.write(internal, [("A", 1, zero.token(OLD, "a").decode())])
    datasette = opened(make_datasette, OLD)
    assert (await upgrade.upgrade(datasette)).complete
    assert await get_secret(datasette, "A") == "a"


async def test_the_wrong_key_changes_nothing(
    make_datasette: MakeDatasette, internal: str
) -> None:
    write_values(internal)
    before = select(internal, f"{zero.COLUMNS}, encrypted")
    report = await upgrade.upgrade(opened(make_datasette, NEW))
    assert (report.changed, len(report.problems)) == (0, len(VALUES))
    assert select(internal, f"{zero.COLUMNS}, encrypted") == before


async def test_a_dry_run_names_everything_and_changes_no_byte(
    make_datasette: MakeDatasette, internal: str, tmp_path: Path
) -> None:
    path = str(tmp_path / "named.db")
    write_values(path)
    zero.write(path, [("BAD", 1, b"not a token")])
    content = Path(path).read_bytes()

    # As the shell does it: nothing is started.
    datasette = make_datasette(OLD, database="named", files=[path])
    report = await upgrade.upgrade(datasette, dry_run=True)

    assert report.found == [(name, 1) for name in [*VALUES, "BAD"]]
    assert [problem.name for problem in report.problems] == ["BAD"]
    assert (report.changed, report.complete, report.clean_up) == (0, False, None)
    assert Path(path).read_bytes() == content


async def test_upgrade_run_again_finds_nothing_and_changes_nothing(
    make_datasette: MakeDatasette, internal: str
) -> None:
    write_values(internal)
    datasette = opened(make_datasette, OLD)
    await upgrade.upgrade(datasette)
    before = select(internal, "*")
    report = await upgrade.upgrade(datasette)
    assert (report.found, report.changed, report.complete) == ([], 0, True)
    assert select(internal, "*") == before


@pytest.mark.parametrize("journal_mode", ["delete", "wal"])
async def test_no_token_is_left_in_the_files_after_upgrade(
    make_datasette: MakeDatasette, internal: str, journal_mode: str
) -> None:
    # What 0.x has replaced lies in unused parts of its pages.
    write_values(internal)
    conn = sqlite3.connect(internal)
    conn.execute("pragma secure_delete = off")
    conn.execute(f"pragma journal_mode = {journal_mode}")
    with conn:
        conn.execute("update datasette_secrets set note = 'another note'")
        zero.insert(conn, "GONE", 1, zero.token(OLD, "gone"))
    with conn:
        conn.execute("delete from datasette_secrets where name = 'GONE'")
    conn.close()

    report = await upgrade.upgrade(opened(make_datasette, OLD))

    assert report.clean_up and report.clean_up.remains is None
    for file in Path(internal).parent.glob("internal.db*"):
        assert re.search(rb"gAAAAA[\w-]{20}", file.read_bytes()) is None


class Events:
    """A plugin that listens."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    @hookimpl
    def track_event(self, event: Any) -> None:
        if event.name == "upgrade-secrets":
            self.heard.append(event)


async def test_an_upgrade_that_changed_something_is_announced_once(
    make_datasette: MakeDatasette, internal: str
) -> None:
    events = Events()
    pm.register(events)
    try:
        datasette = await start(make_datasette, OLD)
        write_values(internal)
        await upgrade.upgrade(datasette, dry_run=True)
        await upgrade.upgrade(datasette, actor_id="ann")
        await upgrade.upgrade(datasette, actor_id="ann")
    finally:
        pm.unregister(events)
    [event] = events.heard
    assert (event.versions, event.actor) == (len(VALUES), {"id": "ann"})


async def test_upgrade_works_in_batches_of_any_size(
    make_datasette: MakeDatasette, internal: str
) -> None:
    for size in (1, 3, 1_000):
        Path(internal).unlink(missing_ok=True)
        write_values(internal)
        datasette = opened(make_datasette, OLD)
        steps: list[int] = []
        report = await upgrade.upgrade(
            datasette, batch_size=size, progress=steps.append
        )
        assert report.complete
        assert max(steps) <= size and sum(steps) == len(VALUES)
        assert await differing(datasette, VALUES) == []
        datasette.close()


async def test_a_row_that_0_x_writes_meanwhile_is_upgraded_too(
    make_datasette: MakeDatasette, internal: str
) -> None:
    write_values(internal)
    datasette = opened(make_datasette, OLD)
    late = itertools.count(2)

    def write(_: int) -> None:
        if (version := next(late)) < 5:
            token = zero.token(OLD, str(version))
            zero.write(internal, [("ORDINARY", version, token)])

    report = await upgrade.upgrade(datasette, batch_size=2, progress=write)
    assert report.complete
    assert report.changed == len(report.found) == len(VALUES) + 3
    assert await get_secret(datasette, "ORDINARY") == "4"


# Runs the upgrade on copy after copy and kills it some statements later each time.
KILLED = """
import asyncio, os, signal, sys
from datasette.app import Datasette
from datasette.utils import sqlite3
from datasette_secrets import envelope, fernet, upgrade as upgrading

source, key, folder = sys.argv[1:]
fernet.require_fernet()
statements = last = 0
connect = sqlite3.connect

def count(sql):
    global statements
    statements += 1
    if statements == last:
        os.kill(os.getpid(), signal.SIGKILL)

def connect_counting(*arguments, **options):
    conn = connect(*arguments, **options)
    conn.set_trace_callback(count)
    return conn

sqlite3.connect = connect_counting

def upgrade(path):
    datasette = Datasette(
        internal=path,
        config={"plugins": {"datasette-secrets": {"encryption-key": key}}},
    )
    asyncio.run(upgrading.upgrade(datasette, batch_size=3))
    datasette.close()

while True:
    last += 4
    path = f"{folder}/{last}.db"
    with open(source, "rb") as old, open(path, "wb") as new:
        new.write(old.read())
    child = os.fork()
    if not child:
        upgrade(path)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        sys.exit(os.WEXITSTATUS(status))
"""


@pytest.mark.unix("forks")
async def test_an_upgrade_killed_anywhere_loses_nothing_and_is_finished_later(
    make_datasette: MakeDatasette, internal: str, tmp_path: Path
) -> None:
    (opened(make_datasette)).close()
    write_values(internal)
    folder = tmp_path / "killed"
    folder.mkdir()

    subprocess.run(
        [sys.executable, "-c", KILLED, internal, OLD, str(folder)],
        check=True,
        timeout=120,
    )

    killed = sorted(folder.glob("*.db"))
    assert len(killed) > 10
    for path in killed:
        datasette = make_datasette(OLD, internal=str(path))
        report = await upgrade.upgrade(datasette)
        assert report.complete
        assert report.clean_up and report.clean_up.remains is None
        assert await differing(datasette, VALUES) == []
        datasette.close()


@pytest.mark.parametrize(
    "planting",
    [
        "insert into datasette_secrets (name, version, encrypted, encryption_key_name) "
        "values ('ORDINARY', 2, :token, 'default')",
        "update datasette_secrets set encrypted = :token, wrapped_key = null, "
        "envelope_version = null where name = 'ORDINARY'",
        "update datasette_secrets set encrypted = :token, wrapped_key = null, "
        "envelope_version = null, encryption_key_name = 'default' "
        "where name = 'ORDINARY'",
        "update datasette_secrets set encrypted = :token where name = 'ORDINARY'",
        "update datasette_secrets set encrypted = :token, wrapped_key = null "
        "where name = 'ORDINARY'",
        "update datasette_secrets set encrypted = :token, envelope_version = null "
        "where name = 'ORDINARY'",
    ],
)
async def test_a_token_planted_after_the_upgrade_is_never_read_nor_rotated(
    make_datasette: MakeDatasette, internal: str, planting: str
) -> None:
    write_values(internal)
    datasette = opened(make_datasette, OLD)
    assert (await upgrade.upgrade(datasette)).complete
    conn = sqlite3.connect(internal)
    with conn:
        conn.execute(planting, {"token": zero.token(OLD, "planted")})
    conn.close()
    planted = "encrypted, wrapped_key, envelope_version, encryption_key_name"
    before = [row for row in select(internal, planted) if row[0].startswith(b"gAAAAA")]
    assert len(before) == 1

    for keys in ((OLD,), (NEW, OLD)):
        datasette = await start(make_datasette, *keys)
        with pytest.raises((NeedsUpgrade, CannotOpen)):
            await get_secret(datasette, "ORDINARY")
        for new_data_keys in (False, True):
            report = await rotation.rotate(
                datasette, skip_unopenable=True, new_data_keys=new_data_keys
            )
            with pytest.raises((NeedsUpgrade, CannotOpen)):
                await get_secret(datasette, "ORDINARY")
        assert not report.complete
        assert [problem.name for problem in report.problems] == ["ORDINARY"]
        after = [row[0] for row in select(internal, planted)]
        assert before[0][0] in after
        datasette.close()


async def test_what_would_be_left_by_a_destruction_is_named_as_what_it_is(
    make_datasette: MakeDatasette, internal: str
) -> None:
    write_values(internal)
    datasette = opened(make_datasette, OLD)
    assert (await upgrade.upgrade(datasette)).complete
    with closing(sqlite3.connect(internal)) as conn, conn:
        zero.insert(conn, "ORDINARY", 2, zero.token(OLD, "newer"))
    with pytest.raises(InvalidSecret, match="stored by datasette-secrets 0"):
        await service.older_versions(datasette, "ORDINARY")


async def test_without_the_extra_upgrade_says_what_to_install_and_changes_nothing(
    make_datasette: MakeDatasette, internal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_values(internal)
    before = select(internal, f"{zero.COLUMNS}, encrypted")
    datasette = opened(make_datasette, OLD)
    for module in ("cryptography", "cryptography.fernet"):
        monkeypatch.setitem(sys.modules, module, None)
    for dry_run in (True, False):
        with pytest.raises(
            SecretsError, match=r"install 'datasette-secrets\[fernet\]'"
        ):
            await upgrade.upgrade(datasette, dry_run=dry_run)
    assert select(internal, f"{zero.COLUMNS}, encrypted") == before


async def test_without_anything_to_upgrade_the_extra_is_not_needed(
    datasette: Datasette, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("cryptography", "cryptography.fernet"):
        monkeypatch.setitem(sys.modules, module, None)
    await set_secret(datasette, "A", "a")
    assert (await upgrade.upgrade(datasette)).complete


@pytest.mark.parametrize("value", [b"\xff not to be seen", b"not to be seen"])
def test_a_traceback_with_locals_shows_neither_key_nor_value(value: bytes) -> None:
    master_key = envelope.MasterKey.parse(OLD)
    token = zero.token(OLD, value)
    if value.isascii():
        token = token[:-4] + b"AAA="

    with pytest.raises(CannotOpen) as caught:
        envelope.upgrade(envelope.KeyRing([master_key]), "A", 1, token)

    error = caught.value
    assert error.__traceback__ and error.__context__ is error.__cause__ is None
    below_this_test = error.with_traceback(error.__traceback__.tb_next)
    shown = "".join(
        traceback.TracebackException.from_exception(
            below_this_test, capture_locals=True
        ).format()
    )
    raw = base64.urlsafe_b64decode(OLD)
    for what in (OLD, repr(raw)[2:-1], raw.hex(), "not to be seen"):
        assert what not in shown


# The real datasette-secrets of other days, each in an environment of its own.

RELEASES = [
    ("0.1a4", "datasette==1.0a13", "httpx<0.28"),
    ("0.2", "datasette==1.0a19", "httpx<0.28"),
    ("0.3a0", "datasette==1.0a24"),
    ("0.3a0", "datasette>=1.0a41"),
]

# Stores through 0.x's own form, reads through its own get_secret.
OF_0_X = """
import asyncio, json, sys
from datasette import hookimpl
from datasette.app import Datasette
from datasette.plugins import pm
from datasette_secrets import Secret, get_secret

job = json.load(sys.stdin)

class Waiting:
    __name__ = "waiting"

    @hookimpl
    def register_secrets(self):
        return [Secret(name) for name in job["names"]]

pm.register(Waiting())

async def main():
    with open(job["config"]) as config:
        datasette = Datasette(
            files=job["files"], internal=job["internal"], config=json.load(config)
        )
    datasette.root_enabled = True
    await datasette.invoke_startup()
    cookies = {"ds_actor": datasette.sign({"a": {"id": "root"}}, "actor")}
    for name, value, note in job["store"]:
        path = "/-/secrets/" + name
        page = await datasette.client.get(path, cookies=cookies)
        token = page.cookies.get("ds_csrftoken") or ""
        stored = await datasette.client.post(
            path,
            data={"secret": value, "note": note, "csrftoken": token},
            cookies={**cookies, "ds_csrftoken": token},
        )
        assert stored.status_code == 302, stored.status_code
    page = await datasette.client.get("/-/secrets", cookies=cookies)
    assert page.status_code == 200
    values = {}
    for name in job["names"]:
        try:
            values[name] = await get_secret(datasette, name, "reader")
        except Exception as error:
            values[name] = type(error).__name__
    print(json.dumps(values))

asyncio.run(main())
"""


class OldSite:
    """A configuration and a database of 0.x, used by one of its releases or by ours."""

    def __init__(self, console: Console, programs: Path) -> None:
        self.console = console
        self.programs = programs
        self.files: list[str] = []
        # As the README of 0.x has it.
        settings = {"encryption-key": {"$env": "DATASETTE_SECRETS_ENCRYPTION_KEY"}}
        self.config: dict[str, Any] = {
            "plugins": {"datasette-secrets": settings},
            "permissions": {"manage-secrets": {"id": "root"}},
        }
        self.write_config()

    def write_config(self) -> None:
        self.console.config.write_text(json.dumps(self.config))

    def use_named_database(self) -> None:
        self.console.internal = self.console.folder / "data.db"
        sqlite3.connect(self.console.internal).close()
        self.files = [str(self.console.internal)]
        self.config["plugins"]["datasette-secrets"]["database"] = "data"
        self.write_config()
        self.console.options = [*self.files, "-c", str(self.console.config)]

    def run(
        self, names: Iterable[str], *store: tuple[str, str, str]
    ) -> dict[str, str | None]:
        """Store with the release of 0.x; what it then reads, or the name of its error."""
        job = {
            "internal": None if self.files else str(self.console.internal),
            "files": self.files,
            "config": str(self.console.config),
            "names": [*names],
            "store": store,
        }
        done = subprocess.run(
            [self.programs / "python", "-c", OF_0_X],
            cwd=self.programs,  # where no checkout can stand in for the release
            input=json.dumps(job),
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr.splitlines()[-1]
        return dict(json.loads(done.stdout))


@pytest.fixture(params=RELEASES, ids=", ".join)
def old_site(
    request: pytest.FixtureRequest, console: Console, monkeypatch: pytest.MonkeyPatch
) -> OldSite:
    """One of the releases, in an environment of its own."""
    monkeypatch.setenv("DATASETTE_SECRETS_ENCRYPTION_KEY", OLD)
    version, *requirements = request.param
    name = re.sub(r"[^a-z0-9.]+", "-", f"{version} {requirements[0]}")
    programs = environment(name, f"datasette-secrets=={version}", *requirements)
    return OldSite(console, programs)


OTHERS = zero.COLUMNS.replace("encryption_key_name, ", "")
TOKEN = re.compile(rb"gAAAAA[\w-]{20}")


@pytest.mark.dependents
async def test_a_server_reads_at_once_what_a_real_release_of_0_x_stored(
    make_datasette: MakeDatasette, old_site: OldSite
) -> None:
    internal = str(old_site.console.internal)
    stored: dict[str, str | None] = {}
    store_job = []
    for number in range(300):
        name = f"SECRET_{number % 60}"
        value = f"{number} {VALUES['UNICODE']} " + "x" * (number * 7)
        stored[name] = value
        store_job.append((name, value, f"note {number}"))
    assert old_site.run(stored, *store_job) == stored
    alter(
        internal,
        "update datasette_secrets set deleted_at = '2025-05-05 05:05:05', "
        "deleted_by = 'ann' where name = 'SECRET_9' and version = 5",
    )

    # No server has started yet: ours opens none, and 0.x still opens all.
    datasette = opened(make_datasette, OLD)
    with pytest.raises(NeedsUpgrade):
        await get_secret(datasette, "SECRET_0")
    datasette.close()
    assert old_site.run(stored, ("SECRET_0", "later", ""))["SECRET_0"] == "later"
    stored |= {"SECRET_0": "later", "SECRET_9": None}
    before = select(internal, OTHERS)
    assert len(before) == 301

    with Server(old_site.console) as server:
        assert select(internal, OTHERS) == before
        read = dict(zip(stored, server.read(*stored), strict=True))
    assert [name for name in stored if read[name] != stored[name]] == []
    assert "301 versions that datasette-secrets 0.x had stored" in "".join(server.log)
    for file in old_site.console.files().values():
        assert TOKEN.search(file) is None
    # Every version, not only the newest.
    datasette = await start(make_datasette, OLD)
    assert (await rotation.verify(datasette)).opened == 301
    await restore_secret(datasette, "SECRET_9")
    del stored["SECRET_9"]
    datasette.close()

    datasette = await start(make_datasette, NEW, OLD)
    assert await differing(datasette, stored) == []
    assert (await rotation.rotate(datasette)).complete
    assert await differing(datasette, stored) == []

    # What the real release writes to the file now is never read, nor rotated.
    assert old_site.run([], ("SECRET_1", "planted", "")) == {}
    with pytest.raises(NeedsUpgrade):
        await get_secret(datasette, "SECRET_1")
    assert not (await rotation.rotate(datasette, skip_unopenable=True)).complete
    with pytest.raises(NeedsUpgrade):
        await get_secret(datasette, "SECRET_1")
    del stored["SECRET_1"]
    datasette.close()

    assert await differing(await start(make_datasette, NEW), stored) == []


@pytest.mark.dependents
def test_a_server_says_what_may_remain_of_a_real_release_in_a_named_database(
    old_site: OldSite,
) -> None:
    old_site.use_named_database()
    stored = {f"SECRET_{number}": f"value {number}" for number in range(20)}
    store_job = [(name, value, "") for name, value in stored.items()]
    assert old_site.run(stored, *store_job) == stored
    with Server(old_site.console) as server:
        assert server.read(*stored) == [*stored.values()]
    log = "".join(server.log)
    assert "20 versions that datasette-secrets 0.x had stored" in log
    assert "run 'datasette secrets rotate-key --vacuum'" in log
    old_site.console.ok("rotate-key", "--vacuum")
    for file in old_site.console.files().values():
        assert TOKEN.search(file) is None


@pytest.mark.dependents
async def test_the_commands_of_the_readme_move_over_from_0_x_and_back(
    make_datasette: MakeDatasette, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATASETTE_SECRETS_ENCRYPTION_KEY", OLD)
    [commands] = documents.blocks(
        documents.section("README.md", "Moving over from 0.x"), "bash"
    )
    programs = environment(
        "moving-over", "datasette-secrets==0.3a0", "datasette>=1.0a41"
    )
    back = ("--force-reinstall", "--no-deps", "datasette-secrets==0.3a0")
    install(programs, *back)
    site = OldSite(console, programs)
    stored = {f"SECRET_{number}": f"value {number}" for number in range(20)}
    store_job = [(name, value, "") for name, value in stored.items()]
    assert site.run(stored, *store_job) == stored

    # The same wheel, wherever the command takes it from.
    commands, replaced = re.subn(
        r"(?m)^pip install .+$", f"pip install '{WHEEL}[fernet]'", commands
    )
    assert replaced == 1
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    folder, env = console.folder, {**os.environ, "PATH": path}
    documents.run(commands, folder, env)

    # Nothing is converted before a start with a master key, and 0.3a0 goes on working.
    serve = "datasette serve -c datasette.yaml --internal internal.db"
    without_key = {**env, "DATASETTE_SECRETS_ENCRYPTION_KEY": ""}
    with documents.Served(serve, folder, without_key) as server:
        assert "cannot be read until upgraded" in "".join(server.said)
    install(programs, *back)
    assert site.run(stored) == stored

    install(programs, "--force-reinstall", "--no-deps", WHEEL)
    with documents.Served(serve, folder, env) as server:
        assert "20 versions that datasette-secrets 0.x" in "".join(server.said)

    # 0.3a0 reads nothing that was converted. What it stores now is its own.
    install(programs, *back)
    assert set(site.run(stored).values()) == {"InvalidToken"}
    assert site.run(["SECRET_0"], ("SECRET_0", "of 0.3a0", "")) == {
        "SECRET_0": "of 0.3a0"
    }
    datasette = await start(make_datasette, OLD)
    with pytest.raises(NeedsUpgrade):
        await get_secret(datasette, "SECRET_0")
    assert (await upgrade.upgrade(datasette)).changed == 1
    assert await differing(datasette, {**stored, "SECRET_0": "of 0.3a0"}) == []
    datasette.close()

    [commands] = documents.blocks(
        documents.section("upgrading.md", "Going back"), "bash"
    )
    documents.run(commands, folder, env)
    assert site.run(stored) == stored
