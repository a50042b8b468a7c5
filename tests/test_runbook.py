"""The runbook, .github/docs/operations.md, is run as it stands, and as a nervous person would.

Every section is run in a folder that stands for a machine, by the user of the service. After
whatever happens to a section, every key is still somewhere, every value that nobody took away
can be read, and no file can be read by others.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.console import key_id
from support.documents import blocks, read
from support.forks import Forks
from support.machine import ANSWER, Machine, service_user

from datasette_secrets import envelope

pytestmark = pytest.mark.skipif(
    not (shutil.which("jq") and shutil.which("sqlite3")),
    reason="the runbook uses jq and sqlite3",
)

SECTIONS = {
    heading: blocks(text, "bash")
    for heading, text in re.findall(
        r"(?ms)^##+ ([^\n]*)\n(.*?)(?=^##+ |\Z)", read("operations.md")
    )
}
[PRELUDE] = SECTIONS["Before you start"]
#: Whose commands need Litestream itself: tests/test_replication.py runs them.
WITH_LITESTREAM = {
    "Rotate and destroy",
    "Destroyed values stay in the copies",
    "Check the replica",
    "Fail over",
    "Several readers",
}
#: Which take the configuration of the key out of the file first, as they say.
FROM_THE_ENVIRONMENT = {
    "1Password": "plugins: {}\n",
    "Vault": "plugins: {}\n",
    "A cloud's secret manager": (
        "plugins:\n  datasette-secrets:\n    encryption-key:\n"
        "    - $env: MASTER_KEY\n    - $env: OLD_MASTER_KEY\n"
    ),
}
RUN_HERE = [
    heading
    for heading, commands in SECTIONS.items()
    if commands and heading not in {"Before you start", *WITH_LITESTREAM}
]
FIRST = "The first key"
YEARLY = "A new key every year"
LEAKED = "A key has leaked"
LOST = "A key is lost"
#: What may still run after a command of a block has failed: it looks, or copies go on.
HARMLESS = re.compile(
    r"datasette secrets (status|verify|list|history|key-id)\b"
    r"|sudo systemctl start litestream$"
)
#: The programs of the page that change something, or that tell whether to go on.
PROGRAMS = """cp datasette find gcloud litestream mkdir mktemp mv op rm scp sed shred sqlite3
    ssh sudo touch vault"""
#: Stands for any of these: is written down, does nothing, and fails if its turn has come.
RECORDER = """\
#!/usr/bin/env bash
echo "${0##*/} $*" >> "$MACHINE/calls"
[ "$(wc -l < "$MACHINE/calls")" -ne "$(cat "$MACHINE/failing")" ]
"""


@pytest.fixture(scope="module")
def datasette() -> Iterator[str]:
    """What starts the program `datasette` in a shell."""
    with tempfile.TemporaryDirectory(prefix="forks-") as folder:
        Path(folder).chmod(0o755)  # for the user of the service
        forks = Forks(Path(folder))
        yield forks.command
        forks.close()


@pytest.fixture(scope="module")
def prepared(datasette: str) -> Iterator[Machine]:
    """A machine on which the first section has been run, and a second secret stored."""
    machine = Machine(datasette)
    done = machine.run(PRELUDE, *SECTIONS[FIRST], "datasette secrets set OTHER .")
    assert done.code == 0, done.output
    yield machine
    machine.close()


@pytest.fixture
def machine(datasette: str, prepared: Machine) -> Iterator[Machine]:
    machine = Machine(datasette, prepared)
    yield machine
    machine.close()


@pytest.fixture
def empty(datasette: str) -> Iterator[Machine]:
    machine = Machine(datasette)
    yield machine
    machine.close()


def steps(machine: Machine, heading: str) -> list[str]:
    """The blocks of a section, once what it says has to be done by hand has been done."""
    commands = SECTIONS[heading]
    if heading in FROM_THE_ENVIRONMENT:
        machine.write(
            machine.home / "datasette.yaml", FROM_THE_ENVIRONMENT[heading], 0o644
        )
    if heading == "Restore":
        commands = SECTIONS["Back up"] + commands
    if heading == LOST:
        lost = key_id((machine.private / "master.key").read_text())
        machine.write(
            machine.private / "master.key", envelope.generate_master_key() + "\n"
        )
        commands = [each.replace("KEY_ID=…", f"KEY_ID={lost}") for each in commands]
        # Either the key is found, or it is not: that has a test of its own.
        commands = commands[:3]
    return commands


def checked(blocks: list[str]) -> list[str]:
    """The blocks, each of which has to work: `-e` overlooks what fails before a `&&`."""
    return [f"{block}\ntest $? -eq 0" for block in blocks]


def program(machine: Machine, name: str, script: str) -> None:
    """Put a script in the place of a program of the machine."""
    machine.write(machine.root / "bin" / name, script, 0o755)


def restarted(machine: Machine) -> bool:
    """Whether a server has been started since the machine was made."""
    return (machine.root / "served").exists()


def wrapped_by(machine: Machine) -> dict[str, int]:
    """How many versions each key wraps."""
    done = machine.run(PRELUDE, "datasette secrets status . --json", stop=False)
    return {key["id"]: key["versions"] for key in json.loads(done.output)["keys"]}


def problems(machine: Machine, keys: set[str], *, typed: str = "") -> list[str]:
    """What a nervous person must never find, whatever they did."""
    found = [f"others can read {path}" for path in machine.exposed()]
    lost = keys - machine.key_ids(machine.private, machine.safe)
    found += [f"the key {each} is gone" for each in lost]
    for name in ("OPENAI_API_KEY", "OTHER"):
        done = machine.run(PRELUDE, typed, f"datasette secrets get {name} .")
        if done.output != f"{ANSWER}\n":
            found.append(f"{name} cannot be read: {done.output}")
    return found


def environment(heading: str) -> str:
    """The last lines that a section gave the shell about the key."""
    if heading not in FROM_THE_ENVIRONMENT:
        return ""
    lines = "\n".join(SECTIONS[heading]).splitlines()
    found = [
        each.removesuffix(" &&")
        for each in lines
        if re.match(r"export |[A-Z_]+=\$\(", each)
    ]
    if heading == "1Password":
        found.append('datasette() { op run -- datasette "$@"; }')
    return "\n".join(found)


def test_every_section_with_commands_is_run_by_a_test() -> None:
    with_commands = {heading for heading, commands in SECTIONS.items() if commands}
    assert {"Before you start", *RUN_HERE, *WITH_LITESTREAM} == with_commands


@pytest.mark.parametrize("heading", RUN_HERE)
def test_a_section_works_as_written_and_can_be_pasted_twice(
    machine: Machine, heading: str
) -> None:
    commands = steps(machine, heading)
    keys = machine.key_ids(machine.private, machine.safe)
    done = machine.run(PRELUDE, *checked(commands))
    assert done.code == 0, done.output
    keys |= machine.key_ids(machine.private, machine.safe)
    shell = environment(heading)
    assert problems(machine, keys, typed=shell) == []
    again = machine.run(PRELUDE, *commands, stop=False)
    assert problems(machine, keys, typed=shell) == [], again.output


@pytest.mark.parametrize("heading", [each for each in SECTIONS if SECTIONS[each]])
def test_a_block_changes_nothing_more_once_one_of_its_commands_has_failed(
    machine: Machine, heading: str
) -> None:
    for name in PROGRAMS.split():
        program(machine, name, RECORDER)
    machine.write(machine.root / "media" / "backup" / "internal-1.db", "a backup")
    calls, failing = machine.root / "calls", machine.root / "failing"

    def called(block: str, number: int) -> list[str]:
        machine.write(calls, "")
        machine.write(failing, f"{number}\n")
        machine.run(PRELUDE, block, stop=False)
        return calls.read_text().splitlines()

    for block in SECTIONS[heading]:
        for number, call in enumerate(called(block, 0), 1):
            *_, failed = (done := called(block, number))[:number]
            assert failed.split()[0] == call.split()[0]
            after = [each for each in done[number:] if not HARMLESS.match(each)]
            assert after == [], failed


@pytest.mark.parametrize("heading", [YEARLY, LEAKED])
def test_without_the_safe_place_no_new_key_is_made(
    machine: Machine, heading: str
) -> None:
    before = wrapped_by(machine)
    [key] = before
    shutil.rmtree(machine.safe)
    blocks = SECTIONS[heading] if heading == YEARLY else SECTIONS[heading][:2]
    done = machine.run(PRELUDE, *blocks, stop=False)
    assert machine.key_ids(machine.private) == {key}, done.output
    assert wrapped_by(machine) == before
    assert not restarted(machine)


def test_a_new_key_that_cannot_be_copied_is_not_used(machine: Machine) -> None:
    """The disk is gone between the two blocks."""
    [make, use, _] = SECTIONS[YEARLY]
    [old_key] = wrapped_by(machine)
    assert machine.run(PRELUDE, make).code == 0
    shutil.rmtree(machine.safe)
    assert machine.run(PRELUDE, use).code
    assert [count for count in wrapped_by(machine).values() if count] == [
        wrapped_by(machine)[old_key]
    ]
    assert not restarted(machine)
    machine.safe.mkdir()
    machine.own(machine.safe)
    done = machine.run(PRELUDE, *checked([use]))
    assert done.code == 0, done.output
    assert wrapped_by(machine)[old_key] == 0
    assert restarted(machine)


@pytest.mark.parametrize("heading", [YEARLY, LEAKED])
def test_a_server_that_cannot_be_restarted_can_read_what_it_could(
    machine: Machine, heading: str
) -> None:
    before = wrapped_by(machine)
    sudo = machine.root / "bin" / "sudo"
    allowed = sudo.read_text()
    program(machine, "sudo", "#!/bin/sh\necho refused >&2\nexit 1\n")
    [make, use, *_] = SECTIONS[heading]
    done = machine.run(PRELUDE, make, use, stop=False)
    assert "refused" in done.output
    new_key = key_id((machine.private / "master.key").read_text())
    assert wrapped_by(machine) == {new_key: 0, **before}
    # In a second terminal, and then the lines below it.
    program(machine, "sudo", allowed)
    line = "sudo systemctl restart datasette"
    done = machine.run(PRELUDE, line, use.partition(line)[2].strip(" &\n"))
    assert done.code == 0, done.output
    assert problems(machine, {*before, new_key}) == []


def test_a_key_that_is_still_needed_is_missed_before_the_restart(
    machine: Machine,
) -> None:
    [make, _, remove] = SECTIONS[YEARLY]
    [old_key] = wrapped_by(machine)
    done = machine.run(PRELUDE, make)
    assert done.code == 0, done.output
    done = machine.run(PRELUDE, remove, stop=False)
    assert old_key in done.output
    assert not restarted(machine)
    [_, put, go_on, *_] = SECTIONS[LOST]
    put = put.replace("KEY_ID=…", f"KEY_ID={old_key}")
    done = machine.run(PRELUDE, *checked([put, go_on]))
    assert done.code == 0, done.output
    assert problems(machine, {old_key}) == []


def test_the_blocks_for_a_lost_key_do_not_restart_before_the_key_is_found(
    machine: Machine,
) -> None:
    machine.write(machine.private / "master.key", envelope.generate_master_key() + "\n")
    before = machine.key_ids(machine.private)
    done = machine.run(PRELUDE, *SECTIONS[LOST][:3], stop=False)
    assert machine.key_ids(machine.private) == before
    assert not restarted(machine), done.output


def test_a_database_that_is_gone_is_restored(machine: Machine) -> None:
    keys = machine.key_ids(machine.private)
    done = machine.run(PRELUDE, *checked(SECTIONS["Back up"]))
    assert done.code == 0, done.output
    (machine.private / "internal.db").unlink()
    done = machine.run(PRELUDE, *checked(SECTIONS["Restore"]))
    assert done.code == 0, done.output
    assert problems(machine, keys) == []


@pytest.mark.parametrize("content", [None, "", "not a database"])
def test_without_a_good_backup_nothing_is_stopped_or_moved(
    machine: Machine, content: str | None
) -> None:
    if content is not None:
        machine.write(machine.root / "media" / "backup" / "internal-1.db", content)
    program(machine, "sudo", RECORDER)
    machine.write(machine.root / "calls", "")
    machine.write(machine.root / "failing", "0\n")
    before = (machine.private / "internal.db").read_bytes()
    done = machine.run(PRELUDE, *SECTIONS["Restore"], stop=False)
    assert done.code
    assert (machine.root / "calls").read_text() == ""
    assert (machine.private / "internal.db").read_bytes() == before
    assert problems(machine, machine.key_ids(machine.safe)) == []


def test_the_first_key_takes_an_empty_folder(empty: Machine) -> None:
    assert list(empty.home.iterdir()) == []
    for _ in range(2):
        done = empty.run(PRELUDE, *checked(SECTIONS[FIRST]))
        assert done.code == 0, done.output
    [key] = empty.key_ids(empty.private)
    assert empty.key_ids(empty.safe) == {key}
    assert empty.exposed() == []


def test_the_first_key_leaves_a_configuration_and_a_key_as_they_are(
    empty: Machine,
) -> None:
    config = "plugins:\n  datasette-secrets:\n    encryption-key:\n    - $file: private/master.key\n"
    key = envelope.generate_master_key()
    empty.write(empty.home / "datasette.yaml", config)
    empty.private.mkdir(mode=0o700)
    empty.own(empty.private)
    empty.write(empty.private / "master.key", f"{key}\n")
    done = empty.run(PRELUDE, *SECTIONS[FIRST])
    assert done.code == 0, done.output
    assert (empty.home / "datasette.yaml").read_text() == config
    assert empty.key_ids(empty.private) == {key_id(key)}


@pytest.mark.parametrize("heading", [FIRST, YEARLY])
def test_a_block_killed_between_any_two_lines_can_be_pasted_again(
    datasette: str, prepared: Machine, heading: str
) -> None:
    step = 0
    killed = True
    while killed:
        step += 1
        machine = Machine(datasette, None if heading == FIRST else prepared)
        try:
            block = "\n".join(SECTIONS[heading][: 1 if heading == FIRST else 2])
            first = machine.run(PRELUDE, block, kill_before=step)
            killed = first.code == -9
            keys = machine.key_ids(machine.private, machine.safe)
            rest = SECTIONS[heading][1:] if heading == FIRST else []
            again = machine.run(PRELUDE, block, *rest, stop=heading == FIRST)
            assert again.code == 0, (step, again.output)
            if heading == FIRST:
                machine.run(PRELUDE, "datasette secrets set OTHER .")
            assert problems(machine, keys) == [], (step, again.output)
        finally:
            machine.close()
    assert step >= 4


def test_a_full_slot_is_used_up_before_another_key_is_made(machine: Machine) -> None:
    """The year before, `rotate-key` was forgotten."""
    forgotten = machine.run(PRELUDE, "datasette secrets new-key .")
    assert forgotten.code == 0, forgotten.output
    keys = machine.key_ids(machine.private, machine.safe)
    [make, use, _] = SECTIONS[YEARLY]
    first = machine.run(PRELUDE, make, use, stop=False)
    assert first.code == 0, first.output
    assert machine.key_ids(machine.private) == keys
    second = machine.run(PRELUDE, *checked([make, use]))
    assert second.code == 0, second.output
    assert len(machine.key_ids(machine.private)) == 3
    assert problems(machine, keys) == []


def test_a_lost_key_that_is_gone_for_good_leaves_names_and_takes_new_values(
    machine: Machine,
) -> None:
    (machine.private / "master.key").unlink()
    shutil.rmtree(machine.safe)
    machine.safe.mkdir()
    machine.own(machine.safe)
    looking, _, _, new_key, new_value, restart = SECTIONS[LOST]
    done = machine.run(PRELUDE, looking, new_key, new_value, restart, stop=False)
    assert not restarted(machine)
    listed = machine.run(PRELUDE, "datasette secrets list . --json")
    states = {
        each["name"]: each["state"] for each in json.loads(listed.output)["secrets"]
    }
    assert states["OPENAI_API_KEY"] == "stored", done.output
    assert states["OTHER"] == "needs-key"
    # What the page says of a value that nobody needs any more.
    done = machine.run(
        PRELUDE,
        "datasette secrets destroy OTHER . --version 1 --yes",
        "datasette secrets verify .",
        *checked([restart]),
    )
    assert done.code == 0, done.output
    assert restarted(machine)
    assert machine.exposed() == []


def test_a_restored_backup_that_needs_the_old_key_takes_it_from_the_safe_place(
    machine: Machine,
) -> None:
    old_key = key_id((machine.private / "master.key").read_text())
    done = machine.run(PRELUDE, *checked(SECTIONS["Back up"] + SECTIONS[YEARLY]))
    assert done.code == 0, done.output
    before = (machine.private / "internal.db").read_bytes()
    done = machine.run(PRELUDE, *SECTIONS["Restore"], stop=False)
    assert old_key in done.output
    assert (machine.private / "internal.db").read_bytes() == before
    _, put, *_ = SECTIONS[LOST]
    put = put.replace("KEY_ID=…", f"KEY_ID={old_key}")
    done = machine.run(PRELUDE, *checked([put, *SECTIONS["Restore"]]))
    assert done.code == 0, done.output
    assert (machine.private / "internal.db").read_bytes() != before
    assert problems(machine, {old_key}) == []


def test_a_credential_that_can_no_longer_be_decrypted_is_made_again_from_the_copy(
    machine: Machine,
) -> None:
    key = key_id((machine.private / "master.key").read_text())
    [first, delete] = SECTIONS["systemd"]
    done = machine.run(PRELUDE, first, delete)
    assert done.code == 0, done.output
    assert not (machine.private / "master.key").exists()
    # Another TPM.
    (machine.root / "etc" / "credstore.encrypted" / "master.key").write_text("?")
    assert machine.run(PRELUDE, "sudo systemctl restart datasette").code
    back = f'KEY_ID={key}\ncp "/media/safe/$KEY_ID.key" private/master.key'
    done = machine.run(PRELUDE, back, first, delete)
    assert done.code == 0, done.output
    assert problems(machine, {key}) == []


def test_without_a_copy_in_the_safe_place_the_key_is_not_deleted(
    machine: Machine,
) -> None:
    """The disk is full, or is not there."""
    [first, delete] = SECTIONS["systemd"]
    assert machine.run(PRELUDE, first).code == 0
    shutil.rmtree(machine.safe)
    assert machine.run(PRELUDE, delete).code
    assert (machine.private / "master.key").exists()


@pytest.mark.skipif(
    os.getuid() != 0 or service_user() == 0, reason="only root can be somebody else"
)
@pytest.mark.parametrize("heading", [FIRST, YEARLY, "Restore", "systemd"])
def test_another_user_can_change_nothing(machine: Machine, heading: str) -> None:
    def content() -> dict[str, bytes]:
        return {
            str(path): path.read_bytes()
            for path in machine.home.rglob("*")
            if path.is_file()
        }

    before = content()
    commands = steps(machine, heading)
    done = machine.run(PRELUDE, *commands, stop=False, user=service_user() - 1)
    assert "Stop. This folder belongs to" in done.output
    assert content() == before


@pytest.mark.skipif(
    os.getuid() != 0 or service_user() == 0, reason="only root can be root"
)
def test_root_is_told_to_stop_and_leaves_keys_that_the_service_can_read(
    machine: Machine,
) -> None:
    keys = machine.key_ids(machine.private, machine.safe)
    done = machine.run(PRELUDE, *SECTIONS[YEARLY], user=0)
    assert "Stop. This folder belongs to" in done.output
    again = machine.run(PRELUDE, "datasette secrets status .")
    assert again.code == 0, again.output
    for path in machine.private.iterdir():
        assert path.stat().st_uid == service_user(), path
    assert keys <= machine.key_ids(machine.private, machine.safe)
