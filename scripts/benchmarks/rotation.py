"""Rotation, verification and status of many versions, each against a bare loop.

rotation.py WORKLOAD FOLDER [VERSIONS]      prints its figures as JSON
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import resource
import shutil
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasette.app import Datasette
from nacl.bindings import sodium_unpad
from nacl.secret import Aead, SecretBox

from datasette_secrets import envelope, inspection, rotation, store
from datasette_secrets.instance import get_instance

OLD, NEW = envelope.generate_master_key(), envelope.generate_master_key()


def connect(path: str) -> sqlite3.Connection:
    return sqlite3.connect(path, isolation_level=None)


def open_datasette(path: str, *keys: str) -> Datasette:
    config: dict[str, Any] = {
        "plugins": {"datasette-secrets": {"encryption-key": list(keys)}}
    }
    return Datasette(internal=path, config=config)


def fill(path: str, versions: int) -> None:
    """A hundred versions of each secret, all wrapped by OLD."""
    connect(path).execute("pragma journal_mode = wal").fetchall()
    datasette = open_datasette(path, OLD)
    asyncio.run(datasette.invoke_startup())
    datasette.close()
    key = envelope.MasterKey.parse(OLD)
    plaintext = envelope.Plaintext.parse("sk-a value of usual length, 0123456789abcdef")

    def rows() -> Iterator[tuple[Any, ...]]:
        for number in range(versions):
            name, version = f"SECRET_{number // 100}", number % 100 + 1
            yield (name, version, *plaintext.seal(key, name, version))

    conn = connect(path)
    conn.execute("begin immediate")
    conn.executemany(
        "insert into datasette_secrets (name, version, envelope_version, "
        "encryption_key_name, wrapped_key, encrypted) values (?, ?, ?, ?, ?, ?)",
        rows(),
    )
    conn.execute("commit")
    conn.close()


def bare_rotation(path: str) -> None:
    """Read, unwrap, wrap, executemany: no preflight, no check, no read-back."""
    old, new = (SecretBox(base64.urlsafe_b64decode(key)) for key in (OLD, NEW))
    new_id = envelope.MasterKey.parse(NEW).id
    conn = connect(path)
    last = 0
    while rows := conn.execute(
        "select id, wrapped_key from datasette_secrets where id > ? order by id limit 5000",
        (last,),
    ).fetchall():
        changes = []
        for row_id, wrapped_key in rows:
            wrapped = bytes(new.encrypt(old.decrypt(wrapped_key)))
            changes.append((wrapped, new_id, row_id))
        conn.execute("begin immediate")
        conn.executemany(
            "update datasette_secrets set wrapped_key = ?, encryption_key_name = ? "
            "where id = ?",
            changes,
        )
        conn.execute("commit")
        last = rows[-1][0]
    conn.close()


def bare_verification(path: str) -> None:
    """Read, unwrap, decrypt, unpad."""
    box = SecretBox(base64.urlsafe_b64decode(OLD))
    conn = connect(path)
    last = 0
    while rows := conn.execute(
        "select id, wrapped_key, encrypted from datasette_secrets where id > ? "
        "order by id limit 5000",
        (last,),
    ).fetchall():
        for _, wrapped_key, encrypted in rows:
            plain = box.decrypt(wrapped_key)
            padded = Aead(plain[32:]).decrypt(encrypted, aad=plain[:32])
            sodium_unpad(padded, 256).decode()
        last = rows[-1][0]
    conn.close()


def bare_status(path: str) -> None:
    conn = connect(path)
    conn.execute(
        "select encryption_key_name, count(*) from datasette_secrets "
        "group by encryption_key_name"
    ).fetchall()
    conn.execute("pragma integrity_check(datasette_secrets)").fetchall()
    conn.close()


async def status(datasette: Datasette) -> None:
    """What the command reads before it prints."""
    db = get_instance(datasette).db
    await inspection.inspect(db)
    await rotation.census(datasette)
    await store.count_held(db)


def timed(action: Any) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def ours(path: str, work: Any, *keys: str) -> float:
    datasette = open_datasette(path, *keys)
    seconds = timed(lambda: asyncio.run(work(datasette)))
    datasette.close()
    return seconds


def rotate(folder: Path, versions: int) -> dict[str, float]:
    """Three of each in pairs, so that what else runs slows both of a pair."""
    path, copy = str(folder / "rotation.db"), str(folder / "copy.db")
    fill(path, versions)
    bare, alone = [], []
    for _ in range(3):
        shutil.copyfile(path, copy)
        bare.append(timed(lambda: bare_rotation(copy)))
        shutil.copyfile(path, copy)
        alone.append(rotate_alone(copy))
    empty_path = str(folder / "empty.db")
    fill(empty_path, 1)
    _, idle = rotate_alone(empty_path)
    seconds, peaks = zip(*alone, strict=True)
    pairs = zip(bare, seconds, strict=True)
    return {
        "rate": versions / statistics.median(seconds),
        "times_bare": statistics.median(one / other for one, other in pairs),
        "mebibytes": statistics.median(peaks) - idle,
    }


def rotate_alone(path: str) -> tuple[float, float]:
    """Seconds and peak MiB of a rotation in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "rotate-one", path],
        input=json.dumps([NEW, OLD]),
        capture_output=True,
        text=True,
        check=True,
        timeout=1200,
    )
    seconds, peak = json.loads(done.stdout)
    return seconds, peak


def rotate_one(path: str) -> None:
    keys = json.load(sys.stdin)
    seconds = ours(path, rotation.rotate, *keys)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps([seconds, peak]))


def verify(folder: Path, versions: int) -> dict[str, float]:
    path = str(folder / f"verify-{os.getpid()}.db")
    fill(path, versions)
    return {
        "bare": versions / timed(lambda: bare_verification(path)),
        "rate": versions / ours(path, rotation.verify, OLD),
        "bare_status": min(timed(lambda: bare_status(path)) for _ in range(3)),
        "status": min(ours(path, status, OLD) for _ in range(3)),
    }


def main() -> None:
    if sys.argv[1] == "rotate-one":
        rotate_one(sys.argv[2])
        return
    workload, folder = sys.argv[1], Path(sys.argv[2])
    versions = int(sys.argv[3]) if len(sys.argv) > 3 else 200_000
    print(json.dumps({"rotate": rotate, "verify": verify}[workload](folder, versions)))


if __name__ == "__main__":
    main()
