"""Reads while another process rotates: does a reader notice?

    server.py FOLDER      prints its figures as JSON

One process reads; a second one rotates 20,000 versions of the same file in WAL mode.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import time
from pathlib import Path

from rotation import NEW, OLD, fill, open_datasette

from datasette_secrets import get_secret

ROTATE = """
import asyncio, json, sys
from datasette.app import Datasette
from datasette_secrets import rotation
path, keys = json.load(sys.stdin)
config = {"plugins": {"datasette-secrets": {"encryption-key": keys}}}
datasette = Datasette(internal=path, config=config)
report = asyncio.run(rotation.rotate(datasette))
datasette.close()
sys.exit(not report.complete)
"""


async def reads(path: str) -> dict[str, float]:
    datasette = open_datasette(path, OLD, NEW)
    await datasette.invoke_startup()
    figures: dict[str, float] = {"failed": 0}
    rotating = await asyncio.create_subprocess_exec(
        sys.executable, "-c", ROTATE, stdin=asyncio.subprocess.PIPE
    )
    alone: list[float] = []
    beside: list[float] = []

    async def read_once(latencies: list[float], turn: int) -> None:
        begun = time.perf_counter()
        try:
            await get_secret(datasette, f"SECRET_{turn % 20}", f"actor{turn % 5}")
        except Exception:  # whatever it is, it counts as a failed read
            figures["failed"] += 1
        latencies.append(time.perf_counter() - begun)

    async def read_for(latencies: list[float], done: asyncio.Event) -> None:
        turn = 0
        while not done.is_set():
            await read_once(latencies, turn)
            turn += 1
            await asyncio.sleep(0.0005)

    # The other process is waiting for its keys: both measurements have it beside them.
    done = asyncio.Event()
    asyncio.get_running_loop().call_later(3, done.set)
    await read_for(alone, done)

    assert rotating.stdin is not None
    rotating.stdin.write(json.dumps([path, [NEW, OLD]]).encode())
    rotating.stdin.close()
    done = asyncio.Event()
    reader = asyncio.ensure_future(read_for(beside, done))
    figures["rotation_failed"] = await asyncio.wait_for(rotating.wait(), 600)
    done.set()
    await reader
    datasette.close()
    figures["alone_us"] = 1e6 * percentile_99(alone)
    figures["beside_us"] = 1e6 * percentile_99(beside)
    return figures


def percentile_99(latencies: list[float]) -> float:
    return statistics.quantiles(latencies, n=100)[98]


def main() -> None:
    path = str(Path(sys.argv[1]) / f"server-{os.getpid()}.db")
    fill(path, 20_000)
    print(json.dumps(asyncio.run(reads(path))))


main()
