"""A command on a terminal of its own, as somebody sits before it."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time

import pytest
from support.console import Console, environment

if sys.platform != "win32":
    import fcntl
    import pty
    import termios


class Terminal:
    def __init__(self, console: Console, *arguments: str, **variables: str) -> None:
        if sys.platform == "win32":
            pytest.skip("Windows has no terminal that a test can play")  # no pty
        self._master, slave = pty.openpty()
        self._process = subprocess.Popen(
            console.command(*arguments),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment(**variables),
            start_new_session=True,
            # Only the session's own terminal turns a key into a signal.
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        self._slave = slave
        self.shown = ""
        #: What was typed, and the command did not read: a shell would.
        self.left = ""

    def until(self, text: str) -> None:
        """Wait until the command has shown this."""
        while text not in self.shown:
            assert self._read(), self.shown

    def type(self, line: str) -> None:
        typed = line.encode(errors="surrogateescape") + b"\n"
        while typed:
            typed = typed[os.write(self._master, typed) :]

    def press_ctrl_c(self) -> None:
        os.write(self._master, b"\x03")

    def end(self) -> int:
        """Wait for the end of the command; its exit code."""
        ended = time.monotonic() + 60
        while self._process.poll() is None:
            self._read(0.1)
            assert time.monotonic() < ended, "not at its end after a minute"
        while self._read(0):
            pass
        while select.select([self._slave], [], [], 0)[0]:
            self.left += os.read(self._slave, 4096).decode("utf-8", "replace")
        os.close(self._slave)
        os.close(self._master)
        return self._process.wait(timeout=60)

    def _read(self, seconds: float = 60) -> bool:
        if not select.select([self._master], [], [], seconds)[0]:
            assert seconds < 60, "nothing for a minute"
            return False
        try:
            got = os.read(self._master, 4096)
        except OSError:  # how Linux says that the other side has ended
            got = b""
        self.shown += got.decode("utf-8", "replace")
        return bool(got)
