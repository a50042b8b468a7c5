"""Runs commands of `datasette`, each in a forked process: a start of Python for all.

    python -m support.forks
    python -m support.forks SOCKET

Without SOCKET: reads a JSON object a line: `arguments`, `stdin`, and `environment` to add.
Answers with a line each: `status`, `stdout`, `stderr`.

With SOCKET: takes the place of the program `datasette` in scripts. Each command has the
folder, environment, umask, user and files of the client that asks for it.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from click.testing import CliRunner
from support.console import Console

#: The program that asks. Without its site packages, Python takes hardly any time to start.
CLIENT = """
import json, os, socket, sys
mask = os.umask(0o077)
os.umask(mask)
job = {{"arguments": sys.argv[1:], "folder": os.getcwd(), "umask": mask}}
job["environment"] = dict(os.environ)
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    socket.send_fds(server, [json.dumps(job).encode() + b"\\0"], [0, 1, 2])
    sys.exit(int(server.recv(16) or b"70"))
"""


def warm_up() -> None:
    """Do here once what every fork would do again: import, compile and cache."""
    from datasette.cli import cli

    with tempfile.TemporaryDirectory() as folder:
        console = Console(Path(folder))
        console.ok("set", "A", "--create", input="a value")
        for name in ("rotate-key", "status", "list"):
            console.ok(name)
        serve = ["serve", *console.options, "--get", "/-/versions.json"]
        assert CliRunner().invoke(cli, serve).exit_code == 0
    gc.freeze()


class Forks:
    """The process that forks. `command` starts a command of `datasette` in a shell."""

    def __init__(self, folder: Path) -> None:
        address, client = folder / "forks.sock", folder / "forks_client.py"
        client.write_text(CLIENT.format(address=str(address)))
        client.chmod(0o644)
        self.command = f"'{sys.executable}' -IS '{client}'"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.forks", str(address)],
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def close(self) -> None:
        self._process.kill()
        self._process.communicate(timeout=60)


def command(arguments: list[str], files: list[int]) -> int:
    """Run a command in this process, which is a fork, with these as its 0, 1 and 2."""
    from datasette.cli import cli

    for number, file in enumerate(files):
        os.dup2(file, number)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  # for as long as it runs
    try:
        status = cli(arguments, "datasette", standalone_mode=True)
    except SystemExit as left:
        status = left.code
    sys.stdout.flush()
    sys.stderr.flush()
    return status if isinstance(status, int) else int(status is not None)


def run(job: dict[str, Any]) -> dict[str, Any]:
    with (
        tempfile.TemporaryFile() as stdin,
        tempfile.TemporaryFile() as stdout,
        tempfile.TemporaryFile() as stderr,
    ):
        stdin.write(job["stdin"].encode())
        stdin.seek(0)
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            os.environ.update(job["environment"])
            files = [stdin.fileno(), stdout.fileno(), stderr.fileno()]
            os._exit(command(job["arguments"], files))
        _, status = os.waitpid(pid, 0)
        stdout.seek(0)
        stderr.seek(0)
        return {
            "status": os.waitstatus_to_exitcode(status),
            "stdout": stdout.read().decode("utf-8", "replace"),
            "stderr": stderr.read().decode("utf-8", "replace"),
        }


def serve(address: str) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        os.chmod(address, 0o666)  # noqa: S103  # another user may ask
        listening.listen(64)
        print("ready", flush=True)
        while True:
            asking, _ = listening.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                asking.sendall(str(answer(asking)).encode())
                os._exit(0)
            asking.close()


def answer(asking: socket.socket) -> int:
    """Become what asks, but for its number, and run its command."""
    received, files, *_ = socket.recv_fds(asking, 1 << 20, 3)
    while not received.endswith(b"\0"):
        received += asking.recv(1 << 20)
    job = json.loads(received[:-1])
    layout = "3i"
    peer = asking.getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize(layout)
    )
    _, user, group = struct.unpack(layout, peer)
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(group)
        os.setuid(user)
    os.chdir(job["folder"])
    os.umask(job["umask"])
    os.environ.clear()
    os.environ.update(job["environment"])
    return command(job["arguments"], files)


def main() -> None:
    warm_up()
    if sys.argv[1:]:
        serve(sys.argv[1])
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
