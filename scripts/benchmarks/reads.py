"""One read workload, for this package and for datasette-secrets 0.3a0 alike.

    reads.py WORKLOAD FOLDER      prints its figures as JSON

bench.py runs it in an environment of each. Key and table are such that both
packages read them; who stores what is the one thing that differs.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import sqlite3
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# First: importing 0.3a0 before Datasette fails.
import datasette.app
from datasette import hookimpl
from datasette.plugins import pm

import datasette_secrets

Datasette = datasette.app.Datasette

NAMES = [f"SECRET_{number}" for number in range(20)]
ACTORS = [f"actor{number}" for number in range(10)]
IS_OURS = hasattr(datasette_secrets, "set_secret")


class Registering:
    @hookimpl
    def register_secrets(self) -> list[datasette_secrets.Secret]:
        return [datasette_secrets.Secret(name) for name in NAMES]


async def start(folder: Path, journal_mode: str) -> tuple[Any, str, bytes]:
    """A started Datasette with every name stored; its file and its key."""
    path = str(folder / f"reads-{os.urandom(4).hex()}-{journal_mode}.db")
    connect(path).execute(f"pragma journal_mode = {journal_mode}").fetchall()
    raw = os.urandom(32)
    key = base64.urlsafe_b64encode(raw).decode()
    datasette = Datasette(
        internal=path,
        config={"plugins": {"datasette-secrets": {"encryption-key": key}}},
    )
    await datasette.invoke_startup()
    for name in NAMES:
        if IS_OURS:
            await datasette_secrets.set_secret(datasette, name, "sk-a value")
        else:
            await store_as_0x(datasette, key, name)
    return datasette, path, raw


async def store_as_0x(datasette: Any, key: str, name: str) -> None:
    from cryptography.fernet import Fernet

    await datasette.get_internal_database().execute_write(
        "insert into datasette_secrets (name, version, encrypted, encryption_key_name) "
        "values (?, 1, ?, 'default')",
        (name, Fernet(key).encrypt(b"sk-a value")),
    )


def connect(path: str) -> sqlite3.Connection:
    return sqlite3.connect(path, isolation_level=None)


async def sequential(folder: Path) -> dict[str, float]:
    datasette, path, raw = await start(folder, "wal")
    get_secret = datasette_secrets.get_secret
    slices, count = (15, 2000) if IS_OURS else (5, 400)
    rates, times_floor = [], []
    for _ in range(slices):
        begun = time.perf_counter()
        for _ in range(count):
            await get_secret(datasette, NAMES[0], "ann")
        rates.append(count / (time.perf_counter() - begun))
        if IS_OURS:
            # At once, since the speed of a shared machine changes within seconds.
            times_floor.append(floor(path, raw, count) / rates[-1])
    datasette.close()
    result = {"rate": statistics.median(rates)}
    if times_floor:
        result["times_floor"] = statistics.median(times_floor)
    return result


def floor(path: str, raw: bytes, count: int) -> float:
    """A bare read on an open connection, and PyNaCl opening the row."""
    from nacl.bindings import sodium_unpad
    from nacl.secret import Aead, SecretBox

    conn = connect(path)
    begun = time.perf_counter()
    for _ in range(count):
        [(wrapped_key, encrypted)] = conn.execute(
            "select wrapped_key, encrypted from datasette_secrets "
            "where name = :name order by version desc limit 1",
            {"name": NAMES[0]},
        ).fetchall()
        plain = SecretBox(raw).decrypt(wrapped_key)
        padded = Aead(plain[32:]).decrypt(encrypted, aad=plain[:32])
        sodium_unpad(padded, 256).decode()
    rate = count / (time.perf_counter() - begun)
    conn.close()
    return rate


async def concurrent(folder: Path) -> dict[str, float]:
    # Outside of WAL mode the file itself counts its write transactions.
    figures = {}
    for journal_mode in ("wal", "delete"):
        datasette, path, _ = await start(folder, journal_mode)
        seconds = 2
        before = change_counter(path)
        ends = time.perf_counter() + seconds
        calls = 0

        async def read(task: int, datasette: Any = datasette) -> None:
            nonlocal calls
            pick = random.Random(task)
            while time.perf_counter() < ends:  # noqa: B023
                await datasette_secrets.get_secret(
                    datasette, pick.choice(NAMES), pick.choice(ACTORS)
                )
                calls += 1

        await asyncio.gather(*(read(task) for task in range(100)))
        figures[f"rate_{journal_mode}"] = calls / seconds
        if journal_mode == "delete":
            figures["writes"] = (change_counter(path) - before) / seconds
        datasette.close()
    return figures


def change_counter(path: str) -> int:
    return int.from_bytes(Path(path).read_bytes()[24:28], "big")


HOLD_LOCK = """
import sqlite3, sys, time
conn = sqlite3.connect(sys.argv[1], isolation_level=None)
for statement in sys.argv[2:]:
    conn.execute(statement)
print("locked", flush=True)
time.sleep(2)
conn.close()
"""


async def locked(folder: Path) -> dict[str, float]:
    """The loop's longest stall while another process holds the lock for two seconds.

    And while nobody does: what then stalls is the machine.
    """
    figures = {}
    for label, journal_mode, begin in (
        ("free", "wal", []),
        ("wal", "wal", ["begin immediate"]),
        ("delete", "delete", ["begin exclusive"]),
    ):
        datasette, path, _ = await start(folder, journal_mode)
        for name in NAMES:
            await datasette_secrets.get_secret(datasette, name, "ann")
        stalls: list[float] = []
        waits: list[float] = []
        failed = 0
        holding = True

        async def tick(stalls: list[float] = stalls) -> None:
            last = time.perf_counter()
            while holding:  # noqa: B023
                await asyncio.sleep(0.0005)
                now = time.perf_counter()
                stalls.append(now - last - 0.0005)
                last = now

        async def read(
            number: int, datasette: Any = datasette, waits: list[float] = waits
        ) -> None:
            nonlocal failed
            while holding:  # noqa: B023
                begun = time.perf_counter()
                try:
                    await datasette_secrets.get_secret(
                        datasette, NAMES[number], ACTORS[number]
                    )
                except Exception:  # whatever it is, it counts as a failed read
                    failed += 1
                waits.append(time.perf_counter() - begun)
                await asyncio.sleep(0.001)

        holder = await asyncio.to_thread(
            subprocess.Popen,
            [sys.executable, "-c", HOLD_LOCK, path, *begin],
            stdout=subprocess.PIPE,
        )
        assert holder.stdout is not None
        await asyncio.to_thread(holder.stdout.readline)
        tasks = [asyncio.ensure_future(read(number)) for number in range(5)]
        ticker = asyncio.ensure_future(tick())
        await asyncio.to_thread(holder.wait)
        holder.stdout.close()
        holding = False
        await asyncio.gather(ticker, *tasks)
        figures[f"stall_ms_{label}"] = max(stalls) * 1000
        figures[f"longest_read_ms_{label}"] = max(waits) * 1000
        figures[f"failed_{label}"] = failed
        datasette.close()
    return figures


def main() -> None:
    workload, folder = sys.argv[1], Path(sys.argv[2])
    pm.register(Registering())
    workloads: dict[str, Any] = {
        "sequential": sequential,
        "concurrent": concurrent,
        "locked": locked,
    }
    print(json.dumps(asyncio.run(workloads[workload](folder))))


main()
