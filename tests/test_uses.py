"""Who used a secret when: recorded truly, and with few writes."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeDatasette
from datasette.app import Datasette

from datasette_secrets import get_secret, last_used, set_secret, store
from datasette_secrets.instance import get_instance, stop

NAME = "OPENAI_API_KEY"


def used(path: str, name: str = NAME) -> tuple[str | None, str | None]:
    conn = sqlite3.connect(path)
    [(used_at, used_by)] = conn.execute(
        "select last_used_at, last_used_by from datasette_secrets "
        "where name = ? order by version desc limit 1",
        (name,),
    ).fetchall()
    conn.close()
    return used_at, used_by


def write_transactions(path: str) -> int:
    """SQLite's file change counter: outside of WAL mode, every transaction adds one."""
    return int.from_bytes(Path(path).read_bytes()[24:28], "big")


def set_journal_mode_wal(path: str) -> None:
    conn = sqlite3.connect(path)
    conn.execute("pragma journal_mode = wal").fetchall()
    conn.close()


def second() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S")


@pytest.fixture
def locked(internal: str) -> Iterator[sqlite3.Connection]:
    """A second connection to the internal database, to hold its lock with."""
    conn = sqlite3.connect(internal, isolation_level=None)
    yield conn
    conn.close()


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may need longer for the record than a read waits for it."""
    monkeypatch.setattr(last_used, "WAIT_SECONDS", 60)


@pytest.mark.usefixtures("unhurried")
async def test_after_a_read_the_row_says_when_and_by_whom(
    datasette: Datasette, internal: str
) -> None:
    await set_secret(datasette, NAME, "a value")
    before: set[str | None] = set()
    for actor in ("ann", None, "ben", "ann"):
        begun = second()
        await get_secret(datasette, NAME, actor)
        at, by = used(internal)
        assert begun <= (at or "") <= second()
        assert by in {actor, *before}
        before.add(actor)


@pytest.mark.usefixtures("unhurried")
async def test_the_last_of_several_actors_in_a_row_is_named(
    datasette: Datasette, internal: str
) -> None:
    await set_secret(datasette, NAME, "a value")
    for actor in ("ann", "ben", None, "cyd"):
        await get_secret(datasette, NAME, actor)
        assert used(internal)[1] == actor


async def test_the_same_actor_in_the_same_second_is_written_once(
    datasette: Datasette, internal: str
) -> None:
    await set_secret(datasette, NAME, "a value")
    before = write_transactions(internal)
    begun = time.time()
    for _ in range(500):
        await get_secret(datasette, NAME, "ann")
    seconds = int(time.time()) - int(begun) + 1
    assert write_transactions(internal) - before <= seconds


@pytest.mark.usefixtures("unhurried")
async def test_uses_that_wait_together_are_written_together(
    datasette: Datasette, internal: str
) -> None:
    names = [f"NAME_{number}" for number in range(20)]
    for name in names:
        await set_secret(datasette, name, "a value")
    before = write_transactions(internal)
    begun = second()
    await asyncio.gather(
        *(
            get_secret(datasette, name, f"actor{number}")
            for name in names
            for number in range(10)
        )
    )
    assert write_transactions(internal) - before < 20
    for name in names:
        at, by = used(internal, name)
        assert begun <= (at or "") <= second()
        assert (by or "").startswith("actor")


@pytest.mark.usefixtures("unhurried")
async def test_a_use_is_written_again_when_the_row_no_longer_says_so(
    datasette: Datasette, internal: str, locked: sqlite3.Connection
) -> None:
    await set_secret(datasette, NAME, "a value")
    await get_secret(datasette, NAME, "ann")
    locked.execute("update datasette_secrets set last_used_at = null")
    await get_secret(datasette, NAME, "ann")
    assert used(internal)[0] is not None


async def test_a_read_does_not_wait_for_a_lock_and_the_use_is_written_later(
    datasette: Datasette, internal: str, locked: sqlite3.Connection
) -> None:
    await set_secret(datasette, NAME, "a value")
    locked.execute("begin immediate")
    assert await get_secret(datasette, NAME, "ann") == "a value"
    assert used(internal) == (None, None)
    locked.execute("commit")
    async with _deadline():
        while used(internal)[1] != "ann":
            await asyncio.sleep(0.01)


async def test_a_read_that_waits_for_its_use_lets_go_while_the_lock_is_still_held(
    datasette: Datasette, locked: sqlite3.Connection
) -> None:
    await set_secret(datasette, NAME, "a value")
    locked.execute("begin immediate")
    waited: list[float | None] = []
    wait = asyncio.wait

    async def watch(*arguments: Any, timeout: float | None = None) -> object:
        waited.append(timeout)
        return await wait(*arguments, timeout=timeout)

    asyncio.wait = watch  # type: ignore[assignment]
    try:
        await get_secret(datasette, NAME, "ann")
    finally:
        asyncio.wait = wait
        locked.execute("commit")
    assert [timeout for timeout in waited if timeout is None or timeout > 0.05] == []
    assert waited


async def test_many_actors_one_after_another_are_spaced_out(
    datasette: Datasette, internal: str
) -> None:
    await set_secret(datasette, NAME, "a value")
    before = write_transactions(internal)
    begun = time.monotonic()
    for number in range(60):
        await get_secret(datasette, NAME, f"actor{number}")
    seconds = time.monotonic() - begun
    # A burst of ten each second at most, and otherwise one every 40 ms.
    assert write_transactions(internal) - before <= 10 * (seconds + 1) + seconds / 0.04
    await stop(datasette)  # the last may still wait, on a slow machine
    assert used(internal)[1] == "actor59"


async def test_reads_go_on_while_another_process_writes_in_wal_mode(
    make_datasette: MakeDatasette, master_key: str, internal: str
) -> None:
    set_journal_mode_wal(internal)
    conn = sqlite3.connect(internal, isolation_level=None)
    datasette = make_datasette(master_key)
    await datasette.invoke_startup()
    await set_secret(datasette, NAME, "a value")
    conn.execute("begin immediate")
    for number in range(50):
        assert await get_secret(datasette, NAME, f"actor{number}") == "a value"
    conn.execute("commit")
    conn.close()


async def test_a_read_waits_off_the_loop_for_an_exclusive_lock(
    datasette: Datasette, locked: sqlite3.Connection
) -> None:
    await set_secret(datasette, NAME, "a value")
    locked.execute("begin exclusive")
    read = asyncio.ensure_future(get_secret(datasette, NAME, "ann"))
    turns = 0
    while turns < 100:
        await asyncio.sleep(0)
        turns += 1
    assert not read.done()
    locked.execute("commit")
    assert await read == "a value"


async def test_a_later_use_by_another_process_stays(
    datasette: Datasette, internal: str, locked: sqlite3.Connection
) -> None:
    await set_secret(datasette, NAME, "a value")
    recorder = get_instance(datasette).last_used
    row = await store.newest_version(get_instance(datasette).reader, NAME)
    assert row is not None
    locked.execute(
        "update datasette_secrets set last_used_at = datetime('now'), last_used_by = 'ben'"
    )
    await recorder.write({(row.id, "ann"): "2020-01-01 00:00:00"})
    assert used(internal)[1] == "ben"


@pytest.mark.usefixtures("unhurried")
async def test_a_use_in_the_future_is_a_wrong_clock_and_is_overwritten(
    datasette: Datasette, internal: str, locked: sqlite3.Connection
) -> None:
    await set_secret(datasette, NAME, "a value")
    locked.execute(
        "update datasette_secrets set last_used_at = '2999-01-01 00:00:00', last_used_by = 'ben'"
    )
    await get_secret(datasette, NAME, "ann")
    assert used(internal)[1] == "ann"


async def test_what_waits_is_written_when_the_server_stops(
    make_datasette: MakeDatasette,
    master_key: str,
    internal: str,
    locked: sqlite3.Connection,
) -> None:
    datasette = make_datasette(master_key)
    await datasette.invoke_startup()
    await set_secret(datasette, NAME, "a value")
    locked.execute("begin immediate")
    await get_secret(datasette, NAME, "ann")
    locked.execute("commit")
    await stop(datasette)
    assert used(internal)[1] == "ann"


async def test_a_server_that_stops_waits_for_what_is_being_written(
    datasette: Datasette, internal: str
) -> None:
    await set_secret(datasette, NAME, "a value")
    in_the_way = threading.Event()

    def occupy_the_write_thread(conn: sqlite3.Connection) -> None:
        in_the_way.wait(60)

    db = datasette.get_internal_database()
    await db.execute_write_fn(occupy_the_write_thread, block=False, transaction=False)
    await get_secret(datasette, NAME, "ann")
    stopping = asyncio.create_task(stop(datasette))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not stopping.done()
    in_the_way.set()
    await stopping
    assert used(internal)[1] == "ann"


async def test_the_open_connection_only_reads(datasette: Datasette) -> None:
    await set_secret(datasette, NAME, "a value")
    await get_secret(datasette, NAME)
    conn = get_instance(datasette).reader._conn
    assert conn is not None
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        conn.execute("delete from datasette_secrets")


async def test_other_tasks_run_while_one_reads_in_a_tight_loop(
    datasette: Datasette,
) -> None:
    await set_secret(datasette, NAME, "a value")
    done = False

    async def other() -> None:
        nonlocal done
        done = True

    task = asyncio.ensure_future(other())
    for _ in range(100_000):
        await get_secret(datasette, NAME, "ann")
        if done:
            break
    assert done
    await task


async def test_reading_leaves_no_transaction_open(
    make_datasette: MakeDatasette, master_key: str, internal: str
) -> None:
    set_journal_mode_wal(internal)
    datasette = make_datasette(master_key)
    await datasette.invoke_startup()
    await set_secret(datasette, NAME, "a value")
    await get_secret(datasette, NAME, "ann")
    conn = sqlite3.connect(internal)
    [(busy, log, _)] = conn.execute("pragma wal_checkpoint(truncate)").fetchall()
    conn.close()
    assert (busy, log) == (0, 0)


class _deadline:
    """Fails the test, rather than hang it, when something never comes."""

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._timer = asyncio.get_running_loop().call_later(20, task.cancel)

    async def __aexit__(self, *_: object) -> None:
        self._timer.cancel()
