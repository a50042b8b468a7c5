"""Runs one command over and over, and lets it fail at its n-th change to the files.

    LD_PRELOAD=fault_shim.so python -m support.faults < jobs.json > reports.json

A job names an operation, a journal mode, a way to fail, and a step: 1 to fail at every
change, 5 at every fifth. For each of them a child process runs the operation on a copy of the same database and is
killed there, or sees an error. Another child then looks at what is left, as a server that
starts afterwards would, and runs the operation again. It reports what is wrong in words,
never a value. A single job with a `path` runs the operation on that file, once, and stops it at
the change `at`. tests/test_faults.py and scripts/campaign.py start this.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import pickle
import shutil
import signal
import sqlite3
import sys
import tempfile
import traceback
from collections.abc import Awaitable, Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from cryptography.fernet import Fernet
from datasette.app import Datasette
from support import decoder, forks

from datasette_secrets import (
    SecretsError,
    envelope,
    get_secret,
    rotation,
    service,
    set_secret,
    store,
    upgrade,
)
from datasette_secrets.instance import get_instance

KILLS = {"kill-before": 1, "kill-after": 2, "kill-torn": 3}
ERRORS = {"io-error": 4, "disk-full": 5}
MODES = KILLS | ERRORS

# Fixed, so that a run can be repeated. They protect nothing.
NEW_KEY = "bmV3IG1hc3RlciBrZXkgZm9yIHRoZSBmYXVsdCB0ZXM="
OLD_KEY = "b2xkIG1hc3RlciBrZXkgZm9yIHRoZSBmYXVsdCB0ZXM="
RING = (NEW_KEY, OLD_KEY)
FILLER = "f" * 700
IMPORTED = {f"IMPORTED_{number}": f"imported {number} {FILLER}" for number in range(6)}

Values = dict[tuple[str, int], str | None]


def datasette_on(path: str, *keys: str) -> Datasette:
    return Datasette(
        internal=path,
        config={"plugins": {"datasette-secrets": {"encryption-key": list(keys)}}},
    )


async def fill(datasette: Datasette) -> None:
    """Twelve versions of four secrets; one is destroyed, one deleted."""
    for number in range(1, 5):
        for version in range(1, 4):
            await set_secret(
                datasette, f"SECRET_{number}", f"value {number}.{version} {FILLER}"
            )
    await service.destroy_versions(datasette, "SECRET_3", [1])
    await service.delete_secret(datasette, "SECRET_4")


OLD_TABLE = """create table datasette_secrets (
    id integer primary key, name text not null, note text,
    version integer not null default 1, encrypted blob,
    encryption_key_name text not null, created_at text, created_by text,
    updated_at text, updated_by text, deleted_at text, deleted_by text,
    last_used_at text, last_used_by text)"""


def fill_as_0x_did(path: str) -> None:
    """The table of 0.x with six rows, two of which are the same version."""
    with closing(sqlite3.connect(path)) as conn, conn:
        conn.execute(OLD_TABLE)
        for name, version, value in (
            ("SECRET_1", 1, "value 1.1"),
            ("SECRET_1", 2, "value 1.2"),
            ("SECRET_2", 1, "value 2.2"),  # the lowest id is the one that was served
            ("SECRET_2", 1, "value 2.1"),
            ("SECRET_3", 1, "value 3.1"),
            ("SECRET_4", 1, "value 4.1"),
        ):
            conn.execute(
                "insert into datasette_secrets "
                "(name, version, encrypted, encryption_key_name) "
                "values (?, ?, ?, 'default')",
                (name, version, Fernet(OLD_KEY).encrypt(value.encode())),
            )


# The operations.


async def set_(datasette: Datasette) -> None:
    await set_secret(datasette, "SECRET_1", "the new value " + FILLER)


async def rotate(datasette: Datasette) -> None:
    await rotation.rotate(datasette, batch_size=5)


async def rotate_new_data_keys(datasette: Datasette) -> None:
    await rotation.rotate(datasette, batch_size=5, new_data_keys=True)


async def destroy(datasette: Datasette) -> None:
    await service.destroy_versions(datasette, "SECRET_1", [1, 2])


async def roll_back(datasette: Datasette) -> None:
    await service.roll_back(datasette, "SECRET_2", 1)


async def first_start(datasette: Datasette) -> None:
    await datasette.invoke_startup()


async def upgrade_all(datasette: Datasette) -> None:
    await upgrade.upgrade(datasette, batch_size=2)


async def import_(datasette: Datasette) -> None:
    values = {}
    for name, value in IMPORTED.items():
        plaintext = envelope.Plaintext.parse(value)
        values[name] = plaintext
    await service.set_secrets(datasette, values, skip_existing=True)


async def careless(datasette: Datasette) -> None:
    """Re-wraps in two transactions: what this program has to find."""
    db = datasette.get_internal_database()
    place = get_instance(datasette)
    ring = place.settings.require_ring()
    for row in await db.execute_fn(lambda conn: store.rows_from(conn, 0, 100)):
        rewrapped_key = envelope.rewrap(ring, row.name, row.version, row)
        for column, cell in (
            ("encryption_key_name", ring.primary.id),
            ("wrapped_key", rewrapped_key),
        ):
            await db.execute_write(
                f"update datasette_secrets set {column} = ? where id = ?",
                [cell, row.id],
            )


class Operation:
    """A command, the database that it starts from, and what must hold afterwards.

    `after`: what `values` become once it has finished, from what they were.
    `is_whole`: whether it is one transaction, so that nothing between is allowed.
    `logged`: how many rows of the log it makes.
    """

    def __init__(
        self,
        run: Callable[[Datasette], Awaitable[None]],
        after: Callable[[Values], Values] = dict,
        *,
        from_0x: bool = False,
        is_whole: bool = True,
        logged: int = 1,
    ) -> None:
        self.run = run
        self.after = after
        self.from_0x = from_0x
        self.is_whole = is_whole
        self.logged = logged


def renumbered(before: Values) -> Values:
    """What 0.x served first of two rows with one version comes last."""
    return {key: f"value {key[0][-1]}.{key[1]}" for key in before}


OPERATIONS = {
    "careless": Operation(careless, is_whole=False),
    "set": Operation(
        set_, lambda before: {**before, ("SECRET_1", 4): "the new value " + FILLER}
    ),
    "rotate": Operation(rotate, is_whole=False),
    "rotate-new-data-keys": Operation(rotate_new_data_keys, is_whole=False),
    "destroy": Operation(
        destroy,
        lambda before: {**before, ("SECRET_1", 1): None, ("SECRET_1", 2): None},
    ),
    "roll-back": Operation(
        roll_back, lambda before: {**before, ("SECRET_2", 4): f"value 2.1 {FILLER}"}
    ),
    "import": Operation(
        import_,
        lambda before: {
            **before,
            **{(name, 1): value for name, value in IMPORTED.items()},
        },
        logged=len(IMPORTED),
    ),
    "first-start": Operation(first_start, renumbered, from_0x=True),
    "upgrade": Operation(upgrade_all, renumbered, from_0x=True, is_whole=False),
}


REWRITING = (rotate, rotate_new_data_keys, upgrade_all, first_start)


# Looking at what is left.


def stored_values(path: str) -> Values:
    """What the decoder reads from the file: a value, or None for a destroyed version.

    A row of 0.x is read as 0.x did it. Two rows of one version are told apart by id.
    """
    values: Values = {}
    for row in decoder.rows(path):
        key = (row["name"], row["version"])
        while key in values:
            key = (key[0], key[1] + 1)
        if row["encrypted"] is None and row.get("wrapped_key") is None:
            values[key] = None
        elif row.get("envelope_version") is None:
            values[key] = Fernet(OLD_KEY).decrypt(row["encrypted"]).decode()
        else:
            keys = [decoder.master_key(text) for text in RING]
            opened = decoder.open_row(keys, row["name"], row["version"], row)
            values[key] = opened.value.decode()
    return values


def integrity(path: str) -> str:
    with closing(sqlite3.connect(path)) as conn:
        return str(conn.execute("pragma integrity_check").fetchone()[0])


def log_rows(path: str) -> int:
    """How many changes the log tells of. In a database of 0.x there is none."""
    with closing(sqlite3.connect(path)) as conn:
        sql = "select 1 from sqlite_master where name = 'datasette_secrets_log'"
        if conn.execute(sql).fetchone() is None:
            return 0
        sql = "select count(*) from datasette_secrets_log"
        return int(conn.execute(sql).fetchone()[0])


def newest(values: Values, name: str) -> str | None:
    return values[max(key for key in values if key[0] == name)]


def look(operation: Operation, path: str, before: Values) -> list[str]:
    """What is wrong with a database on which the operation was stopped."""
    wrong: list[str] = []
    final = operation.after(before)

    def check(condition: bool, complaint: str) -> None:
        if not condition:
            wrong.append(complaint)

    async def read_as_a_server() -> dict[str, str | None]:
        datasette = datasette_on(path, *RING)
        try:
            names = ["SECRET_1", "SECRET_2", "SECRET_3"]
            return {name: await get_secret(datasette, name) for name in names}
        finally:
            datasette.close()

    async def run_again() -> None:
        datasette = datasette_on(path, *RING)
        try:
            await operation.run(datasette)
        finally:
            datasette.close()

    # First of all the package reads: it may meet the journal of the killed writer.
    if not operation.from_0x:
        read = asyncio.run(read_as_a_server())
        for name, value in read.items():
            check(
                value in (newest(before, name), newest(final, name)),
                f"{name} reads as neither its value before nor after",
            )
    check(integrity(path) == "ok", "integrity_check")
    between = stored_values(path)
    if operation.is_whole:
        check(between in (before, final), "half done")
        pristine = str(Path(path).parents[1] / "pristine" / "i.db")
        logged = log_rows(path) - log_rows(pristine)
        expected = 0 if between == before else operation.logged
        check(logged == expected, "a change without its row in the log, or the reverse")
    else:
        kept = set(before.values()) & set(final.values())
        check(kept <= set(between.values()), "a value was lost")

    # The same command again finishes; `set` and `roll-back` make one version each time.
    makes_versions = operation.run in (set_, roll_back)
    if not makes_versions or len(between) == len(before):
        asyncio.run(run_again())
    check(integrity(path) == "ok", "integrity_check after the second run")
    values = stored_values(path)
    check(values == final, "not finished")
    for name in {name for name, _ in values}:
        versions = sorted(version for each, version in values if each == name)
        check(versions == list(range(1, len(versions) + 1)), f"{name} lacks a version")
    return sorted({*wrong, *finished(operation, path)})


def finished(operation: Operation, path: str) -> list[str]:
    """What a command promises for its end, and did not do."""
    rows = decoder.rows(path)
    files = b"".join(file.read_bytes() for file in Path(path).parent.iterdir())
    wrong = []
    if operation.run in REWRITING:
        primary = decoder.key_id(decoder.master_key(NEW_KEY))
        for row in rows:
            if row["wrapped_key"] and row["encryption_key_name"] != primary:
                wrong.append("a row is under another key")
    gone = pickle.loads(Path(path).parents[1].joinpath("blobs").read_bytes())  # noqa: S301  # our own
    if operation.run in (destroy, *REWRITING):
        kept = {cell for row in rows for cell in row.values()}
        for blob in gone:
            if blob not in kept and blob[:40] in files:
                wrong.append("a blob that is gone is left in the files")
    return wrong


# Running it.


def in_child(work: Callable[[], Any]) -> tuple[int, Any]:
    """Run `work` in a forked process: its exit status and what it returned."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            answer = work()
        except BaseException as error:
            frames = traceback.extract_tb(error.__traceback__)
            where = ", ".join(f"{each.name}:{each.lineno}" for each in frames[-4:])
            answer = [f"{type(error).__name__}: {error} in {where}"]
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(pickle.dumps(answer))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        written = pipe.read()
    _, status = os.waitpid(pid, 0)
    return status, pickle.loads(written) if written else None  # noqa: S301  # our own


def shim() -> ctypes.CDLL:
    library = ctypes.CDLL(os.environ["LD_PRELOAD"])
    library.fault_arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int]
    library.fault_seen.restype = ctypes.c_long
    library.fault_clock.argtypes = [ctypes.c_long]
    return library


def prepare(operation: Operation, path: str, journal: str) -> Values:
    async def build() -> None:
        if operation.from_0x:
            fill_as_0x_did(path)
        else:
            datasette = datasette_on(path, OLD_KEY)
            await fill(datasette)
            datasette.close()

    with closing(sqlite3.connect(path)) as conn:
        conn.execute(f"pragma journal_mode = {journal}").fetchall()
    asyncio.run(build())
    rows = decoder.rows(path)
    blobs = [cell for row in rows for cell in row.values() if isinstance(cell, bytes)]
    Path(path).parents[1].joinpath("blobs").write_bytes(pickle.dumps(blobs))
    return stored_values(path)


def run_armed(operation: Operation, path: str, point: int, mode: int) -> Any:
    """Run the operation and stop it at a change: how many there were, and its error."""
    library = shim()

    async def run() -> str:
        datasette = datasette_on(path, *RING)
        library.fault_arm(path.encode(), point, mode)
        try:
            await operation.run(datasette)
        except SecretsError as error:
            return error.code
        except Exception as error:
            # Datasette's own startup writes to the same file, and says it in its way.
            return f"{type(error).__module__}.{type(error).__name__}"
        finally:
            seen.append(library.fault_seen())
            datasette.close()
        return ""

    seen: list[int] = []
    # Datasette prints what fails in a thread.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    error = asyncio.run(run())
    return {"changes": seen[0], "error": error}


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Fail at every `step`-th change, look at what is left, and report."""
    operation = OPERATIONS[job["operation"]]
    mode = MODES[job["mode"]]
    report: dict[str, Any] = {"changes": 0, "stopped": 0, "wrong": {}, "errors": {}}
    with tempfile.TemporaryDirectory() as folder:
        pristine = Path(folder, "pristine")
        pristine.mkdir()
        status, before = in_child(
            lambda: prepare(operation, str(pristine / "i.db"), job["journal"])
        )
        assert status == 0, status
        assert isinstance(before, dict), before

        def copied(name: str) -> str:
            shutil.copytree(pristine, Path(folder, name))
            return str(Path(folder, name, "i.db"))

        _, counted = in_child(lambda: run_armed(operation, copied("counted"), 0, 0))
        assert isinstance(counted, dict), counted
        assert not counted["error"], counted
        report["changes"] = counted["changes"]
        # A first change that depends on the job spreads the changes that are tried.
        first = 1 + job.get("first", 0) % job["step"]
        for point in range(first, counted["changes"] + 1, job["step"]):
            path = copied("work")
            status, answer = in_child(partial(run_armed, operation, path, point, mode))
            if os.WIFSIGNALED(status):
                report["stopped"] += os.WTERMSIG(status) == signal.SIGKILL
            elif isinstance(answer, dict) and answer["error"]:
                report["stopped"] += 1
                kinds = report["errors"]
                kinds[answer["error"]] = kinds.get(answer["error"], 0) + 1
            elif not isinstance(answer, dict):
                report["wrong"][point] = answer
            _, wrong = in_child(partial(look, operation, path, before))
            if wrong:
                report["wrong"][point] = wrong
            shutil.rmtree(Path(path).parent)
    return report


def main() -> None:
    forks.warm_up()
    asked = json.load(sys.stdin)
    if isinstance(asked, list):
        json.dump([run_job(job) for job in asked], sys.stdout)
        return
    operation, mode = OPERATIONS[asked["operation"]], MODES[asked["mode"]]
    json.dump(run_armed(operation, asked["path"], asked["at"], mode), sys.stdout)


if __name__ == "__main__":
    main()
