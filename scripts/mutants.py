"""Changes the code in small ways, one at a time, and sees whether a test notices.

    python scripts/mutants.py [TARGET]...

Targets: envelope, rotation, permissions, pages. Without one, all of them. mutmut makes the
changes, in a copy. Those that no test notices are printed, save the ones that EXPLAINED
has a reason for; with any left, it exits 1.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# What to change: the module, the functions in it (empty for all), and who should notice.
TARGETS = {
    "envelope": ("envelope", (), ("envelope", "corpus", "upgrade", "config", "locals")),
    "rotation": ("rotation", (), ("rotation", "upgrade", "corpus", "attacks", "races")),
    "permissions": (
        "guard",
        (),
        ("permissions", "config", "secrets", "faults", "guard"),
    ),
    "pages": (
        "views",
        ("_is_allowed", "_answer", "_forbidden", "_view", "menu_links", "jump_items"),
        ("permissions", "api", "pages"),
    ),
}

# Changes that no test need notice: what the changed line looks like, and why.
EXPLAINED = (
    (r'"(UTF-8|ASCII)"', "another spelling of the same encoding"),
    (
        r'"XX|XX"|^\s*[rf]*"[^"]*"[,)]*$|return f?"|"run sql across',
        "the words of a message, not its sense",
    ),
    (
        r"validate=|_TO_STANDARD\), \)$",
        "the canonical spelling is compared afterwards",
    ),
    (r'surrogatepass|SURROGATEPASS|"utf-8", \)', "no name with half a pair gets here"),
    (
        r"wraps_only=|for change in changes\], \)?$|db, ids, \):$|^ +place\.db, row_id, size.*, \)|^ +self\.place\.db, (ids|changes)\[0\]",
        "how much of a row is read, which only costs time",
    ),
    (
        r"lambda _: 0|self\.everything = None|lost -= ",
        "the same, as far as it is asked",
    ),
    (
        r"digest_size=33|encode\(\), \)",
        "another size of a digest that is only compared",
    ),
    (
        r"finished = None|self\.everything = True|strict=(None|False)|self\.ids, \)$"
        r"|to_change <= _PREPARED_MAX|prepare &?= |skip_unopenable=None\)$"
        r"|lost \+= len\(ids\) \+ changed|_written\(changes, None\)",
        "the same is done, in more steps",
    ),
    (r"_database\{number|SECRETS:NOBODY", "another name of what is only referred to"),
    (r"counts\.get\(None", "no two groups have one key id that is text"),
    (r"\(data_key is None\) and False", "libsodium's binding refuses None as a key"),
)


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


def reason(lines: list[str]) -> str | None:
    new = [line[1:] for line in lines if line.startswith("+")]
    if not any(re.search(r"\w", line) for line in new):  # an argument was left out
        new = [line[1:] for line in lines]
    for pattern, why in EXPLAINED:
        if any(re.search(pattern, line) for line in new):
            return why
    return None


def run(name: str) -> tuple[int, int, dict[str, int], list[tuple[str, list[str]]]]:
    """How many changes were made and noticed, and those that were not."""
    module, functions, tests = TARGETS[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder, module, tests)
        mutmut(
            folder,
            "run",
            *(f"datasette_secrets.{module}.x_{each}__mutmut_*" for each in functions),
        )
        results = re.findall(r"(\S+): (.+)", mutmut(folder, "results", "--all", "true"))
        if functions:
            results = [each for each in results if each[1].strip() != "not checked"]
        left, explained = [], {}
        for mutant, outcome in results:
            if outcome.strip() in ("killed", "timeout", "caught by type check"):
                continue
            lines = changed_lines(folder, mutant)
            why = reason(lines)
            if why is None:
                left.append((f"{mutant} ({outcome.strip()})", lines))
            else:
                explained[why] = explained.get(why, 0) + 1
        noticed = len(results) - len(left) - sum(explained.values())
        return len(results), noticed, explained, left


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    options = parser.parse_args()
    unknown = set(options.targets) - TARGETS.keys()
    if unknown:
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    remaining = 0
    for name in options.targets or TARGETS:
        made, noticed, explained, left = run(name)
        print(f"{name}: {made} changes, {noticed} noticed by a test")
        for why, number in explained.items():
            print(f"  {number} not: {why}")
        for mutant, lines in left:
            print(f"  {mutant}")
            print("\n".join(f"    {line}" for line in lines))
        remaining += len(left)
    print(f"{remaining} left to explain" if remaining else "None is left to explain.")
    return 1 if remaining else 0


if __name__ == "__main__":
    sys.exit(main())
