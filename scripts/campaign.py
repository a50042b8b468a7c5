"""Tries for minutes what the test suite tries for seconds, and says what survived.

    python scripts/campaign.py [--scale 1.0] [--seed N] [PART]...

Parts: flips, writes, kills, traffic, servers, model, tokens. Without one, all of them.
Exits 1 if anything was lost, half done or decrypted that should not have been. Needs Linux
and a C compiler.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import test_concurrency  # noqa: E402
import test_envelope  # noqa: E402
import test_faults  # noqa: E402
import test_keep  # noqa: E402
import test_model  # noqa: E402
import test_servers  # noqa: E402
from datasette.app import Datasette  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.stateful import run_state_machine_as_test  # noqa: E402
from support import decoder, faults, traffic  # noqa: E402
from support.console import Console  # noqa: E402

from datasette_secrets import envelope  # noqa: E402

PROCESSORS = os.cpu_count() or 1


class Campaign:
    """What was tried, and what of it did not survive."""

    def __init__(self, scale: float, seed: int, folder: Path) -> None:
        self.scale = scale
        self.seed = seed
        self.folder = folder
        self.rows: list[tuple[str, int]] = []
        self.problems: list[str] = []
        shim = test_faults.build_shim(folder)
        if shim is None:
            sys.exit("The campaign needs Linux and a C compiler")
        self.shim = shim

    def times(self, number: float) -> int:
        return max(1, round(number * self.scale))

    def tried(self, what: str, number: int) -> None:
        self.rows.append((what, number))
        print(f"  {number:>9,}  {what}", flush=True)

    def problem(self, text: str) -> None:
        self.problems.append(text)
        print(f"  PROBLEM: {text}", flush=True)


def flips(campaign: Campaign) -> None:
    """Every single bit and every truncation of rows of many sizes."""
    chance = random.Random(campaign.seed)
    flipped = cut = moved = 0
    for _ in range(campaign.times(30)):
        value = "v" * chance.choice([1, 255, 256, 1_000])
        ring = envelope.KeyRing([test_envelope.new_key()])
        sealed = test_envelope.parse_value(value).seal(ring.primary, "A", 1)
        assert test_envelope.opens(ring, "A", 1, sealed)
        for column in ("wrapped_key", "encrypted"):
            intact = getattr(sealed, column)
            for bit in range(len(intact) * 8):
                changed = bytearray(intact)
                changed[bit // 8] ^= 1 << bit % 8
                row = sealed._replace(**{column: bytes(changed)})
                flipped += 1
                if test_envelope.opens(ring, "A", 1, row):
                    campaign.problem(f"{column}: bit {bit} flipped, and it opens")
            for length in range(len(intact)):
                row = sealed._replace(**{column: intact[:length]})
                cut += 1
                if test_envelope.opens(ring, "A", 1, row):
                    campaign.problem(f"{column}: cut to {length}, and it opens")
        for _ in range(1_000):
            name, version = chance.choice("ABCD"), chance.randrange(1, 10_000)
            moved += 1
            if (name, version) != ("A", 1) and test_envelope.opens(
                ring, name, version, sealed
            ):
                campaign.problem(f"moved to {name} version {version}, and it opens")
    campaign.tried("single bits flipped", flipped)
    campaign.tried("truncations", cut)
    campaign.tried("moves to another name or version", moved)


def writes(campaign: Campaign) -> None:
    """Each operation, failing at every single change that it makes to the files."""
    step = max(1, round(1 / campaign.scale))
    for mode in faults.MODES:
        stopped = 0
        for job, report in test_faults.reports(
            campaign.shim, test_faults.jobs(mode, step), seconds=3600
        ):
            stopped += report["stopped"]
            for point, wrong in report["wrong"].items():
                campaign.problem(f"{job['operation']}, {mode} at {point}: {wrong}")
        campaign.tried(f"writes, syncs and truncations: {mode}", stopped)


# Commands, killed at random, on a database that lives on.

Values = dict[tuple[str, int], str | None]


class Killed:
    """One database, and the commands that are run on it and killed."""

    def __init__(self, campaign: Campaign, number: int, journal: str) -> None:
        self.campaign = campaign
        self.chance = random.Random(f"{campaign.seed} {number}")
        self.path = str(campaign.folder / f"killed-{number}.db")
        self.keys = [envelope.generate_master_key() for _ in range(2)]
        self.outcomes: Counter[str] = Counter()
        traffic.set_journal_mode(self.path, journal)
        self.values: Values = {}

    def command(
        self, *arguments: str, stdin: str = "", kill_at: int = 0
    ) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "DATASETTE_SECRETS_ENCRYPTION_KEY": ",".join(self.keys),
        }
        if kill_at:
            mode = self.chance.choice(list(faults.KILLS.values()))
            environment |= {
                "LD_PRELOAD": str(self.campaign.shim),
                "FAULT_PREFIX": self.path,
                "FAULT_AT": str(kill_at),
                "FAULT_MODE": str(mode),
            }
        return subprocess.run(
            [
                *(sys.executable, "-m", "datasette", "secrets"),
                *arguments,
                *("--internal", self.path),
            ],
            input=stdin,
            env=environment,
            text=True,
            capture_output=True,
            check=False,
            timeout=600,
        )

    def choose(self) -> tuple[list[str], str, Values]:
        """A command, its input, and what there is to read once it has finished."""
        after = dict(self.values)
        name = f"SECRET_{self.chance.randrange(4)}"
        value = secrets.token_urlsafe(self.chance.choice([9, 900]))
        kind = self.chance.choice(["set", "set", "import", "destroy", "rotate", "data"])
        here = [key for key, value in self.values.items() if value is not None]
        if kind == "destroy" and here:
            name, version = self.chance.choice(here)
            after[name, version] = None
            return ["destroy", name, "--version", str(version), "--yes"], "", after
        if kind == "import":
            lines = []
            for number in range(3):
                name = f"IMPORTED_{number}"
                after[name, self.next(name)] = f"{value}{number}"
                lines.append(f"{name}='{value}{number}'\n")
            return ["import", "-"], "".join(lines), after
        if kind in ("rotate", "data") and self.values:
            self.keys.reverse()
            more = ["--new-data-keys"] if kind == "data" else []
            return ["rotate-key", "--batch-size", "3", *more], "", after
        after[name, self.next(name)] = value
        return ["set", name], value, after

    def next(self, name: str) -> int:
        return 1 + max((v for each, v in self.values if each == name), default=0)

    def read(self) -> Values:
        """What the decoder finds in the file."""
        if faults.integrity(self.path) != "ok":
            raise decoder.Refused("integrity_check")
        found: Values = {
            (row["name"], row["version"]): None for row in decoder.rows(self.path)
        }
        for opened in decoder.open_file(self.path, *self.keys):
            found[opened.name, opened.version] = opened.value.decode()
        return found

    def once(self) -> None:
        arguments, stdin, after = self.choose()
        done = self.command(
            *arguments, stdin=stdin, kill_at=self.chance.randrange(1, 40)
        )
        was_killed = done.returncode == -signal.SIGKILL
        self.outcomes["killed" if was_killed else "finished first"] += 1
        if not was_killed and done.returncode:
            self.campaign.problem(f"{arguments[0]} exited {done.returncode}")
        try:
            found = self.read()
        except decoder.Refused as refused:
            self.campaign.problem(f"{arguments[0]} was killed: {refused}")
            return
        if found not in (self.values, after):
            self.campaign.problem(f"{arguments[0]} was killed: half done")
        if was_killed and arguments[0] in ("rotate-key", "destroy"):
            again = self.command(*arguments, stdin=stdin)
            if again.returncode or self.read() != after:
                self.campaign.problem(f"{arguments[0]}, run again, did not finish")
            found = after
        self.values = found


def kills(campaign: Campaign) -> None:
    """Real commands, killed at random, one after another on the same databases."""
    stores = [
        Killed(campaign, number, ("wal", "delete")[number % 2])
        for number in range(2 * PROCESSORS)
    ]
    wanted = campaign.times(500)

    def kill(store: Killed) -> None:
        store.command("set", "FIRST", "--create", stdin="the first value")
        store.values = store.read()
        while store.outcomes["killed"] < -(-wanted // len(stores)):
            store.once()

    with ThreadPoolExecutor(PROCESSORS) as pool:
        list(pool.map(kill, stores))
    total: Counter[str] = sum((store.outcomes for store in stores), Counter())
    campaign.tried("commands killed at random", total["killed"])
    campaign.tried("commands that finished before their kill", total["finished first"])
    versions = sum(len(store.values) for store in stores)
    campaign.tried("versions there afterwards, each as it should be", versions)


def traffic_(campaign: Campaign) -> None:
    """Two servers, rotations both ways, readers, writers and the shell at once."""
    for journal in ("wal", "delete"):
        path = str(campaign.folder / f"traffic-{journal}.db")
        traffic.set_journal_mode(path, journal)
        over = threading.Event()
        commands: Counter[int] = Counter()

        def run_commands(path: str, over: threading.Event, seen: Counter[int]) -> None:
            while not over.is_set():
                done = subprocess.run(
                    [
                        *(sys.executable, "-m", "datasette", "secrets"),
                        *("list", "--internal", path),
                    ],
                    capture_output=True,
                    text=True,
                    check=False,
                    timeout=600,
                )
                seen[done.returncode] += 1
                if done.returncode:
                    campaign.problem(f"the shell, beside: {done.stderr.strip()}")

        shell = threading.Thread(target=run_commands, args=(path, over, commands))
        shell.start()
        try:
            report = traffic.run(
                test_concurrency.start,
                test_concurrency.finish,
                path,
                seconds=campaign.times(60),
            )
        finally:
            over.set()
            shell.join(600)
        for problem in report["problems"]:
            campaign.problem(f"traffic, {journal}: {problem}")
        for what in ("reads", "writes", "rotations"):
            campaign.tried(f"{what} by two servers at once, {journal}", report[what])
        campaign.tried(f"commands beside them, {journal}", commands[0])


def servers(campaign: Campaign) -> None:
    """Two servers get a new key in two steps, under a minute of reads and writes."""
    folder = campaign.folder / "servers"
    folder.mkdir()
    report = test_servers.introduce_a_key(
        test_servers.with_key_files(Console(folder)), seconds=campaign.times(60)
    )
    for failure in report["failures"]:
        campaign.problem(f"a request while the key was introduced: {failure}")
    if not report["as_written"] or not report["status"]["ok"]:
        campaign.problem("after a new key, what is stored is not what was written")
    campaign.tried("requests while a key was introduced", report["requests"])
    campaign.tried("values written meanwhile, each there once", report["writes"])


def model(campaign: Campaign) -> None:
    """Random sequences of calls against a plain dictionary; properties of the envelope."""
    examples = campaign.times(500)
    try:
        run_state_machine_as_test(
            test_model.Secrets,
            settings=settings(
                max_examples=examples,
                stateful_step_count=50,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
    except Exception as error:
        campaign.problem(f"the model: {type(error).__name__}: {error}")
    campaign.tried("sequences of up to 50 calls against the model", examples)
    examples = campaign.times(3_000)
    row = {
        "name": test_envelope.names,
        "version": test_envelope.versions,
        "value": test_envelope.values,
    }
    moved = {"other": test_envelope.names, "number": test_envelope.versions}
    data_key = st.binary(min_size=32, max_size=32)
    for test, strategies in (
        (test_envelope.test_open_returns_what_was_sealed, row),
        (test_envelope.test_the_decoder_opens_what_the_package_sealed, row),
        (
            test_envelope.test_the_package_opens_what_the_decoder_sealed,
            {**row, "data_key": data_key},
        ),
        (
            test_envelope.test_open_rejects_a_row_moved_to_another_name_or_version,
            {"name": row["name"], "version": row["version"], **moved},
        ),
    ):
        often = settings(max_examples=examples, deadline=None, database=None)
        try:
            often(given(**strategies)(test.hypothesis.inner_test))()
        except Exception as error:
            campaign.problem(f"{test.__name__}: {type(error).__name__}")
    campaign.tried("round trips and moves of random rows", 4 * examples)


def tokens(campaign: Campaign) -> None:
    """A token every hour for more than a year, of which ten are kept."""
    path = str(campaign.folder / "tokens.db")
    key = envelope.generate_master_key()
    config = {"plugins": {"datasette-secrets": {"encryption-key": key}}}
    datasette = Datasette(internal=path, config=config)
    wanted = campaign.times(10_000)

    async def run() -> tuple[test_keep.Size, test_keep.Size]:
        await datasette.invoke_startup()
        before = await test_keep.store_tokens(datasette, path, 30)
        return before, await test_keep.store_tokens(datasette, path, wanted)

    before, after = asyncio.run(run())
    datasette.close()
    if after.rows != 10 or after.pages != before.pages:
        campaign.problem(f"tokens: {before} became {after}")
    campaign.tried("tokens of which ten were kept", wanted)
    campaign.tried("bytes by which the log grew", after.file - before.file)


PARTS: dict[str, Callable[[Campaign], None]] = {
    "flips": flips,
    "writes": writes,
    "kills": kills,
    "traffic": traffic_,
    "servers": servers,
    "model": model,
    "tokens": tokens,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--scale", type=float, default=1.0, help="1 is the whole")
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    unknown = set(options.parts) - PARTS.keys()
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        campaign = Campaign(options.scale, options.seed, Path(folder))
        print(f"Seed {campaign.seed}, scale {campaign.scale}")
        for name in options.parts or PARTS:
            began = time.monotonic()
            print(f"{name}: {(PARTS[name].__doc__ or '').strip()}", flush=True)
            PARTS[name](campaign)
            print(f"  in {time.monotonic() - began:.0f} seconds", flush=True)
    print()
    print("| tried | times |")
    print("|---|---:|")
    for what, number in campaign.rows:
        print(f"| {what} | {number:,} |")
    if options.json:
        figures: dict[str, Any] = {
            "tried": dict(campaign.rows),
            "problems": campaign.problems,
        }
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(
        f"\n{len(campaign.problems)} problems"
        if campaign.problems
        else "\nAll of it survived."
    )
    return 1 if campaign.problems else 0


if __name__ == "__main__":
    sys.exit(main())
