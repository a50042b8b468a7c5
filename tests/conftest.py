"""Fixtures that every test can use, and a map of the tests.

Each test file is named after what it tests:

    the library        test_secrets (the public API) · test_registered (what plugins register)
                       test_checks · test_checks_doors (of values, by plugins)
                       test_state
                       test_api (the JSON API) · test_pages
                       test_pages_log and test_pages_checks (log, tests, dates)
                       test_log · test_log_doors (the change log, renew_by) · test_keep
                       test_permissions · test_config · test_envelope · test_rotation
                       test_upgrade · test_first_start · test_migrations
                       test_uses (last_used_at) · test_guard
    the commands       test_cli_values (set, get, list …) · test_cli_keys (rotate-key …)
                       test_cli_refusals (errors) · test_cli_processes (signals, a server
                       beside a command) · test_cli_residue (what remains in the file)
                       test_keyfiles (new-key, key-id) · test_interrupt (Ctrl-C, limits)
                       test_cli_checklist (status, log, note, renew)
                       test_cli_help (examples, suggestions, remedies, the width of tables)
    other plugins      test_neighbours (their rules, tables, events and mistakes)
                       test_containment (pages when a plugin cannot read its secret)
    attacks            test_attacks (a writer of the file) · test_corpus (damaged rows)
                       test_adversary (a changed schema or page) · test_replaced_file
                       test_leaks and test_locals (values in logs, errors and tracebacks)
    several at once    test_races · test_concurrency · test_servers (a new key for two)
                       test_faults (kill, full disk)
    random sequences   test_model
    a real browser     test_browser
    the code           test_layers (imports and SQL) · test_imports (import order and time)
                       test_deadlines (of the tests) · test_typing (the public types)
    `make run`         test_run
    the documents      test_docs · test_docs_shell · test_runbook · test_security_claims
                       test_docs_authors (the page for plugin authors)
                       test_example_plugin
    what is published  test_distribution
    other packages     test_dependents (`make test-dependents` runs the slow ones)
                       test_dependents_pages (their pages, whatever is wrong)
                       test_replication (Litestream; `make test-replication` runs it)

Helpers are in tests/support:

    console            a folder with a configuration, and the commands run in it
    terminal           a command on a terminal of its own
    decoder            a second implementation of the envelope
    zero               tables as datasette-secrets 0.x made them
    environments       virtual environments with packages from PyPI
    hunt               how a leak is recognised; watching_plugin and hostile_checks serve
                       test_leaks
    forks              commands in forks of one process, for test_leaks and test_runbook
    machine            a folder that stands for a machine, for the runbook
    adversary          changes of the schema and of pages, for test_adversary
    unwritable         a file or folder that nobody can write
    faults             one command that fails at its n-th write; fault_shim.c makes it fail
    interrupted        a command that gets SIGINT before its n-th callback
    keyfile_faults     the same for new keys in key files
    serving            a Datasette that answers real requests, in this process
    traffic            one of several processes that use a database at once
    servers            `datasette serve` processes, and clients that never stop asking
    visitor            a browser without JavaScript, and plugins while a test lasts

Frozen data is in tests/vectors.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from datasette import hookimpl
from datasette.app import Datasette
from datasette.database import Database
from datasette.plugins import pm
from jinja2 import BytecodeCache, Environment
from jinja2.bccache import Bucket
from support.console import Console

from datasette_secrets import envelope

#: What is not collected on Windows, and why.
UNIX_ONLY = {
    "test_cli_help.py": "the examples are for a Unix shell",
    "test_docs.py": "the documents show commands for a Unix shell",
    "test_docs_shell.py": "needs a terminal of Unix",
    "test_faults.py": "loads a C library into a process",
    "test_keyfiles.py": "new-key needs POSIX calls",
    "test_leaks.py": "forks",
    "test_replication.py": "Litestream's wheel is for Unix",
    "test_run.py": "needs a terminal of Unix",
    "test_runbook.py": "the runbook is for a Unix shell",
}
collect_ignore = list(UNIX_ONLY) if sys.platform == "win32" else []

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def pytest_configure(config: pytest.Config) -> None:
    # Some parents ignore SIGINT (nohup, for example), and child processes inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Older Datasettes leave their own connections to memory open, and Python 3.13 says so.
    if "_all_connections" not in Database.__init__.__code__.co_names:
        about = "unclosed database"
        config.addinivalue_line("filterwarnings", f"ignore:{about}:ResourceWarning")
        # And for what is collected when all tests have ended.
        warnings.filterwarnings("ignore", about, ResourceWarning)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None]:
    """End the processes of a test that fails. Later tests would be blamed for them."""
    started: list[subprocess.Popen[Any]] = []

    class Recorded(subprocess.Popen[Any]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", Recorded)
        try:
            yield
        except BaseException:
            for process in started:
                process.kill()
                process.wait(timeout=60)
                for stream in (process.stdin, process.stdout, process.stderr):
                    if stream:
                        with contextlib.suppress(OSError):  # what nobody read
                            stream.close()
            raise


class CompiledOnce(BytecodeCache):
    """Keeps the compiled templates of one Datasette for the next ones, which saves a third."""

    def __init__(self) -> None:
        self._compiled: dict[str, bytes] = {}

    def load_bytecode(self, bucket: Bucket) -> None:
        if bucket.key in self._compiled:
            bucket.bytecode_from_string(self._compiled[bucket.key])

    def dump_bytecode(self, bucket: Bucket) -> None:
        self._compiled[bucket.key] = bucket.bytecode_to_string()

    @hookimpl
    def prepare_jinja2_environment(self, env: Environment) -> None:
        env.bytecode_cache = self


def pytest_collection_finish() -> None:
    pm.register(CompiledOnce())
    # What has been imported is not looked through again for garbage.
    gc.collect()
    gc.freeze()


def pytest_report_header() -> list[str]:
    return [f"not collected: {name} ({UNIX_ONLY[name]})" for name in collect_ignore]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        needs_unix = item.get_closest_marker("unix")
        if needs_unix and sys.platform == "win32":
            item.add_marker(pytest.mark.skip(reason=needs_unix.args[0]))
        if item.get_closest_marker("dependents") or item.get_closest_marker(
            "replication"
        ):
            item.add_marker(pytest.mark.timeout(3600))  # they install packages


@pytest.fixture(autouse=True)
def _no_secrets_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("DATASETTE_SECRETS_") and not name.endswith("_BROWSER"):
            monkeypatch.delenv(name)


@pytest.fixture
def master_key() -> str:
    """A master key, as it stands in a configuration."""
    return envelope.generate_master_key()


@pytest.fixture
def internal(tmp_path: Path) -> str:
    """The path of an internal database on disk, which does not exist yet."""
    return str(tmp_path / "internal.db")


MakeDatasette = Callable[..., Datasette]


@pytest.fixture
def make_datasette(internal: str) -> Iterator[MakeDatasette]:
    """`make_datasette(*keys, database=…, **Datasette's own)`: closed after the test.

    It keeps secrets in the internal database on disk, and root may do everything.
    """
    made: list[Datasette] = []

    def make(*keys: Any, database: str | None = None, **options: Any) -> Datasette:
        settings: dict[str, Any] = {}
        if keys:
            settings["encryption-key"] = list(keys)
        if database:
            settings["database"] = database
        config = options.pop("config", {})
        config.setdefault("plugins", {})["datasette-secrets"] = settings
        options.setdefault("internal", internal)
        datasette = Datasette(config=config, **options)
        datasette.root_enabled = True
        made.append(datasette)
        return datasette

    yield make
    for datasette in made:
        # A test may have broken its files on purpose.
        with contextlib.suppress(OSError):
            datasette.close()


@pytest.fixture
async def datasette(make_datasette: MakeDatasette, master_key: str) -> Datasette:
    """A started Datasette with one master key and an internal database on disk."""
    datasette = make_datasette(master_key)
    await datasette.invoke_startup()
    return datasette


@pytest.fixture
def admin(datasette: Datasette) -> dict[str, str]:
    """The cookies of root, who may manage secrets."""
    return {"ds_actor": datasette.client.actor_cookie({"id": "root"})}


@pytest.fixture
def console(tmp_path: Path) -> Console:
    """An operator's folder, with one master key and no database yet."""
    return Console(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB."""
    mounted = tmp_path / "small"
    mounted.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(mounted)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, timeout=300).returncode:
        # The shim of test_faults.py plays a full disk for everybody else.
        pytest.skip("mounting a small file system needs root")  # only root may mount
    yield mounted
    subprocess.run(["umount", "--lazy", mounted], check=True, timeout=300)


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of a Chromium. Without one the test is skipped, or fails where CI says so."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        if os.environ.get("DATASETTE_SECRETS_REQUIRE_BROWSER"):
            pytest.fail("no Chromium is installed, and this run requires one")
        pytest.skip("no Chromium is installed")  # a contributor may have none; CI has
    return found
