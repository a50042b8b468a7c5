"""`make run`: the link that it prints signs in, and Ctrl-C ends it cleanly."""

from __future__ import annotations

import fcntl
import http.cookiejar
import os
import pty
import select
import shutil
import signal
import socket
import subprocess
import sys
import termios
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.documents import ROOT


class Run:
    """A command on a terminal of its own, in a copy of what `make run` needs."""

    def __init__(self, folder: Path, *command: str) -> None:
        self._terminal, other_end = pty.openpty()
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=other_end,
            stdout=other_end,
            stderr=other_end,
            start_new_session=True,
            # Only the session's own terminal turns a key into a signal.
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(other_end)
        self.shown = ""

    def link(self) -> str:
        """The last line, once it is whole."""
        end = time.monotonic() + 60
        while "token=" not in self.shown or not self.shown.endswith("\n"):
            assert time.monotonic() < end, self.shown
            assert self.read(), self.shown
        return self.shown.splitlines()[-1]

    def press_ctrl_c(self) -> int:
        """Press it; the exit code."""
        os.write(self._terminal, b"\x03")
        end = time.monotonic() + 60
        while self.process.poll() is None:
            self.read(0.1)
            assert time.monotonic() < end, "not at its end after a minute"
        while self.read(0):
            pass
        return self.process.wait(timeout=60)

    def read(self, seconds: float = 60) -> bool:
        if not select.select([self._terminal], [], [], seconds)[0]:
            return False
        try:
            got = os.read(self._terminal, 4096)
        except OSError:  # how Linux says that the other side has ended
            return False
        self.shown += got.decode()
        return bool(got)

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(timeout=60)
        os.close(self._terminal)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The server keeps what it needs in .run beside its scripts."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


@pytest.fixture
def server(folder: Path) -> Iterator[Run]:
    run = Run(folder, sys.executable, "scripts/run.py", "--port", free_port())
    yield run
    run.close()


@pytest.fixture
def make(folder: Path) -> Iterator[Run]:
    # The environment is there, so that make installs nothing.
    installed = ["-o", f"{sys.prefix}/.base", f"VENV={sys.prefix}"]
    run = Run(folder, "make", "run", *installed, f"PORT={free_port()}")
    yield run
    run.close()


def test_the_last_line_is_a_link_that_signs_in_and_leads_to_the_list(
    server: Run,
) -> None:
    cookies = urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar())
    with urllib.request.build_opener(cookies).open(server.link(), timeout=60) as answer:
        assert answer.url.endswith("/-/secrets")
        assert answer.status == 200
        assert "WEATHER_API_KEY" in answer.read().decode()


def test_the_commands_that_it_prints_use_the_shell_on_the_same_instance(
    server: Run, folder: Path
) -> None:
    server.link()
    lines = server.shown.partition("in another terminal:")[2].splitlines()[1:3]
    done = subprocess.run(
        ["sh", "-ec", "\n".join(lines)],
        cwd=folder.parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WEATHER_API_KEY" in done.stdout


def test_new_key_works_on_the_instance(server: Run, folder: Path) -> None:
    server.link()
    keys = [folder / ".run" / name for name in ("master.key", "old-master.key")]
    assert [bool(key.read_text()) for key in keys] == [True, False]
    assert [key.stat().st_mode & 0o077 for key in keys] == [0, 0]
    _, line = server.shown.partition("in another terminal:")[2].splitlines()[1:3]
    done = subprocess.run(
        ["sh", "-ec", line.replace("secrets list", "secrets new-key")],
        cwd=folder / ".run",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert all(key.read_text() for key in keys)


def test_ctrl_c_ends_the_server_with_exit_code_0_and_without_a_word(
    server: Run,
) -> None:
    server.link()
    before = server.shown
    assert server.press_ctrl_c() == 0
    assert server.shown.removeprefix(before).strip() in ("", "^C")


def test_ctrl_c_ends_make_run_without_an_error(make: Run) -> None:
    make.link()
    before = make.shown
    # make itself ends by the signal, as everything does that a shell started with it.
    assert make.press_ctrl_c() in (0, -signal.SIGINT)
    assert "Error" not in make.shown.removeprefix(before)
