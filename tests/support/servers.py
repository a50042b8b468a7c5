"""Real `datasette serve` processes on one database, and clients that never stop asking."""

from __future__ import annotations

import http.client
import json
import random
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

from support.console import DATASETTE, Console, environment

#: A plugin that makes the Python API reachable from outside of the process.
PLUGIN = """
from datasette import Response, hookimpl
from datasette_secrets import SecretsError, get_secret, set_secret

async def read(datasette, request):
    names = request.args.getlist("name")
    try:
        return Response.json([await get_secret(datasette, name, "reader") for name in names])
    except SecretsError as error:
        return Response.json(error.code, status=500)

async def write(datasette, request):
    name, value = request.args["name"], request.args["value"]
    try:
        return Response.json(await set_secret(datasette, name, value, actor_id="writer"))
    except SecretsError as error:
        return Response.json(error.code, status=500)

@hookimpl
def register_routes():
    return [(r"^/-/read$", read), (r"^/-/write$", write)]
"""
DEADLINE = 60


class Server:
    """One server process. `restart` reads the configuration again."""

    def __init__(self, console: Console) -> None:
        plugins = console.folder / "plugins"
        plugins.mkdir(exist_ok=True)
        plugins.joinpath("reading.py").write_text(PLUGIN)
        self._command = [
            *(*DATASETTE, "serve", "--port", "0", "--plugins-dir", str(plugins)),
            *console.options,
        ]
        self._folder = console.folder
        self.log: list[str] = []
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._command,
            cwd=self._folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        self._address = ""
        answers = threading.Event()
        self._reader = threading.Thread(target=self._read_log, args=(answers,))
        self._reader.start()
        assert answers.wait(DEADLINE), self.log
        assert self._address, self.log

    def _read_log(self, answers: threading.Event) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as stream:
            for line in stream:
                self.log.append(line)
                if "Uvicorn running on http://" in line:
                    self._address = line.split("Uvicorn running on http://")[1].split()[
                        0
                    ]
                    answers.set()
        answers.set()

    def stop(self) -> None:
        """As a service manager does. Requests that have begun are answered first."""
        self._process.terminate()
        try:
            self._process.wait(DEADLINE)
        finally:
            self._process.kill()
            self._process.wait(DEADLINE)
            self._reader.join(DEADLINE)
        assert not self._reader.is_alive()

    def restart(self) -> None:
        self.stop()
        self.start()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def read(self, *names: str) -> list[str | None]:
        """What `get_secret` returns for each. A refusal is an HTTPError."""
        found: list[str | None] = self._ask("read", [("name", name) for name in names])
        return found

    def write(self, name: str, value: str) -> int:
        """The version that `set_secret` gave this value."""
        return int(self._ask("write", [("name", name), ("value", value)]))

    def get(self, path: str, cookies: str = "") -> tuple[int, str]:
        """The status and text of a page. Redirects are not followed."""
        conn = http.client.HTTPConnection(self._address, timeout=DEADLINE)
        with closing(conn):
            conn.request("GET", path, headers={"Cookie": cookies})
            answer = conn.getresponse()
            return answer.status, answer.read().decode()

    def _ask(self, what: str, arguments: list[tuple[str, str]]) -> Any:
        url = f"http://{self._address}/-/{what}?{urllib.parse.urlencode(arguments)}"
        with urllib.request.urlopen(url, timeout=DEADLINE) as response:
            return json.load(response)


class Clients:
    """Threads that read and write without a pause, through whichever servers are up.

    A value begins with the name of its secret, so that a reader knows a foreign one.
    """

    def __init__(self, *servers: Server, names: tuple[str, ...], writers: int) -> None:
        self._servers = list(servers)
        self._names = names
        self._asked: Counter[Server] = Counter()
        self._changed = threading.Condition()
        self._over = False
        self.failures: list[str] = []
        self.answers: Counter[Server] = Counter()
        self.written: list[tuple[str, int, str]] = []
        jobs = [self._read] * 2 + [self._write] * writers
        self._threads = [
            threading.Thread(target=self._go_on, args=(job, number))
            for number, job in enumerate(jobs)
        ]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        for thread in self._threads:
            thread.join(DEADLINE)
            assert not thread.is_alive()

    @contextmanager
    def without(self, server: Server) -> Iterator[None]:
        """Send `server` nothing, as a load balancer does for a restart."""
        with self._changed:
            self._servers.remove(server)
            assert self._changed.wait_for(lambda: not self._asked[server], DEADLINE)
        yield
        with self._changed:
            self._servers.append(server)

    def carry_on(self, seconds: float = 0) -> None:
        """Until every server that is up has answered thirty more requests."""
        ends = time.monotonic() + seconds
        with self._changed:
            before = self.answers.copy()
            assert self._changed.wait_for(
                lambda: (
                    time.monotonic() >= ends
                    and all(self.answers[s] >= before[s] + 30 for s in self._servers)
                ),
                DEADLINE + seconds,
            ), self.failures[:3]

    def _go_on(self, job: Any, number: int) -> None:
        chance = random.Random(number)  # noqa: S311  # not for keys
        count = 0
        while not self._over:
            count += 1
            with self._changed:
                server = chance.choice(self._servers)
                self._asked[server] += 1
            failure = None
            try:
                job(server, chance.choice(self._names), f"{number}.{count}")
            except urllib.error.HTTPError as error:
                with error:
                    failure = f"{job.__name__}: {error.read().decode()}"
            except (OSError, ValueError) as error:
                failure = f"{job.__name__}: {type(error).__name__}"
            with self._changed:
                self._asked[server] -= 1
                self.answers[server] += 1
                if failure:
                    self.failures.append(failure)
                self._changed.notify_all()

    def _read(self, server: Server, name: str, unique: str) -> None:
        [value] = server.read(name)
        if value is None or not value.startswith(f"{name} "):
            raise ValueError

    def _write(self, server: Server, name: str, unique: str) -> None:
        value = f"{name} {unique}"
        version = server.write(name, value)
        with self._changed:
            self.written.append((name, version, value))
