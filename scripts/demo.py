"""Plays the whole story against a real server, over HTTP, and checks every step.

A key, a secret stored through the form, a plugin that reads it, a database file that
does not show it, and a new key that takes over while the plugin goes on reading.
Exits 0 only if all of it held. Everything happens in a temporary folder.
"""

from __future__ import annotations

import base64
import http.cookiejar
import json
import os
import re
import secrets
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from html.parser import HTMLParser
from pathlib import Path

SECRET_NAME = "WEATHER_API_KEY"  # what the example plugin registers
EXAMPLE_PLUGIN = Path(__file__).resolve().parent / "example_plugin"
DATASETTE = [sys.executable, "-m", "datasette"]
PATIENCE = 60  # seconds for a server to start, or for a command to end


class DemoFailed(Exception):
    """A step did not hold."""


def main() -> int:
    os.umask(0o077)
    # So that the server and the folder go even when this process is told to.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="datasette-secrets-demo-") as folder:
        try:
            play(Instance(Path(folder)))
        except DemoFailed as failure:
            print(f"FAILED: {failure}", file=sys.stderr)
            return 1
    print("All checks passed.")
    return 0


def play(instance: Instance) -> None:
    value = f"weather-{secrets.token_urlsafe(24)}"

    first = instance.make_key("first-key.txt")
    say("Made a master key, in a file that only its owner can read")

    with instance.serve(first) as visitor:
        say("Started a server that has the key")
        visitor.sign_in()
        say("Signed in as root, through the link that the server printed")
        expect(visitor.listed_state(), "not-set", "the state in the list")
        expect(visitor.plugin_state(), "not set", "what the plugin reports")
        say(f"{SECRET_NAME} is listed as not set, and the example plugin agrees")
        visitor.store(value)
        expect(visitor.listed_state(), "stored", "the state in the list")
        say("Stored a value through the form")
        expect(visitor.plugin_state(), "readable", "what the plugin reports")
        say("The example plugin reads it")
        searched = instance.search_files(value)
        say(f"The value is not to be found in {searched}")

    second = instance.make_key("second-key.txt")
    say("Made a second master key")

    with instance.serve(second, first) as visitor:
        say("Restarted with both keys, the new one first")
        with visitor.reading_on() as reads:
            instance.rotate()
        say(f"Rotated, while the plugin read the secret {len(reads)} times")

    with instance.serve(second) as visitor:
        expect(visitor.plugin_state(), "readable", "what the plugin reports")
        say("Restarted with the new key alone: the plugin still reads the secret")
        instance.search_files(value)
        say("The value is still not to be found in the files")

    with instance.serve(first) as visitor:
        expect(visitor.plugin_error(), "unknown-master-key", "the plugin's error")
        say("Restarted with the old key alone: it can no longer decrypt anything")


def say(step: str) -> None:
    print(f"ok  {step}", flush=True)


def expect(actual: object, expected: object, what: str) -> None:
    if actual != expected:
        raise DemoFailed(f"{what} is {actual!r}, not {expected!r}")


class Instance:
    """A Datasette with its folder: key files, configuration, internal database, log."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.log = folder / "server.log"
        # Signs cookies: kept across restarts, as a real installation does.
        cookie_secret = secrets.token_hex(32)
        self.environment = os.environ | {
            "DATASETTE_SECRET": cookie_secret,
            "PYTHONUNBUFFERED": "1",
        }
        # What the outside sets for a Datasette of its own has no place in this one.
        for name in [n for n in self.environment if n.startswith("DATASETTE_SECRETS_")]:
            del self.environment[name]
        # With a write-ahead log there is one more file that could show the value.
        with closing(sqlite3.connect(folder / "internal.db")) as connection:
            connection.execute("pragma journal_mode = wal")
        self.arguments = [
            *("--root", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--config", "datasette.yaml", "--internal", "internal.db"),
            *("--plugins-dir", str(EXAMPLE_PLUGIN)),
        ]

    def make_key(self, name: str) -> str:
        """Return the name of a new file with a new master key, mode 0600."""
        path = self.folder / name
        path.write_text(self.run("secrets", "generate-encryption-key"), "utf-8")
        expect(path.stat().st_mode & 0o077, 0, f"access to {name} for others")
        return name

    def rotate(self) -> None:
        self.run("secrets", "rotate-key", *self.arguments)

    def run(self, *arguments: str) -> str:
        """Run a datasette command in the folder and return what it prints."""
        command = [*DATASETTE, *arguments]
        finished = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        if finished.returncode:
            name = " ".join(arguments[:2])
            raise DemoFailed(
                f"datasette {name} exited {finished.returncode}: {finished.stderr}"
            )
        return finished.stdout

    @contextmanager
    def serve(self, *key_files: str) -> Iterator[Visitor]:
        """Run a server with these master keys, newest first, until the block ends."""
        self.configure(key_files)
        with self.log.open("w") as output:
            server = subprocess.Popen(
                [*DATASETTE, "serve", *self.arguments],
                cwd=self.folder,
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            try:
                yield Visitor(self.port, self.wait_for_login_link(server))
            except DemoFailed as failure:
                raise DemoFailed(f"{failure}\n{self.last_words()}") from None
            finally:
                stop(server)

    def configure(self, key_files: tuple[str, ...]) -> None:
        keys = [{"$file": name} for name in key_files]
        config = {"plugins": {"datasette-secrets": {"encryption-key": keys}}}
        # JSON is YAML.
        (self.folder / "datasette.yaml").write_text(json.dumps(config), "utf-8")

    def wait_for_login_link(self, server: subprocess.Popen) -> str:
        """Return the link once the server has said that it listens."""
        deadline = time.monotonic() + PATIENCE
        while server.poll() is None and time.monotonic() < deadline:
            log = self.log.read_text("utf-8", "replace")
            link = re.search(r"http://\S+/-/auth-token\?token=\S+", log)
            if link and "Uvicorn running on" in log:
                return link.group()
            time.sleep(0.05)
        raise DemoFailed("the server did not start")

    def last_words(self) -> str:
        log = self.log.read_text("utf-8", "replace").splitlines()
        return "\n".join(["The last that the server said:", *log[-20:]])

    def search_files(self, value: str) -> str:
        """Refuse to find the value in any file of the database; say which there are."""
        files = sorted(self.folder.glob("internal.db*"))
        contents = {file.name: file.read_bytes() for file in files}
        # If the search cannot find even the secret's name, it proves nothing.
        if not any(SECRET_NAME.encode() in content for content in contents.values()):
            raise DemoFailed(
                f"not even the name {SECRET_NAME} is in {', '.join(contents)}"
            )
        for name, content in contents.items():
            for form, needle in forms_of(value.encode()):
                if needle in content:
                    raise DemoFailed(f"the value is in {name}, {form}")
        return ", ".join(contents)


def stop(server: subprocess.Popen) -> None:
    server.terminate()
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait(timeout=60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def forms_of(value: bytes) -> Iterator[tuple[str, bytes]]:
    """The shapes in which a value could lie in a file."""
    yield "as it is", value
    yield "in hex", value.hex().encode()
    yield "in hex", value.hex().upper().encode()
    for offset in range(3):
        # Base64 differs with the bytes before the value. Characters that the
        # neighbouring bytes also decide are left out at both ends.
        encoded = base64.b64encode(bytes(offset) + value)
        start, end = -(-offset * 8 // 6), (offset + len(value)) * 8 // 6
        yield "in base64", encoded[start:end]
        yield "in base64", encoded[start:end].translate(bytes.maketrans(b"+/", b"-_"))


class Visitor:
    """A browser without a screen: keeps cookies, fills in forms, follows no redirect."""

    def __init__(self, port: int, login_link: str) -> None:
        self.base = f"http://127.0.0.1:{port}"
        self.login_link = login_link
        cookies = urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar())
        no_proxy = urllib.request.ProxyHandler({})
        self.opener = urllib.request.build_opener(no_proxy, cookies, StayHere())

    def sign_in(self) -> None:
        status, _ = self.request(self.login_link)
        expect(status, 302, "the answer to the login link")

    def listed_state(self) -> str | None:
        return self.find("/-/secrets", "data-secret", SECRET_NAME).get("data-state")

    def store(self, value: str) -> None:
        path = f"/-/secrets/{SECRET_NAME}"
        version = self.find(path, "name", "expected_version").get("value")
        fields = {
            "secret": value,
            "note": "Stored by the demo",
            "expected_version": version or "",
        }
        status, headers = self.request(self.base + path, fields)
        expect(status, 302, "the answer to the form")
        expect(
            urllib.parse.urlsplit(headers["location"]).path,
            "/-/secrets",
            "where the form leads",
        )

    def plugin_state(self) -> str:
        return self.plugin_report()["state"]

    def plugin_error(self) -> str:
        error = self.plugin_report()["error"]
        return error and error["code"]

    def plugin_report(self) -> dict:
        return json.loads(self.body("/-/weather.json"))

    @contextmanager
    def reading_on(self) -> Iterator[list[str]]:
        """Let the plugin read without a pause while the block runs; all must succeed."""
        states: list[str] = []
        done = threading.Event()

        def read() -> None:
            while not done.is_set():
                try:
                    states.append(self.plugin_state())
                except (DemoFailed, OSError, ValueError) as error:
                    states.append(repr(error))

        reader = threading.Thread(target=read)
        reader.start()
        try:
            wait_until(lambda: states)
            yield states
            seen = len(states)
            wait_until(lambda: len(states) > seen)
        finally:
            done.set()
            reader.join(60)
        expect(set(states), {"readable"}, "what the plugin reported meanwhile")

    def find(self, path: str, attribute: str, value: str) -> dict[str, str | None]:
        """The attributes of the first element on a page that has this one."""
        finder = Finder(attribute, value)
        finder.feed(self.body(path))
        if finder.found is None:
            raise DemoFailed(f"{path} has no element with {attribute}={value}")
        return finder.found

    def body(self, path: str) -> str:
        with self.open(self.base + path) as response:
            expect(response.status, 200, f"the answer to {path}")
            return response.read().decode()

    def request(self, url: str, fields: dict[str, str] | None = None):
        with self.open(url, fields) as response:
            return response.status, response.headers

    def open(self, url: str, fields: dict[str, str] | None = None):
        form = urllib.parse.urlencode(fields).encode() if fields else None
        try:
            return self.opener.open(url, form, timeout=PATIENCE)
        except urllib.error.HTTPError as response:
            return response


class StayHere(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        return None


class Finder(HTMLParser):
    def __init__(self, attribute: str, value: str) -> None:
        super().__init__()
        self.wanted = (attribute, value)
        self.found: dict[str, str | None] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.found is None and self.wanted in attrs:
            self.found = dict(attrs)


def wait_until(condition) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise DemoFailed("the plugin stopped answering")
        time.sleep(0.01)


if __name__ == "__main__":
    sys.exit(main())
