"""From the shell, beside others: a server that reads, another command, a kill, Ctrl-C."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Iterator

import pytest
from datasette import hookimpl
from datasette.plugins import pm
from support.console import Console, key_id
from support.servers import Clients, Server
from support.terminal import Terminal

from datasette_secrets import envelope

OLD, NEW = envelope.generate_master_key(), envelope.generate_master_key()


@pytest.fixture
async def old(console: Console) -> Console:
    console.key = OLD
    await console.fill("A", "GONE", versions=3)
    await console.fill("B")
    console.configure(NEW, OLD)
    return console


@pytest.mark.parametrize("journal", ["wal", "delete"])
def test_every_command_runs_beside_a_server_that_misses_no_read(
    old: Console, journal: str
) -> None:
    old.sql(f"pragma journal_mode = {journal}")
    with Server(old) as server, Clients(server, names=("B",), writers=0) as clients:
        for arguments, given in (
            (("status",), None),
            (("set", "A"), "A value 4"),
            (("import", "-"), "A=A value 5\nNEW=x\n"),
            (("list",), None),
            (("history", "A"), None),
            (("get", "A"), None),
            (("rotate-key", "--batch-size", "1"), None),
            (("rotate-key", "--new-data-keys"), None),
            (("destroy", "A", "--all-but-newest", "--yes"), None),
            (("rollback", "A", "5", "--yes"), None),
            (("delete", "GONE", "--yes"), None),
            (("upgrade", "--yes"), None),
            (("verify",), None),
        ):
            old.ok(*arguments, input=given)
            clients.carry_on()
        assert server.read("A", "B", "GONE") == ["A value 5", "B value 1", None]
        old.ok("restore", "GONE", "--yes")
        assert server.read("GONE") == ["GONE value 3"]
    assert clients.failures == []
    assert old.json("status")["ok"] is True
    used = {each["name"]: each for each in old.json("list")["secrets"]}
    assert used["B"]["last_used_by"] == "reader"


def test_a_vacuum_of_another_process_during_a_change_is_no_error(
    console: Console,
) -> None:
    """It moves tables to other pages. Datasette takes those for renamed ones."""

    class Vacuuming:
        @hookimpl(trylast=True)
        def write_wrapper(self) -> object:
            def vacuum(conn: object) -> Iterator[None]:
                console.sql("vacuum")
                yield

            return vacuum

    console.sql(*(f"create table {name} (x)" for name in ("dropped", "a", "b")))
    console.ok("set", "A", input="one")
    console.sql("drop table dropped")
    pages = "select name, rootpage from sqlite_master where name in ('a', 'b')"
    before = console.sql(pages)
    vacuuming = Vacuuming()
    pm.register(vacuuming)
    try:
        console.ok("set", "A", input="two")
    finally:
        pm.unregister(vacuuming)
    assert dict(before)["a"] == dict(console.sql(pages))["b"]
    assert console.value("A") == "two"


# Many versions


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Console:
    """Ten thousand versions, in a folder to copy."""
    console = Console(tmp_path_factory.mktemp("many"))
    console.configure(OLD)
    lines = "".join(f"N{number}=value {number}\n" for number in range(2_500))
    for _ in range(4):
        console.ok("import", "-", "--create", input=lines)
    return console


@pytest.fixture
def rotating(many: Console, console: Console) -> Console:
    """A copy of the ten thousand, with a new key in front of the old one."""
    shutil.copy(many.internal, console.internal)
    console.configure(NEW, OLD)
    return console


@pytest.fixture
def fewer(rotating: Console) -> Console:
    """A quarter of them."""
    rotating.sql("delete from datasette_secrets where id > 2500")
    return rotating


def left(console: Console) -> int:
    [(count,)] = console.sql(
        "select count(*) from datasette_secrets "
        f"where encryption_key_name != '{key_id(NEW)}'"
    )
    return int(count)


def test_ten_thousand_versions_are_rotated_and_no_value_is_touched(
    rotating: Console,
) -> None:
    query = "select id, name, version, encrypted from datasette_secrets order by id"
    before = rotating.sql(query)
    report = rotating.json("rotate-key")
    assert (report["ok"], report["changed"], left(rotating)) == (True, 10_000, 0)
    assert rotating.sql(query) == before
    rotating.configure(NEW)
    assert rotating.json("verify")["opened"] == 10_000


def test_two_rotations_at_once_both_finish_and_lose_nothing(rotating: Console) -> None:
    running = [rotating.start("rotate-key", "--json") for _ in range(2)]
    reports = []
    for process in running:
        stdout, stderr = process.communicate(timeout=60)
        assert (process.returncode, stderr) == (0, "")
        reports.append(json.loads(stdout))
    assert sum(report["changed"] for report in reports) == 10_000
    rotating.configure(NEW)
    assert rotating.json("verify")["opened"] == 10_000


def test_killed_anywhere_every_secret_opens_and_a_second_run_finishes(
    fewer: Console,
) -> None:
    while (before := left(fewer)) > 250:
        target = before - random.randrange(200, 1_200)  # noqa: S311
        process = fewer.start("rotate-key", "--batch-size", "10")
        while left(fewer) > target and process.poll() is None:
            pass
        process.kill()
        process.communicate(timeout=60)
        verified = fewer.json("verify")
        assert (verified["opened"], verified["problems"]) == (2_500, [])
    report = fewer.json("rotate-key")
    assert (report["ok"], left(fewer)) == (True, 0)


@pytest.mark.unix("Windows has no SIGINT for another process")
def test_ctrl_c_leaves_nothing_half_done_and_prints_one_line(
    fewer: Console,
) -> None:
    process = fewer.start("rotate-key", "--batch-size", "10")
    while left(fewer) == 2_500:
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert stderr.splitlines() == [
        "Error: Interrupted: no version is half done, but what was replaced or destroyed "
        "may remain in the file. Run the command again to finish"
    ]
    assert 0 < left(fewer) < 2_500
    assert fewer.json("verify")["opened"] == 2_500
    assert fewer.json("rotate-key")["ok"] is True


def test_ctrl_c_at_a_prompt_stores_nothing(old: Console) -> None:
    terminal = Terminal(old, "set", "A")
    terminal.until("Value for A")
    terminal.press_ctrl_c()
    assert terminal.end() == 1
    assert "Traceback" not in terminal.shown
    assert old.json("list")["secrets"][0]["version"] == 3


def test_long_work_shows_a_bar_on_a_terminal_and_only_there(fewer: Console) -> None:
    terminal = Terminal(fewer, "rotate-key", TERM="xterm")
    assert terminal.end() == 0
    assert "100%" in terminal.shown
    assert "Re-wrapped 2,500 versions" in terminal.shown
    assert fewer.process("verify").stderr == ""
