"""One process of several that use one database at once; and what they must agree on.

    python -m support.traffic < job.json > report.json

tests/test_concurrency.py starts this for seconds, scripts/campaign.py for minutes.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sqlite3
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import closing
from typing import Any

from cryptography.fernet import Fernet
from datasette.app import Datasette
from support import decoder
from support.faults import OLD_TABLE, datasette_on

from datasette_secrets import (
    InvalidSecret,
    VersionConflict,
    database,
    delete_secret,
    envelope,
    get_secret,
    restore_secret,
    rotation,
    schema,
    set_secret,
    store,
)
from datasette_secrets.cli import serve
from datasette_secrets.instance import get_instance

NAME = "SECRET"
NAMES = [f"SECRET_{number}" for number in range(4)]


def value_of(worker: int, number: int) -> str:
    return f"value {worker}.{number}"


def set_journal_mode(path: str, journal: str) -> None:
    with closing(sqlite3.connect(path)) as conn:
        conn.execute(f"pragma journal_mode = {journal}").fetchall()


def make_table_of_0x(path: str, key: str, *, names: int) -> None:
    """A table of 0.x in which every name has the same version twice."""
    with closing(sqlite3.connect(path)) as conn, conn:
        conn.execute(OLD_TABLE)
        for number in range(names):
            for _ in range(2):
                conn.execute(
                    "insert into datasette_secrets "
                    "(name, version, encrypted, encryption_key_name) "
                    "values (?, 1, ?, 'default')",
                    (f"SECRET_{number}", Fernet(key).encrypt(b"a value")),
                )


# What one process does.


async def set_(datasette: Datasette, job: dict[str, Any]) -> dict[str, Any]:
    setting = [
        set_secret(datasette, NAME, value_of(job["worker"], number))
        for number in range(job["times"])
    ]
    return {"versions": await asyncio.gather(*setting)}


async def compete(datasette: Datasette, job: dict[str, Any]) -> dict[str, Any]:
    """Both processes try to write version n, once each, until version n is there."""
    won = lost = 0
    for expected in range(job["times"]):
        try:
            await set_secret(
                datasette,
                NAME,
                value_of(job["worker"], expected),
                expected_version=expected,
            )
            won += 1
        except VersionConflict as conflict:
            assert conflict.actual > expected
            lost += 1
        # The other one may be a round behind, and may not have tried yet.
        while await newest(datasette) <= expected:
            await asyncio.sleep(0)
    return {"won": won, "lost": lost}


async def newest(datasette: Datasette) -> int:
    found = await store.history(get_instance(datasette).db, NAME)
    return found[0].version if found else 0


async def migrate(datasette: Datasette, job: dict[str, Any]) -> dict[str, Any]:
    await database.write(get_instance(datasette).db, schema.apply_migrations)
    return {"legacy": (await rotation.census(datasette)).legacy}


async def rotate(datasette: Datasette, job: dict[str, Any]) -> dict[str, Any]:
    report = await rotation.rotate(datasette, batch_size=10)
    return {"changed": report.changed}


async def live(datasette: Datasette, job: dict[str, Any]) -> dict[str, Any]:
    """A server for a while: several tasks that read and change at random."""
    report: dict[str, Any] = {
        "reads": 0,
        "writes": 0,
        "rotations": 0,
        "problems": [],
        "written": [],
    }
    ends = time.monotonic() + job["seconds"]

    async def task(number: int) -> None:
        chance = random.Random(f"{job['worker']} {number}")  # noqa: S311  # not for keys
        count = 0
        # However slow the machine: a few turns each, and a rotation among them.
        while time.monotonic() < ends or count < 10:
            count += 1
            name = chance.choice(NAMES)
            try:
                if number == 0 and count == 5:
                    await rotate_all(chance)
                else:
                    unique = f"{job['worker']}.{number}.{count}"
                    await act(datasette, chance, name, unique)
            except Exception as error:
                report["problems"].append(f"{type(error).__name__}: {error}")

    async def act(
        datasette: Datasette, chance: random.Random, name: str, unique: str
    ) -> None:
        kind = chance.random()
        if kind < 0.80:
            value = await get_secret(datasette, name, f"actor {unique}")
            report["reads"] += 1
            if value is not None and not value.startswith(f"{name} "):
                report["problems"].append("a value of another secret")
        elif kind < 0.92:
            value = f"{name} {unique}"
            version = await set_secret(datasette, name, value)
            report["writes"] += 1
            report["written"].append([name, version, value])
        elif kind < 0.96:
            try:
                await delete_secret(datasette, name)
            except InvalidSecret:
                return  # nothing was stored yet
        elif kind < 0.99:
            try:
                await restore_secret(datasette, name)
            except InvalidSecret:
                return
        else:
            await rotate_all(chance)

    async def rotate_all(chance: random.Random) -> None:
        await rotation.rotate(
            datasette, batch_size=7, new_data_keys=chance.random() < 0.3
        )
        report["rotations"] += 1

    await asyncio.gather(*(task(number) for number in range(job["tasks"])))
    return report


DO: dict[str, Callable[..., Awaitable[dict[str, Any]]]] = {
    "set": set_,
    "compete": compete,
    "migrate": migrate,
    "rotate": rotate,
    "live": live,
}


# All of them together.


def run(
    start: Callable[..., Any],
    finish: Callable[..., dict[str, Any]],
    internal: str,
    *,
    seconds: float,
) -> dict[str, Any]:
    """Two servers whose rings are in different orders, and what they did and found.

    Each rotates towards its own primary key, against the other.
    """
    keys = [envelope.generate_master_key() for _ in range(2)]
    running = [
        start(internal, *ring, do="live", worker=worker, seconds=seconds, tasks=4)
        for worker, ring in enumerate((keys, keys[::-1]))
    ]
    done = [finish(each) for each in running]
    problems = [problem for each in done for problem in each["problems"]]
    written = sorted(tuple(each) for report in done for each in report["written"])
    stored = sorted(
        (row.name, row.version, row.value.decode())
        for row in decoder.open_file(internal, *keys)
    )
    if written != stored:
        problems.append("what was written is not what is stored")
    for name in NAMES:
        versions = [version for each, version, _ in stored if each == name]
        if versions != list(range(1, len(versions) + 1)):
            problems.append(f"{name} lacks a version")
    return {
        "problems": sorted(set(problems)),
        **{
            key: sum(report[key] for report in done)
            for key in ("reads", "writes", "rotations")
        },
    }


async def main() -> None:
    job = json.load(sys.stdin)
    datasette = datasette_on(job["internal"], *job["keys"])
    # As in the shell: Datasette takes what a VACUUM moved for renamed tables.
    datasette.track_event = serve.track_nothing  # type: ignore[method-assign]
    report = await DO[job["do"]](datasette, job)
    datasette.close()
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    asyncio.run(main())
    # Threads of Datasette's that still wait for work are not waited for.
    sys.stdout.flush()
    os._exit(0)
