"""The README and the pages under .github/docs: their sections, their blocks, and a shell to run them in."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / ".github" / "docs"
README = ROOT / "README.md"
#: Every page that people read, by its name.
PAGES = {path.name: path for path in (README, *sorted(DOCS.glob("*.md")))}


def read(page: str) -> str:
    return PAGES[page].read_text("utf-8")


def section(page: str, heading: str) -> str:
    """What stands under a heading of level 2, up to the next of that level."""
    found: list[str] = []
    inside = is_code = False
    for line in read(page).splitlines(keepends=True):
        if line.lstrip().startswith("```"):
            is_code = not is_code
        if line.startswith("## ") and not is_code:
            inside = line == f"## {heading}\n"
        elif inside:
            found.append(line)
    assert found, f"{page} has no section {heading!r}"
    return "".join(found)


def blocks(text: str, language: str) -> list[str]:
    """The code blocks in this language, indented ones moved to the margin."""
    found = re.findall(
        rf"(?ms)^( *)```{language}\n(.*?)^ *```$",
        text,
    )
    return [re.sub(rf"(?m)^{indent}", "", block) for indent, block in found]


def shell_environment(
    folder: Path, datasette: str = f"'{sys.executable}' -m datasette"
) -> dict[str, str]:
    """An environment whose `datasette` is this one, and whose `pip` has nothing to do."""
    commands = folder / "commands"
    commands.mkdir()
    pip = f"'{sys.executable}' -m pip --version"
    for name, command in (("datasette", f'{datasette} "$@"'), ("pip", pip)):
        script = commands / name
        script.write_text(f"#!/bin/sh\nexec {command}\n")
        script.chmod(0o755)
    return {**os.environ, "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}"}


def run(block: str, folder: Path, env: dict[str, str], *, typed: str = "") -> str:
    """Run a block of shell as it stands, in a folder; what it prints on stdout."""
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", block],
        cwd=folder,
        env=env,
        input=typed,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class Served:
    """A `datasette serve` in a process of its own, stopped when it is left."""

    def __init__(self, command: str, folder: Path, env: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            ["bash", "-c", f"exec {command.strip()} -p 0"],
            cwd=folder,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Served:
        assert self._process.stderr is not None
        self.said: list[str] = []
        for line in self._process.stderr:
            self.said.append(line)
            found = re.search(r"running on (http://[\d.:]+)", line)
            if found:
                self.url = found[1]
                return self
        pytest.fail("the server did not start: " + "".join(self.said))

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self.stdout, _stderr = self._process.communicate(timeout=60)
