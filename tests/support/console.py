"""A folder with a configuration, a key and a database, and the commands run in it."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result
from datasette import hookimpl
from datasette.app import Datasette
from datasette.plugins import pm

from datasette_secrets import envelope, service

DATASETTE = (sys.executable, "-m", "datasette")


class Console:
    """What an operator has: datasette.yaml, internal.db, and a shell."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.internal = folder / "internal.db"
        self.config = folder / "datasette.yaml"
        self.options = ["-c", str(self.config), "--internal", str(self.internal)]
        self.key = envelope.generate_master_key()
        self.configure(self.key)

    def configure(self, *keys: Any, **settings: Any) -> None:
        """Write the configuration: these keys, newest first. JSON is YAML."""
        if keys:
            settings["encryption-key"] = list(keys)
        content = {"plugins": {"datasette-secrets": settings}}
        self.config.write_text(json.dumps(content))

    def run(
        self, *arguments: str, input: str | bytes | None = None, **options: Any
    ) -> Result:
        """`datasette secrets …` in this process."""
        from datasette.cli import cli

        line = ["secrets", *arguments, *self.options]
        return CliRunner().invoke(cli, line, input=input, **options)

    def ok(self, *arguments: str, input: str | bytes | None = None) -> str:
        """What a command that must succeed prints on stdout."""
        result = self.run(*arguments, input=input)
        assert (result.exit_code, result.exception) == (0, None), result.stderr
        return result.stdout

    def value(self, name: str, *arguments: str) -> str:
        """What `get` prints, without its newline."""
        result = self.run("get", name, *arguments)
        assert result.exit_code == 0, result.stderr
        # The runner's text would have other newlines in it.
        return result.stdout_bytes.decode().removesuffix("\n")

    def json(self, *arguments: str) -> Any:
        return json.loads(self.run(*arguments, "--json").stdout)

    def refused(self, *arguments: str, code: int = 1, **options: Any) -> str:
        """What a command that must fail says: one sentence on stderr, no traceback."""
        result = self.run(*arguments, **options)
        assert result.exit_code == code, result.output
        assert isinstance(result.exception, SystemExit)
        # rotate-key begins by saying on what it works.
        assert result.stdout == "" or arguments[0] == "rotate-key"
        return sentence(result.stderr)

    def use_named_database(self) -> None:
        """Move the secrets to data.db. Datasette lets plugins near its connections."""
        data = self.folder / "data.db"
        self.internal.rename(data)
        self.internal = data
        self.configure(self.key, database="data")
        self.options = [str(data), "-c", str(self.config)]

    def command(self, *arguments: str) -> list[str]:
        return [*DATASETTE, "secrets", *arguments, *self.options]

    def process(self, *arguments: str, **options: Any) -> Any:
        """`datasette secrets …` in a process of its own."""
        return subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            text=True,
            check=False,
            timeout=60,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
        )

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*arguments),
            cwd=self.folder,
            text=True,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
        )

    def datasette(self, *keys: str) -> Datasette:
        """An instance on the same database."""
        settings = {"encryption-key": list(keys or (self.key,))}
        config = {"plugins": {"datasette-secrets": settings}}
        return Datasette(internal=str(self.internal), config=config)

    async def fill(self, *names: str, versions: int = 1) -> None:
        """Store "<name> value <version>" as each version of each name."""
        datasette = self.datasette()
        for version in range(1, versions + 1):
            await service.set_secrets(
                datasette,
                {name: plaintext(f"{name} value {version}") for name in names},
            )
        datasette.close()

    def sql(self, *statements: str) -> list[Any]:
        """Run these on the file as somebody else would; the rows of the last one."""
        rows: list[Any] = []
        with closing(sqlite3.connect(self.internal)) as conn, conn:
            for statement in statements:
                rows = conn.execute(statement).fetchall()
        return rows

    def files(self) -> dict[str, bytes]:
        """Every file of the database: itself, its log, its index, its journal."""
        return {
            path.name: path.read_bytes()
            for path in self.folder.glob(f"{self.internal.name}*")
        }


@contextmanager
def plugin(**hooks: Callable[..., Any]) -> Iterator[None]:
    """A plugin with these hooks, as long as this lasts."""
    module = types.ModuleType("a_test_plugin")
    for name, hook in hooks.items():
        setattr(module, name, hookimpl(hook))
    pm.register(module)
    try:
        yield
    finally:
        pm.unregister(module)


def plaintext(value: str) -> envelope.Plaintext:
    parsed = envelope.Plaintext.parse(value)
    return parsed


def key_id(master_key: str) -> str:
    key = envelope.MasterKey.parse(master_key)
    return key.id


def sentence(stderr: str) -> str:
    """The one line of an error, or of a usage error its last."""
    *usage, line = stderr.strip().split("\n")
    assert all(each.startswith(("Usage: ", "Try ")) or not each for each in usage), (
        stderr
    )
    assert "Traceback" not in stderr
    assert line.startswith("Error: ")
    return line.removeprefix("Error: ")


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, **variables}
