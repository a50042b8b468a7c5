"""A hunt for values and keys in everything that a server, a command or an error shows.

A real server runs with `trace_debug` and `template_debug` on, `rich` installed and
telemetry recorded. Every door is used with a value of its own, and every door is used
wrongly. Then all that could be seen is searched for every value, master key and data key,
in many spellings. What is planted is found: the hunt can fail.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import importlib.util
import json
import os
import secrets
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest
from cryptography.fernet import Fernet
from itsdangerous import URLSafeSerializer
from support import decoder
from support.hostile_checks import KINDS
from support.hunt import Evidence, spellings

from datasette_secrets import envelope

pytestmark = pytest.mark.timeout(900)  # the hunt takes minutes on a busy machine

HERE = Path(__file__).parent
LIMIT = 100_000
JSON = "application/json"
FORM = "application/x-www-form-urlencoded"


def new_value() -> str:
    """A value whose first bytes occur nowhere else, and whose last ones are not ASCII."""
    return f"{secrets.token_urlsafe(30)} \u00e9\U0001f511"


class Server:
    """`datasette serve` with everything on that shows more than usual."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.inputs, self.temporary = folder / "inputs", folder / "tmp"
        self.watching, self.databases = folder / "watching", folder / "databases"
        for each in (self.inputs, self.temporary, self.watching, self.databases):
            each.mkdir()
        self.internal = str(self.databases / "internal.db")
        self.signing_secret = secrets.token_hex()
        self.keys = [envelope.generate_master_key() for _ in range(3)]
        self.environment_value = new_value()
        self.written: list[str] = []
        plugins = folder / "plugins"
        plugins.mkdir()
        for plugin in ("watching_plugin", "hostile_checks"):
            shutil.copy(HERE / f"support/{plugin}.py", plugins)
        self.inputs.joinpath("key").write_text(self.keys[1] + "\n")
        self.inputs.joinpath("datasette.json").write_text(
            json.dumps(
                {
                    "plugins": {
                        "datasette-secrets": {
                            "encryption-key": [
                                {"$env": "HUNTED_KEY"},
                                {"$file": str(self.inputs / "key")},
                                self.keys[2],
                            ]
                        }
                    }
                }
            )
        )
        with closing(sqlite3.connect(self.internal)) as conn:
            conn.execute("pragma journal_mode = wal").fetchall()

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "HUNTED_KEY": self.keys[0],
            "DATASETTE_SECRETS_FROM_ENVIRONMENT": self.environment_value,
            "DATASETTE_SECRET": self.signing_secret,
            "TMPDIR": str(self.temporary),
            "WATCHING_FOLDER": str(self.watching),
            "COLUMNS": "1000000",  # so that rich breaks no line within a secret
        }

    @property
    def options(self) -> list[str]:
        """What `serve` and the commands both take."""
        return [
            *("--internal", self.internal),
            *("--config", str(self.inputs / "datasette.json")),
        ]

    def start(self) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            self.port = taken.getsockname()[1]
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "datasette", "serve", "--root"),
                *self.options,
                *("--plugins-dir", self.folder / "plugins", "-p", str(self.port)),
                *("--setting", "trace_debug", "1"),
                *("--setting", "template_debug", "1"),
                *("--setting", "max_post_body_bytes", str(LIMIT)),
            ],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self.serving = threading.Event()
        self.listening = threading.Thread(target=self._listen)
        self.listening.start()
        assert self.serving.wait(60), "the server did not start"
        assert self.process.poll() is None, "".join(self.written)

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.written.append(line)
            if "Uvicorn running" in line:
                self.serving.set()
        self.serving.set()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(30)
        self.listening.join(60)
        assert not self.listening.is_alive()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def command_line(self, pid: int | None = None) -> bytes:
        return Path(f"/proc/{pid or self.process.pid}/cmdline").read_bytes()

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        kind: str | None = None,
        *,
        actor: str | None = "root",
        **headers: str,
    ) -> tuple[int, bytes]:
        """The status, and everything that came back, headers and all."""
        sent = {each.replace("_", "-"): value for each, value in headers.items()}
        if kind:
            sent["Content-Type"] = kind
        if actor:
            signer = URLSafeSerializer(self.signing_secret, "actor")
            sent["Cookie"] = f"ds_actor={signer.dumps({'a': {'id': actor}})}"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(
                method,
                path,
                body,
                sent,
                encode_chunked=not isinstance(body, (bytes, str, type(None))),
            )
            response = connection.getresponse()
            answer = str(response.getheaders()).encode() + response.read()
            return response.status, answer
        finally:
            connection.close()

    def hang_up(self, path: str, body: bytes) -> None:
        """Promise a longer body than is sent, and close."""
        with socket.create_connection(("127.0.0.1", self.port), 60) as connection:
            signer = URLSafeSerializer(self.signing_secret, "actor")
            cookie = signer.dumps({"a": {"id": "root"}})
            connection.sendall(
                f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {JSON}\r\n"
                f"Cookie: ds_actor={cookie}\r\nContent-Length: 5000\r\n\r\n".encode()
                + body
            )


@dataclasses.dataclass(repr=False)
class Hunted:
    """What there was to find, and everything in which it could have been."""

    evidence: Evidence
    values: list[tuple[str, str]]
    master_keys: list[tuple[str, str | bytes]]
    data_keys: list[tuple[str, bytes]]
    planted: str
    statuses: dict[str, int]


class Hunt:
    def __init__(self, server: Server) -> None:
        self.server = server
        self.evidence = Evidence()
        self.values = [("environment", server.environment_value)]
        self.data_keys: dict[bytes, None] = {}
        self.statuses: dict[str, int] = {}
        self.forks = subprocess.Popen(
            [sys.executable, "-m", "support.forks"],
            cwd=HERE,
            env=server.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def stop(self) -> None:
        self.server.stop()
        self.forks.communicate(timeout=60)

    def value(self, door: str) -> str:
        value = new_value()
        self.values.append((door, value))
        return value

    def ask(self, label: str, method: str, path: str, *args: Any, **more: Any) -> None:
        """Send the request with a trace, and keep what came back."""
        separator = "&" if "?" in path else "?"
        status, answer = self.server.ask(
            method, f"{path}{separator}_trace=1", *args, **more
        )
        assert label not in self.statuses
        self.statuses[label] = status
        self.evidence.add(f"response to {label}", answer)

    def run(self, label: str, *arguments: str, stdin: str = "", **more: str) -> None:
        """Run a command of `datasette secrets`."""
        job = {
            "arguments": ["secrets", *arguments, *self.server.options],
            "stdin": stdin,
            "environment": more,
        }
        assert self.forks.stdin is not None
        assert self.forks.stdout is not None
        self.forks.stdin.write(json.dumps(job) + "\n")
        self.forks.stdin.flush()
        done = json.loads(self.forks.stdout.readline())
        self.evidence.add(f"stdout of {label}", done["stdout"])
        self.evidence.add(f"stderr of {label}", done["stderr"])
        self.statuses[label] = done["status"]

    def run_alone(self, label: str, *arguments: str, stdin: str = "") -> None:
        """The same in a process of its own, which is looked at while it waits for stdin."""
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "datasette", "secrets"),
                *arguments,
                *self.server.options,
            ],
            env=self.server.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.evidence.add(f"process of {label}", self.server.command_line(process.pid))
        out, err = process.communicate(stdin.encode(), timeout=60)
        self.evidence.add(f"output of {label}", out + err)
        self.statuses[label] = process.returncode

    def bad_key(self) -> str:
        """A master key with a space in it."""
        key = envelope.generate_master_key()
        self.values.append(("malformed key", key[21:]))
        return f"{key[:20]} {key[21:]}"

    def keep_data_keys(self) -> None:
        for row in decoder.rows(self.server.internal):
            with contextlib.suppress(decoder.Refused, ValueError, TypeError):
                keys = [decoder.master_key(key) for key in self.server.keys]
                opened = decoder.open_row(keys, row["name"], row["version"], row)
                self.data_keys[opened.data_key] = None

    def alter(self, sql: str, *parameters: Any) -> None:
        with closing(sqlite3.connect(self.server.internal)) as conn, conn:
            conn.execute(sql, parameters)


def set_through_every_door(hunt: Hunt) -> None:
    ask, server = hunt.ask, hunt.server
    form = urlencode({"secret": hunt.value("form"), "note": "a note"})
    ask("form", "POST", "/-/secrets/REGISTERED", form, FORM)
    ask(
        "form, set",
        "POST",
        "/-/secrets/REGISTERED/-/set",
        urlencode({"secret": hunt.value("form, set")}),
        FORM,
    )
    ask(
        "form, add",
        "POST",
        "/-/secrets/-/add",
        urlencode({"name": "ADDED", "secret": hunt.value("form, add")}),
        FORM,
    )
    body = json.dumps({"value": hunt.value("JSON")})
    ask("JSON", "POST", "/-/secrets/WITH_JSON/-/set", body, JSON)
    odd = f"/-/secrets/{quote('ODD NAME ~2F with text')}/-/set"
    ask(
        "JSON, odd name",
        "POST",
        odd,
        json.dumps({"value": hunt.value("odd name")}),
        JSON,
    )
    server.watching.joinpath("api-value").write_text(hunt.value("API"))
    ask("API", "GET", "/-/store?name=WITH_API")
    server.watching.joinpath("api-value").unlink()
    for name in ("REGISTERED", "WITH_JSON", "WITH_API", "FROM_ENVIRONMENT", "NOTHING"):
        ask(f"use {name}", "GET", f"/-/use?name={name}")


def multipart(
    value: str, *, end: str = "--", field: str = "secret", more: str = ""
) -> tuple[bytes, str]:
    body = (
        f'--x\r\nContent-Disposition: form-data; name="{field}"{more}\r\n\r\n'
        f"{value}\r\n--x{end}\r\n"
    )
    return body.encode(), "multipart/form-data; boundary=x"


def use_every_door_wrongly(hunt: Hunt) -> None:
    """Each of these carries a value of its own, and none of them is stored."""

    def wrong(
        label: str,
        body: Callable[[str], Any],
        kind: str | None = JSON,
        path: str = "/-/secrets/WITH_JSON/-/set",
        method: str = "POST",
        **more: Any,
    ) -> None:
        hunt.ask(label, method, path, body(hunt.value(label)), kind, **more)

    def of(**fields: Any) -> Callable[[str], str]:
        """A JSON object with the value in the place of `...`."""

        def fill(value: str) -> str:
            return json.dumps(
                {key: value if each is ... else each for key, each in fields.items()}
            )

        return fill

    value_only = of(value=...)
    wrong("cut short", lambda v: f'{{"value": "{v}'.encode())
    wrong("not JSON", lambda v: v.encode())
    wrong("a list", lambda v: json.dumps([v]))
    wrong("a string", lambda v: json.dumps(v))
    wrong("nested deeply", lambda v: ("[" * 20_000 + json.dumps(v)).encode())
    wrong("an unknown key", of(value=..., bogus=1))
    wrong("the value as a key", lambda v: json.dumps({v: 1}))
    wrong("an object as the value", lambda v: json.dumps({"value": {"value": v}}))
    wrong("a list as the value", lambda v: json.dumps({"value": [v]}))
    wrong("a NUL", lambda v: json.dumps({"value": v + "\0"}))
    wrong("half a surrogate pair", lambda v: json.dumps({"value": v + "\ud800"}))
    wrong("too long", lambda v: json.dumps({"value": (v * 2_000)[:70_000]}))
    wrong("not UTF-8", lambda v: b'{"value": "' + v.encode() + b'\xff"}')
    wrong("UTF-16", lambda v: json.dumps({"value": v}).encode("utf-16"))
    wrong("a note too long", lambda v: json.dumps({"value": v, "note": v * 9}))
    wrong("a note that is no text", lambda v: json.dumps({"value": v, "note": [v]}))
    wrong("the value as a version", of(value="x", expected_version=...))
    wrong("a stale version", of(value=..., expected_version=99))
    wrong("a version that is too large", of(value=..., expected_version=10**30))
    wrong("text/plain", value_only, "text/plain")
    wrong("no media type", lambda v: v.encode(), None)
    wrong("over the limit", lambda v: json.dumps({"value": v * 5_000}))
    wrong(
        "chunked, over the limit",
        lambda v: iter([f'{{"value": "{v}'.encode(), *[v.encode()] * 5_000]),
    )
    wrong("chunked, cut short", lambda v: iter([b'{"value": "', v.encode()]))
    wrong("a reserved name", value_only, path="/-/secrets/ENCRYPTION_KEY/-/set")
    wrong("a malformed name", value_only, path="/-/secrets/no~20name/-/set")
    wrong("an unknown action", value_only, path="/-/secrets/WITH_JSON/-/bogus")
    wrong("another method", value_only, method="PUT")
    wrong("a JSON page", value_only, path="/-/secrets/WITH_JSON.json")
    wrong("nobody", value_only, actor=None)
    wrong("somebody else", value_only, actor="mallory")
    wrong("another site", value_only, Origin="https://evil.example")
    wrong("a bad token", value_only, actor=None, Authorization="Bearer dstok_x")
    for action in ("delete", "restore", "rollback", "destroy"):
        path = f"/-/secrets/WITH_JSON/-/{action}"
        wrong(f"{action}, an unknown key", of(bogus=...), path=path)
        wrong(f"{action}, the value as a version", of(version=...), path=path)
        wrong(f"{action}, versions", lambda v: json.dumps({"versions": [v]}), path=path)
        wrong(
            f"{action}, cut short", lambda v: f'{{"version": "{v}'.encode(), path=path
        )
    for action in ("rotate", "upgrade"):
        path = f"/-/secrets/-/{action}"
        wrong(f"{action}, an unknown key", of(bogus=...), path=path)
        wrong(f"{action}, cut short", lambda v: f'{{"x": "{v}'.encode(), path=path)

    form = {"kind": FORM, "path": "/-/secrets/REGISTERED"}
    wrong("form, not UTF-8", lambda v: f"secret={quote(v)}%ff".encode(), **form)
    wrong(
        "form, stale", lambda v: urlencode({"secret": v, "expected_version": 1}), **form
    )
    wrong(
        "form, value as version",
        lambda v: urlencode({"secret": "x", "expected_version": v}),
        **form,
    )
    wrong(
        "form, a note too long",
        lambda v: urlencode({"secret": v, "note": v * 9}),
        **form,
    )
    wrong(
        "form, too long",
        lambda v: urlencode({"secret": (v * 900)[:66_000].encode("ascii", "replace")}),
        **form,
    )
    wrong("form, NUL", lambda v: urlencode({"secret": f"{v}\0{v}"}), **form)
    wrong("form, over the limit", lambda v: urlencode({"secret": v * 5_000}), **form)
    wrong("form, other names", lambda v: urlencode({"password": v}), **form)
    wrong(
        "form, another site",
        lambda v: urlencode({"secret": v}),
        **form,
        Sec_Fetch_Site="cross-site",
    )
    add = {"kind": FORM, "path": "/-/secrets/-/add"}
    wrong(
        "add, the value as a name", lambda v: urlencode({"name": v, "secret": v}), **add
    )
    wrong(
        "add, a reserved name",
        lambda v: urlencode({"name": "ENCRYPTION_KEY", "secret": v}),
        **add,
    )
    wrong(
        "add, a name that is there",
        lambda v: urlencode({"name": "ADDED", "secret": v}),
        **add,
    )
    wrong("add, no name", lambda v: urlencode({"secret": v}), **add)
    for label, more in (
        ("whole", {}),
        ("no end", {"end": ""}),
        ("a file", {"more": '; filename="f.txt"'}),
        ("another field", {"field": "bogus"}),
    ):
        body, kind = multipart(hunt.value(f"multipart, {label}"), **more)
        hunt.ask(f"multipart, {label}", "POST", "/-/secrets/REGISTERED", body, kind)
    hunt.server.hang_up(
        "/-/secrets/WITH_JSON/-/set", f'{{"value": "{hunt.value("hung up")}'.encode()
    )


def look_at_every_page(hunt: Hunt, moment: str) -> None:
    for path in (
        "/",
        "/-/secrets",
        "/-/secrets.json",
        "/-/secrets/REGISTERED",
        "/-/secrets/REGISTERED.json",
        "/-/secrets/WITH_JSON",
        "/-/secrets/WITH_JSON.json",
        "/-/secrets/FROM_ENVIRONMENT",
        "/-/secrets/NOTHING",
        "/-/secrets/ENCRYPTION_KEY",
        "/-/secrets/-/add",
        "/-/secrets/-/log",
        "/-/secrets/-/log.json",
        "/-/secrets/-/rotate",
        "/-/secrets/-/upgrade",
        "/-/secrets/WITH_JSON/-/delete",
        "/-/secrets/WITH_JSON/-/restore",
        "/-/secrets/WITH_JSON/-/rollback?version=1",
        "/-/secrets/WITH_JSON/-/destroy",
        "/-/plugins.json?all=1",
        "/-/config.json",
        "/-/settings.json",
        "/-/versions.json",
        "/-/threads.json",
        "/-/databases.json",
        "/-/actor.json",
        "/-/debug",
        "/-/permissions",
        "/-/jump.json",
    ):
        hunt.ask(f"{path}, {moment}", "GET", path)
        if "secrets" not in path or path.endswith(".json"):
            continue
        context = f"{path}{'&' if '?' in path else '?'}_context=1"
        hunt.ask(f"{context}, {moment}", "GET", context)


def change_everything(hunt: Hunt) -> None:
    def post(label: str, path: str, **body: Any) -> None:
        hunt.ask(label, "POST", path, json.dumps(body), JSON)

    post("rollback", "/-/secrets/REGISTERED/-/rollback", version=1)
    post("delete", "/-/secrets/REGISTERED/-/delete")
    post("restore", "/-/secrets/REGISTERED/-/restore")
    post("destroy", "/-/secrets/REGISTERED/-/destroy", version=1)
    hunt.keep_data_keys()
    post("rotate", "/-/secrets/-/rotate")
    hunt.ask("form, rotate", "POST", "/-/secrets/-/rotate", "", FORM)


def use_the_shell(hunt: Hunt) -> None:
    """Beside the running server: rightly, wrongly, and with keys that are malformed."""
    run, inputs = hunt.run, hunt.server.inputs
    env_file, value_file = str(inputs / "values.env"), str(inputs / "value")
    Path(value_file).write_text(hunt.value("value file") + "\n")
    Path(env_file).write_text(
        f"IMPORTED='{hunt.value('import')}'\nexport QUOTED=\"{hunt.value('quoted')}\"\n"
    )
    hunt.run_alone("shell, set", "set", "SHELL", stdin=hunt.value("shell") + "\n")
    run("shell, value file", "set", "SHELL", "--value-file", value_file)
    run("shell, import", "import", env_file)
    for line in (
        "NAME {}",
        "1BAD='{}'",
        "A='{}",
        "ENCRYPTION_KEY='{}'",
        "{}",
        "A='{}\0'",
    ):
        run(
            f"shell, import of {line!r}",
            "import",
            "-",
            stdin=line.format(hunt.value(f"import of {line!r}")),
        )
    for key in hunt.server.keys[:2]:
        run(f"shell, import of key {key}"[:22], "import", "-", stdin=f"A={key}")
    run("shell, a value as an argument", "set", "SHELL", hunt.value("argument")[:-3])
    run("shell, a value as a name", "set", "sk-" + hunt.value("name")[:-3])
    run("shell, a value to get", "get", "SHELL", hunt.value("argument to get")[:-3])
    run("shell, NUL", "set", "SHELL", stdin=hunt.value("NUL in a shell") + "\0")
    stale = ("set", "SHELL", "--expected-version", "99")
    run("shell, stale", *stale, stdin=hunt.value("stale in a shell"))
    for command in (("list",), ("history", "SHELL"), ("status",), ("verify",)):
        run(f"shell, {command[0]}", *command, "--json")
    run("shell, destroy", "destroy", "SHELL", "--version", "1", "--yes")
    hunt.keep_data_keys()
    run("shell, rotate", "rotate-key", "--new-data-keys")
    bad = hunt.bad_key()
    run("shell, bad key", "status", HUNTED_KEY=bad)


def check_through_every_door(hunt: Hunt) -> None:
    """With checks that try to show the value that they are given."""
    for kind, outcome in KINDS.items():
        path = f"/-/secrets/CHECK_{kind}"
        values = [hunt.value(f"{door} {kind}") for door in ("check form", "check JSON")]
        form = urlencode({"secret": values[0], "check": "1"})
        hunt.ask(f"check form {kind}", "POST", path, form, FORM)
        body = json.dumps({"value": values[1], "check": True})
        hunt.ask(f"check JSON {kind}", "POST", f"{path}/-/set", body, JSON)
        if outcome == "rejected":
            body = json.dumps({"value": hunt.value(f"unchecked {kind}")})
            hunt.ask(f"unchecked {kind}", "POST", f"{path}/-/set", body, JSON)
        hunt.ask(f"check page {kind}", "POST", f"{path}/-/check", "", FORM)
        hunt.ask(f"check API {kind}", "POST", f"{path}/-/check", "{}", JSON)
        plugins = ("--plugins-dir", str(hunt.server.folder / "plugins"))
        hunt.run(f"check shell {kind}", "check", f"CHECK_{kind}", *plugins)
        hunt.ask(f"{path}, checked", "GET", path)
    for page in ("/-/secrets", "/-/secrets.json", "/-/secrets/-/log"):
        hunt.ask(f"{page}, checked", "GET", page)


def break_rows(hunt: Hunt) -> None:
    """Rows that do not open, and plugins that let the error out."""
    for name, error in (
        ("DAMAGED", "encrypted = zeroblob(296)"),
        ("CUT", "wrapped_key = x'00'"),
        ("OTHER_KEY", "encryption_key_name = '0123456789abcdef'"),
        ("OLD_FORMAT", "wrapped_key = null, envelope_version = null"),
    ):
        body = json.dumps({"value": hunt.value(f"in {name}")})
        hunt.ask(f"set {name}", "POST", f"/-/secrets/{name}/-/set", body, JSON)
        hunt.keep_data_keys()
        hunt.alter(f"update datasette_secrets set {error} where name = ?", name)
        hunt.ask(f"use {name}", "GET", f"/-/use?name={name}")
        for action in ("rollback", "restore"):
            body = json.dumps({"version": 1} if action == "rollback" else {})
            path = f"/-/secrets/{name}/-/{action}"
            hunt.ask(f"{action} {name}", "POST", path, body, JSON)
    smuggled = Fernet(hunt.server.keys[1]).encrypt(hunt.value("0.x").encode())
    hunt.alter(
        "insert into datasette_secrets (name, version, encrypted, encryption_key_name)"
        " values ('FROM_0X', 1, ?, 'default')",
        smuggled,
    )
    hunt.ask("use FROM_0X", "GET", "/-/use?name=FROM_0X")
    hunt.ask("rotate with problems", "POST", "/-/secrets/-/rotate", "{}", JSON)
    hunt.ask("upgrade", "POST", "/-/secrets/-/upgrade", "{}", JSON)
    hunt.ask("use FROM_0X, upgraded", "GET", "/-/use?name=FROM_0X")


def break_the_table(hunt: Hunt) -> None:
    hunt.alter("alter table datasette_secrets rename column note to notes")
    for label, path, kind in (
        ("broken, JSON", "/-/secrets/WITH_JSON/-/set", JSON),
        ("broken, form", "/-/secrets/REGISTERED", FORM),
    ):
        value = hunt.value(label)
        body = (
            json.dumps({"value": value})
            if kind == JSON
            else urlencode({"secret": value})
        )
        hunt.ask(label, "POST", path, body, kind)
    hunt.server.watching.joinpath("api-value").write_text(hunt.value("broken, API"))
    hunt.ask("broken, API", "GET", "/-/store?name=WITH_API")
    hunt.server.watching.joinpath("api-value").unlink()
    hunt.ask("broken, use", "GET", "/-/use?name=WITH_JSON")
    hunt.ask("broken, list", "GET", "/-/secrets")
    hunt.alter("alter table datasette_secrets rename column notes to note")


def plant(hunt: Hunt) -> str:
    planted = new_value()
    hunt.server.watching.joinpath("planted").write_text(planted)
    for kind in ("sql", "span", "file", "print", "locals"):
        hunt.ask(f"plant {kind}", "GET", f"/-/plant?kind={kind}")
    hunt.server.watching.joinpath("planted").unlink()
    return planted


@pytest.fixture(scope="module")
def hunted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hunted]:
    pytest.importorskip("rich")
    pytest.importorskip("opentelemetry.sdk")
    server = Server(tmp_path_factory.mktemp("hunt"))
    hunt = Hunt(server)
    server.start()
    try:
        set_through_every_door(hunt)
        hunt.keep_data_keys()
        use_every_door_wrongly(hunt)
        look_at_every_page(hunt, "before")
        change_everything(hunt)
        use_the_shell(hunt)
        hunt.keep_data_keys()
        check_through_every_door(hunt)
        break_rows(hunt)
        look_at_every_page(hunt, "after")
        hunt.keep_data_keys()
        break_the_table(hunt)
        planted = plant(hunt)
        hunt.evidence.add("process list", server.command_line())
        hunt.evidence.add_files(server.databases)  # with a write-ahead log
        hunt.ask("dump", "GET", "/-/dump")
    finally:
        hunt.stop()
    hunt.evidence.add("output of the server", "".join(server.written))
    for folder in (server.databases, server.temporary, server.watching):
        hunt.evidence.add_files(folder)
    master_keys = [
        (f"master key {number}", spelling)
        for number, key in enumerate(server.keys)
        for spelling in (key, decoder.master_key(key))
    ]
    yield Hunted(
        hunt.evidence,
        hunt.values,
        master_keys,
        [(f"data key {n}", key) for n, key in enumerate(hunt.data_keys)],
        planted,
        hunt.statuses,
    )


def test_no_value_is_seen_anywhere(hunted: Hunted) -> None:
    assert hunted.evidence.search(hunted.values) == []


def test_no_master_key_is_seen_anywhere(hunted: Hunted) -> None:
    assert hunted.evidence.search(hunted.master_keys) == []


def test_no_data_key_is_seen_anywhere(hunted: Hunted) -> None:
    assert len(hunted.data_keys) > 10
    assert hunted.evidence.search(hunted.data_keys) == []


def test_what_was_planted_is_found_in_each_of_its_places(hunted: Hunted) -> None:
    found = "\n".join(hunted.evidence.search([("planted", hunted.planted)]))
    has_telemetry = importlib.util.find_spec("datasette.telemetry") is not None
    for where in (
        "in response to plant sql",  # the trace shows parameters
        "in file spans" if has_telemetry else "",
        "in file planted",
        "hexadecimal, in output of the server",
        "repr of its start, in output of the server",  # rich shows locals
    ):
        assert where in found


def test_the_hunt_went_where_it_says(hunted: Hunted) -> None:
    statuses = hunted.statuses
    assert {statuses[each] for each in ("form", "form, set", "form, add")} == {302}
    assert {statuses[each] for each in ("JSON", "API", "rotate", "upgrade")} == {200}
    assert statuses["chunked, over the limit"] == statuses["over the limit"] == 413
    assert statuses["cut short"] == statuses["a NUL"] == 400
    assert statuses["nobody"] == statuses["another site"] == 403
    assert statuses["use DAMAGED"] == 500
    done = [label for label in statuses if label.startswith("shell, ")]
    assert {statuses[f"shell, {each}"] for each in ("set", "import", "rotate")} == {0}
    assert sum(statuses[label] != 0 for label in done) > 10
    assert statuses["a stale version"] == statuses["form, stale"] == 409
    exit_codes = {"works": 0, "rejected": 1, "unknown": 3}
    for kind, outcome in KINDS.items():
        assert statuses[f"check shell {kind}"] == exit_codes[outcome]
        assert statuses[f"check API {kind}"] == 200
        assert statuses[f"check page {kind}"] == 302
        rejected = outcome == "rejected"
        assert statuses[f"check JSON {kind}"] == (400 if rejected else 200)
        assert statuses[f"check form {kind}"] == (400 if rejected else 302)
    assert hunted.evidence.size > 1_000_000
    stored = [label for label, _ in hunted.values]
    assert len(stored) == len(set(stored)) > 80


def test_every_spelling_of_a_secret_is_one_that_the_hunt_finds() -> None:
    for secret in (new_value(), os.urandom(32)):
        for _, needle in spellings(secret):
            evidence = Evidence()
            evidence.add("here", b"before " + needle + b" after")
            assert evidence.search([("it", secret)])
