"""Several servers on one database get a new key, and no request fails meanwhile."""

from __future__ import annotations

import json
import urllib.error
from contextlib import ExitStack
from typing import Any

import pytest
from support import decoder
from support.console import Console
from support.servers import Clients, Server

from datasette_secrets import envelope

NAMES = ("A", "B", "C")


def with_key_files(console: Console) -> Console:
    """A configuration of two key files: the first with a key, the second empty."""
    first, second = console.folder / "master.key", console.folder / "old-master.key"
    first.write_text(f"{console.key}\n")
    second.touch()
    for path in (first, second):
        path.chmod(0o600)
    console.configure({"$file": str(first)}, {"$file": str(second)})
    return console


@pytest.fixture
def files(console: Console) -> Console:
    return with_key_files(console)


def keys(console: Console) -> list[str]:
    """The keys of the two files, as they are now."""
    found = [console.folder / name for name in ("master.key", "old-master.key")]
    return [path.read_text().strip() for path in found]


def introduce_a_key(console: Console, *, seconds: float = 0) -> dict[str, Any]:
    """Follow the runbook for several servers, under reads and writes."""
    for name in NAMES:
        console.ok("set", name, "--create", input=f"{name} 0")
    [old_key, _] = keys(console)
    with ExitStack() as stack:
        servers = [stack.enter_context(Server(console)) for _ in range(2)]
        clients = stack.enter_context(Clients(*servers, names=NAMES, writers=2))

        def restart_all() -> None:
            for server in servers:
                with clients.without(server):
                    server.restart()
                # The others have to live with what this one now writes.
                clients.carry_on(seconds / 8)

        clients.carry_on(seconds / 8)
        console.ok("new-key", "--second")
        restart_all()
        console.ok("new-key", "--swap")
        restart_all()
        console.ok("rotate-key")
        clients.carry_on(seconds / 8)
    [new_key, _] = keys(console)
    assert new_key != old_key
    stored = sorted(
        (row.name, row.version, row.value.decode())
        for row in decoder.open_file(str(console.internal), new_key)
    )
    first = [(name, 1, f"{name} 0") for name in NAMES]
    return {
        "failures": clients.failures,
        "requests": clients.answers.total(),
        "writes": len(clients.written),
        "as_written": stored == sorted(first + clients.written),
        "status": console.json("status"),
    }


def test_a_key_in_two_steps_fails_no_request_and_loses_no_version(
    files: Console,
) -> None:
    report = introduce_a_key(files)
    assert report["failures"] == []
    assert report["as_written"]
    assert report["writes"] > 0
    status = report["status"]
    assert status["ok"] is True
    assert [key["removable"] for key in status["keys"]] == [False, True]


def test_a_key_that_is_first_before_all_servers_have_it_fails_reads(
    files: Console,
) -> None:
    """Why it takes two steps: the test above would notice."""
    files.ok("set", "A", "--create", input="A 0")
    with Server(files) as first, Server(files) as second:
        files.configure(envelope.generate_master_key(), files.key)
        first.restart()
        first.write("A", "A 1")
        with pytest.raises(urllib.error.HTTPError) as caught:
            second.read("A")
        with caught.value as error:
            assert json.load(error) == "unknown-master-key"
