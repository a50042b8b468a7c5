"""Runs the suite on every supported Python, with the oldest and newest Datasette and PyNaCl.

    python scripts/matrix.py [--python 3.10] [--datasette oldest] [--pynacl newest]

Each combination gets a virtual environment of its own with the wheel in it. Pythons are
found on PATH, or through pyenv or uv. Exits 1 if a suite failed or a Python is missing.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from support.environments import build_wheel, environment  # noqa: E402

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
AGES = ("oldest", "newest")


def main() -> None:
    chosen = parse_arguments()
    wheel = build_wheel()
    results = []
    for python, datasette, pynacl in itertools.product(
        chosen.python or PYTHONS, chosen.datasette or AGES, chosen.pynacl or AGES
    ):
        label = f"Python {python}, {datasette} Datasette, {pynacl} PyNaCl"
        found = find_python(python)
        if found is None:
            results.append((label, "no such Python here"))
            continue
        programs = environment(
            f"matrix-{python}-{datasette}-{pynacl}",
            requirement("datasette", datasette),
            requirement("pynacl", pynacl),
            wheel=wheel,
            extra="[fernet]",
            group="test",
            python=found,
        )
        print(f"\n{label}: {versions(programs)}", flush=True)
        # Not `python -m pytest`, which would find the checkout before the wheel.
        suite = subprocess.run(
            [programs / "pytest", "-q", "-n", "2", "--dist", "loadfile"],
            cwd=ROOT,
            timeout=3600,
        )
        results.append((label, "failed" if suite.returncode else "passed"))

    print()
    for label, result in results:
        print(f"{label}: {result}")
    sys.exit(any(result != "passed" for _, result in results))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--python", action="append", choices=PYTHONS)
    parser.add_argument("--datasette", action="append", choices=AGES)
    parser.add_argument("--pynacl", action="append", choices=AGES)
    return parser.parse_args()


def requirement(name: str, age: str) -> str:
    """The floor in pyproject.toml to the letter, or whatever is newest above it."""
    text = (ROOT / "pyproject.toml").read_text()
    [floor] = set(re.findall(rf'"{name}>=([^"]+)"', text))
    return f"{name}=={floor}" if age == "oldest" else f"{name}>={floor}"


def find_python(version: str) -> str | None:
    """The path of a Python that can be run, wherever it was installed."""
    candidates = [shutil.which(f"python{version}")]
    if shutil.which("uv"):
        candidates.append(output("uv", "python", "find", version))
    if pyenv := os.environ.get("PYENV_ROOT") or output("pyenv", "root"):
        folders = Path(pyenv).glob(f"versions/{version}.*/bin/python")
        candidates += [str(path) for path in sorted(folders, reverse=True)]
    for candidate in filter(None, candidates):
        if output(candidate, "--version").startswith(f"Python {version}."):
            return candidate
    return None


def versions(programs: Path) -> str:
    packages = ("datasette", "pynacl", "sqlite-utils", "cryptography", "pluggy")
    code = (
        "import importlib.metadata, sqlite3, sys\n"
        "print(*(f'{name} {importlib.metadata.version(name)}' for name in sys.argv[1:]),"
        " f'SQLite {sqlite3.sqlite_version}', sep=', ')"
    )
    return output(str(programs / "python"), "-c", code, *packages)


def output(*command: str) -> str:
    """What a program prints, empty where it does not run."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=3600
        )
    except OSError:
        return ""
    return "" if done.returncode else done.stdout.strip()


if __name__ == "__main__":
    main()
