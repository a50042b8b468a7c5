"""Changes the code in small ways, one at a time, and sees whether a test notices.

    python scripts/mutants.py [TARGET]...

Targets: envelope, rotation, permissions, pages. Without one, all of them. mutmut makes the
changes, in a copy. This is a report: it prints those that no test notices, for somebody to
read. Many of them are equivalent, or change nothing but the words of a message. It cannot
judge what runs only at import, because it switches a change on later: `_border` of the
envelope, `view` and `form` of the pages.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# What to change: the module, and who should notice.
TARGETS = {
    "envelope": ("envelope", ("envelope", "corpus", "upgrade", "config", "locals")),
    "rotation": ("rotation", ("rotation", "upgrade", "corpus", "attacks", "races")),
    "permissions": ("permissions", ("permissions", "config", "secrets", "guard")),
    "pages": ("web/answer", ("permissions", "api", "pages")),
}


def prepare(folder: Path, module: str, tests: tuple[str, ...]) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "-z"],  # noqa: S607
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        timeout=7200,
    ).stdout.split("\0")
    for name in filter(None, tracked):
        source = ROOT / name
        if source.is_file():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    selection = ", ".join(f'"tests/test_{test}.py"' for test in tests)
    with folder.joinpath("pyproject.toml").open("a") as settings:
        settings.write(
            "\n[tool.mutmut]\n"
            'source_paths = ["datasette_secrets/"]\n'
            f'only_mutate = ["datasette_secrets/{module}.py"]\n'
            'also_copy = ["scripts", "tests", ".github", "README.md", "pyproject.toml"]\n'
            f"pytest_add_cli_args_test_selection = [{selection}]\n"
        )


def mutmut(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "mutmut", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=7200,
    )
    if done.returncode:
        sys.exit(
            f"mutmut {arguments[0]} failed:\n{done.stdout[-3000:]}{done.stderr[-2000:]}"
        )
    return done.stdout


def changed_lines(folder: Path, mutant: str) -> list[str]:
    return [
        line
        for line in mutmut(folder, "show", mutant).splitlines()
        if re.match(r"[-+](?![-+])", line)
    ]


def run(name: str) -> tuple[int, list[tuple[str, list[str]]]]:
    """How many changes were made, and those that no test noticed."""
    module, tests = TARGETS[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder, module, tests)
        mutmut(folder, "run")
        results = re.findall(r"(\S+): (.+)", mutmut(folder, "results", "--all", "true"))
        unnoticed = [
            (f"{mutant} ({outcome.strip()})", changed_lines(folder, mutant))
            for mutant, outcome in results
            if outcome.strip() not in ("killed", "timeout", "caught by type check")
        ]
        return len(results), unnoticed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    options = parser.parse_args()
    unknown = set(options.targets) - TARGETS.keys()
    if unknown:
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    for name in options.targets or TARGETS:
        made, unnoticed = run(name)
        print(f"{name}: {made} changes, {made - len(unnoticed)} noticed by a test")
        for mutant, lines in unnoticed:
            print(f"  {mutant}")
            print("\n".join(f"    {line}" for line in lines))


if __name__ == "__main__":
    main()
