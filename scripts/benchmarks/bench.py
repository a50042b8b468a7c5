"""Measures the figures in the performance table of how-it-works.md, and prints that table.

Every figure is a ratio against something run in the same minute on the same machine:
datasette-secrets 0.3a0 in an environment of its own, a bare loop, or Datasette itself.
Of several rounds the median counts. Exits with 1 when a goal is missed.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
OLD_VENV = HERE.parents[1] / ".bench"
OLD_RELEASE = "datasette-secrets==0.3a0"

Figures = dict[str, float]


@dataclass(frozen=True)
class Goal:
    """One row of the table: what was measured against a limit."""

    what: str
    against: str
    measured: float
    limit: float
    at_least: bool
    form: str = "{:.2f} times"

    @property
    def is_met(self) -> bool:
        if self.at_least:
            return self.measured >= self.limit
        return self.measured <= self.limit

    def row(self) -> str:
        sign = "≥" if self.at_least else "≤"
        return (
            f"| {self.what} | {self.against} | {self.form.format(self.measured)} | "
            f"{sign} {self.form.format(self.limit)}{'' if self.is_met else ' **missed**'} |"
        )


def environment_of_0x() -> str:
    """The Python of an environment with the last 0.x release, made once."""
    python = OLD_VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    done = OLD_VENV / ".done"
    if not done.exists():
        venv.create(OLD_VENV, with_pip=True, clear=True)
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", "--pre", OLD_RELEASE],
            check=True,
            timeout=3600,
        )
        done.touch()
    return str(python)


def run(python: str, script: str, *arguments: object) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        name, *rest = arguments or ("",)
        command = [python, str(HERE / script), str(name), folder, *map(str, rest)]
        done = subprocess.run(
            [part for part in command if part],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=3600,
        )
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def rounds(count: int, *measure: Callable[[], Figures]) -> list[Figures]:
    """The median of each figure; what is compared takes turns."""
    taken: list[list[Figures]] = [[] for _ in measure]
    for _ in range(count):
        for figures, one in zip(taken, measure, strict=True):
            figures.append(one())
    return [
        {key: statistics.median(each[key] for each in figures) for key in figures[0]}
        for figures in taken
    ]


def reads() -> list[Goal]:
    old = environment_of_0x()

    def both(workload: str, count: int = 3) -> list[Figures]:
        return rounds(
            count,
            lambda: run(sys.executable, "reads.py", workload),
            lambda: run(old, "reads.py", workload),
        )

    ours, theirs = both("sequential")
    goals = [
        Goal(
            "`get_secret`, one after another",
            "0.3a0",
            ours["rate"] / theirs["rate"],
            24,
            True,
            "{:.1f} times",
        ),
        Goal(
            "",
            "bare read and decryption (time)",
            ours["times_floor"],
            1.35,
            False,
        ),
    ]
    ours, theirs = both("concurrent", 7)
    for mode, label, limit in (
        ("wal", "WAL", 30),
        ("delete", "rollback journal", 45),
    ):
        ratio = ours[f"rate_{mode}"] / theirs[f"rate_{mode}"]
        goals.append(
            Goal(
                f"100 tasks, 10 actors, 20 secrets, {label}",
                "0.3a0",
                ratio,
                limit,
                True,
                "{:.1f} times",
            )
        )
    goals.append(
        Goal(
            "write transactions a second under that load",
            f"{theirs['writes']:.0f} in 0.3a0",
            ours["writes"],
            20,
            False,
            "{:.0f}",
        )
    )
    ours, theirs = both("locked")
    goals.append(
        Goal(
            "what a lock that is held for 2 s adds to the longest stall, WAL",
            f"{ours['stall_ms_free']:.1f} ms with nobody holding it",
            max(0, ours["stall_ms_wal"] - ours["stall_ms_free"]),
            5,
            False,
            "{:.1f} ms",
        )
    )
    goals.append(
        Goal(
            "longest read meanwhile",
            f"{theirs['longest_read_ms_wal']:.0f} ms in 0.3a0",
            ours["longest_read_ms_wal"],
            100,
            False,
            "{:.0f} ms",
        )
    )
    goals.append(
        Goal(
            "failed reads, WAL and exclusive lock",
            "—",
            ours["failed_wal"] + ours["failed_delete"],
            0,
            False,
            "{:.0f}",
        )
    )
    return goals


def rotation() -> list[Goal]:
    large, small = rounds(
        3,
        lambda: run(sys.executable, "rotation.py", "rotate", 200_000),
        lambda: run(sys.executable, "rotation.py", "rotate", 10_000),
    )
    [verify] = rounds(3, lambda: run(sys.executable, "rotation.py", "verify", 200_000))
    return [
        Goal(
            "`rotate-key`, 200,000 versions",
            "bare re-wrap loop",
            large["times_bare"],
            0.45,
            True,
        ),
        Goal(
            "its peak memory above an empty run",
            "—",
            large["mebibytes"],
            64,
            False,
            "{:.0f} MiB",
        ),
        Goal(
            "its rows a second at 200,000",
            "at 10,000",
            large["rate"] / small["rate"],
            0.8,
            True,
        ),
        Goal(
            "`verify`, 200,000 versions",
            "bare opening loop",
            verify["rate"] / verify["bare"],
            0.6,
            True,
        ),
        Goal(
            "`status`, 200,000 versions (time)",
            "bare `group by` and `integrity_check`",
            verify["status"] / verify["bare_status"],
            2,
            False,
        ),
    ]


def server() -> list[Goal]:
    [figures] = rounds(3, lambda: run(sys.executable, "server.py"))
    return [
        Goal(
            "99th percentile of a read beside `rotate-key`, WAL",
            "the server alone",
            figures["beside_us"] / figures["alone_us"],
            3,
            False,
        ),
        Goal(
            "failed reads and rotations meanwhile",
            "—",
            figures["failed"] + figures["rotation_failed"],
            0,
            False,
            "{:.0f}",
        ),
    ]


def import_time() -> list[Goal]:
    def milliseconds() -> Figures:
        done = subprocess.run(
            [
                sys.executable,
                "-X",
                "importtime",
                "-c",
                "import datasette.app, datasette_secrets",
            ],
            env={**os.environ, "DATASETTE_LOAD_PLUGINS": ""},
            capture_output=True,
            text=True,
            check=True,
            timeout=3600,
        )
        [cumulative] = re.findall(
            r"\|\s*(\d+) \| datasette_secrets$", done.stderr, re.M
        )
        return {"ms": int(cumulative) / 1000}

    [figures] = rounds(5, milliseconds)
    return [
        Goal(
            "`import datasette_secrets`",
            "on top of `datasette.app`",
            figures["ms"],
            10,
            False,
            "{:.1f} ms",
        )
    ]


def pages() -> list[Goal]:
    done = subprocess.run(
        [sys.executable, str(HERE / "pages.py")],
        capture_output=True,
        text=True,
        check=True,
        timeout=3600,
    )
    ratios = [float(ratio) for ratio in re.findall(r"ratio ([\d.]+)", done.stdout)]
    return [
        Goal(
            "`/-/secrets` with 10,000 secrets (time of the slowest of its pages)",
            "Datasette's table page",
            max(ratios),
            0.6,
            False,
        )
    ]


def main() -> None:
    sections = [reads, rotation, server, pages, import_time]
    chosen = [
        each for each in sections if not sys.argv[1:] or each.__name__ in sys.argv[1:]
    ]
    print(
        f"{platform.python_implementation()} {platform.python_version()}, "
        f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}\n"
    )
    print("| what | against | measured | goal |\n|---|---|---|---|")
    missed = 0
    for section in chosen:
        for goal in section():
            print(goal.row(), flush=True)
            missed += not goal.is_met
    sys.exit(f"{missed} goals were missed" if missed else 0)


main()
