"""Ctrl-C always ends a command, at whatever instant it comes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.console import Console
from support.terminal import Terminal
from test_cli_refusals import COMMANDS, filled
from test_faults import HERE

from datasette_secrets.cli import interrupt

__all__ = ["filled"]

SENTENCE = (
    "Error: Interrupted: nothing is half done, and the command can be run again\n"
)
#: What a command says that may have made its change.
LOOK = (
    "Error: Interrupted: nothing is half done, but the change may have been made. Before "
    "you run the command again, look at 'datasette secrets log {options}'\n"
)
#: What a command says that cleans the file after its change.
CLEAN = (
    "Error: Interrupted: no version is half done, but what was replaced or destroyed may "
    "remain in the file. Run the command again to finish\n"
)
THAT_CLEAN = ("rotate-key", "upgrade", "destroy", "destroy-row")
THAT_READ = ("status", "verify", "list", "history", "get", "check", "log")
#: Every callback is tried for these, and every seventh for the others.
EVERY_ONE = ("list", "set", "rotate-key")
#: They find nothing left to do when they did it before they were interrupted.
ONCE = ("restore", "destroy", "destroy-row")
#: A plugin whose check accepts any value.
CHECKING = """
from datasette import hookimpl
from datasette_secrets import Secret

async def accept(value):
    return True

@hookimpl
def register_secrets():
    return [Secret("OPENAI", check=accept)]
"""


@pytest.fixture(scope="module")
def interrupted() -> Iterator[subprocess.Popen[str]]:
    """The process that interrupts its forks."""
    with subprocess.Popen(
        [sys.executable, "-m", "support.interrupted"],
        cwd=HERE,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_before_any_callback_ends_the_command_with_its_sentence(
    filled: Console,
    name: str,
    tmp_path_factory: pytest.TempPathFactory,
    interrupted: subprocess.Popen[str],
) -> None:
    arguments, given = COMMANDS[name]
    options = ["-c", filled.config.name, "--internal", filled.internal.name]
    if name == "check":
        plugins = filled.folder / "plugins"
        plugins.mkdir()
        (plugins / "checking.py").write_text(CHECKING)
        options += ["--plugins-dir", plugins.name]
    job = {
        "arguments": ["secrets", *arguments, *options],
        "stdin": given or "",
        "pristine": str(filled.folder),
        "work": str(tmp_path_factory.mktemp("interrupted") / "work"),
        "callbacks": 100,
        "first": 1 if name in EVERY_ONE else 1 + list(COMMANDS).index(name) % 7,
        "step": 1 if name in EVERY_ONE else 7,
    }
    assert interrupted.stdin
    assert interrupted.stdout
    interrupted.stdin.write(json.dumps(job) + "\n")
    interrupted.stdin.flush()
    report = json.loads(interrupted.stdout.readline())
    assert report
    sentence = SENTENCE if name in THAT_READ else LOOK.format(options=" ".join(options))
    sentence = CLEAN if name in THAT_CLEAN else sentence
    for code, said, again in report:
        assert (code, said) in (("1", sentence), ("0", "")), (code, said)
        assert again == "0" or name in ONCE, again
    assert any(code == "1" for code, _, _ in report)
    filled.internal = Path(str(job["work"])) / filled.internal.name
    filled.options[-1] = str(filled.internal)
    assert filled.json("verify")["problems"] == []


def hanging(console: Console) -> subprocess.Popen[str]:
    """A command that waits for what never comes: a FIFO that nobody writes to."""
    fifo = console.folder / "fifo"
    os.mkfifo(fifo)
    return console.start(
        "set", "OPENAI", "--value-file", str(fifo), preexec_fn=receive_sigint
    )


def wait_until_asleep(pid: int) -> None:
    """Wait until the process sleeps in a system call.

    Python handles a signal that arrives just before a blocking call only after that call.
    A person would press Ctrl-C again. Without /proc, this does not wait.
    """
    state = Path(f"/proc/{pid}/stat")
    ends = time.monotonic() + 60
    while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "S":
        assert time.monotonic() < ends, "not asleep after a minute"


def receive_sigint() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_ctrl_c_ends_what_waits_for_a_value(filled: Console) -> None:
    process = hanging(filled)
    # Opening a FIFO for writing waits for its reader.
    fifo = os.open(filled.folder / "fifo", os.O_WRONLY)
    wait_until_asleep(process.pid)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    os.close(fifo)
    assert (process.returncode, said) == (1, SENTENCE)


def test_ctrl_c_ends_a_check_that_waits_in_a_thread(filled: Console) -> None:
    plugins = filled.folder / "plugins"
    plugins.mkdir()
    waiting = (
        "    print('waiting', flush=True)\n    await asyncio.to_thread(time.sleep, 150)"
    )
    (plugins / "checking.py").write_text(
        f"import asyncio, time\n{CHECKING}".replace("    return True", waiting)
    )
    filled.options += ["--plugins-dir", str(plugins)]
    process = filled.start("check", "OPENAI", preexec_fn=receive_sigint)
    assert process.stdout
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (1, SENTENCE)


def test_ctrl_c_just_before_a_prompt_ends_the_prompt() -> None:
    asked = []

    async def command() -> None:
        signal.raise_signal(signal.SIGINT)
        with interrupt.blocking():
            asked.append(True)

    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupt.run(command(), lambda: None)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not asked


def test_a_second_ctrl_c_exits_whatever_the_command_waits_for(filled: Console) -> None:
    """Its output goes to a pipe that is full and that nobody reads."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    try:
        while True:
            os.write(writing, b"." * 65_536)
    except BlockingIOError:
        os.set_blocking(writing, True)
    script = (
        "import os, signal, threading\n"
        "from datasette_secrets.cli import interrupt, output\n"
        "from datasette.cli import cli\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def echo(*_):\n"
        "    for delay in (0.5, 1.0):\n"
        "        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "    os.write(1, b'x' * 65_536)\n"
        "output.print_rows = echo\n"
        "cli()\n"
    )
    line = [sys.executable, "-c", script, "secrets", "list", *filled.options]
    done = subprocess.run(line, stdout=writing, check=False, timeout=120)
    os.close(reading)
    os.close(writing)
    assert done.returncode == 130


def test_a_sigint_that_is_ignored_stays_ignored(filled: Console) -> None:
    fifo = filled.folder / "fifo"
    os.mkfifo(fifo)
    process = filled.start(
        "set",
        "OPENAI",
        "--value-file",
        str(fifo),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    with open(fifo, "w") as file:
        process.send_signal(signal.SIGINT)
        file.write("OPENAI value 3")
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert filled.value("OPENAI") == "OPENAI value 3"


# What a terminal cuts, and what never ends


@pytest.mark.parametrize("length", [1_000, 4_094, 4_095, 65_536])
def test_a_typed_value_is_stored_whole_or_refused(filled: Console, length: int) -> None:
    value = ("0123456789" * 7_000)[:length]
    terminal = Terminal(filled, "set", "OPENAI")
    terminal.until("(hidden, single line)")
    terminal.type(value)
    if length < 1_023 or (sys.platform == "linux" and length < 4_095):
        terminal.until("Repeat for confirmation")
        terminal.type(value)
        assert terminal.end() == 0, terminal.shown
        assert filled.value("OPENAI") == value
    else:
        assert terminal.end() == 1
        assert "--value-file" in terminal.shown
        assert filled.value("OPENAI") == "OPENAI value 2"
    assert "0123456789" not in terminal.shown + terminal.left


@pytest.mark.parametrize("arguments", [("set", "A", "--value-file"), ("import",)])
def test_a_device_that_never_ends_is_refused(
    filled: Console, arguments: tuple[str, ...]
) -> None:
    done = filled.process(*arguments, "/dev/zero")
    assert done.returncode == 1
    assert "more than" in done.stderr


def test_a_pipe_that_never_ends_is_refused(filled: Console) -> None:
    with subprocess.Popen(["yes"], stdout=subprocess.PIPE) as endless:
        for arguments in (("set", "A"), ("import", "-")):
            done = filled.process(*arguments, stdin=endless.stdout)
            assert "more than" in done.stderr
        endless.kill()


def test_control_characters_of_a_value_do_not_reach_a_terminal(filled: Console) -> None:
    value = "one\n\ttwo\x1b]0;title\x07\u202e"
    filled.ok("set", "OPENAI", input=value)
    terminal = Terminal(filled, "get", "OPENAI")
    assert terminal.end() == 0
    assert "two\\x1b]0;title\\x07\\u202e" in terminal.shown
    assert "\x1b]" not in terminal.shown
    assert filled.value("OPENAI") == value


def test_a_database_made_by_create_is_for_its_owner_alone(console: Console) -> None:
    before = os.umask(0o022)
    try:
        console.ok("set", "A", "--create", input="1")
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)
    assert console.internal.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", sorted({*COMMANDS} - {"set", "import"}))
def test_only_what_stores_something_makes_a_database(
    console: Console, name: str
) -> None:
    arguments, _ = COMMANDS[name]
    said = console.refused(*arguments, "--create", code=2)
    assert str(console.internal) in said
    assert "--create" not in said
    assert not console.internal.exists()
