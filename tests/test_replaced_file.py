"""A running server notices another file in the place of its own, and always stops."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest
from conftest import MakeDatasette
from datasette.app import Datasette

from datasette_secrets import DatabaseUnavailable, get_secret, set_secret
from datasette_secrets.instance import get_instance, stop

DEADLINE = 20


async def test_a_replaced_file_is_noticed_by_reads_and_changes(
    datasette: Datasette, internal: str, tmp_path: Path
) -> None:
    await set_secret(datasette, "A", "a value")
    copy = tmp_path / "copy.db"
    shutil.copy(internal, copy)
    copy.rename(internal)
    ends = time.monotonic() + DEADLINE
    with pytest.raises(DatabaseUnavailable, match="was replaced or deleted; restart"):
        while time.monotonic() < ends:
            assert await get_secret(datasette, "A") == "a value"
    with pytest.raises(DatabaseUnavailable, match="was replaced or deleted; restart"):
        await set_secret(datasette, "A", "another")


async def test_a_write_notices_at_once_that_its_file_was_deleted(
    datasette: Datasette, internal: str
) -> None:
    await set_secret(datasette, "A", "a value")
    Path(internal).unlink()
    with pytest.raises(DatabaseUnavailable, match="was replaced or deleted; restart"):
        await set_secret(datasette, "A", "another")
    assert not Path(internal).exists()
    ends = time.monotonic() + DEADLINE
    with pytest.raises(DatabaseUnavailable, match="was replaced or deleted; restart"):
        while time.monotonic() < ends:
            assert await get_secret(datasette, "A") == "a value"


async def test_a_file_that_was_only_rewritten_is_not_called_replaced(
    datasette: Datasette, internal: str
) -> None:
    await set_secret(datasette, "A", "a value")
    with closing(sqlite3.connect(internal)) as conn:
        conn.execute("vacuum")
    ends = time.monotonic() + 1.5
    while time.monotonic() < ends:
        assert await get_secret(datasette, "A") == "a value"


def test_a_loop_that_ended_within_a_read_does_not_hide_a_deleted_file(
    make_datasette: MakeDatasette, master_key: str, internal: str
) -> None:
    datasette = make_datasette(master_key)
    asyncio.run(set_secret(datasette, "A", "a value"))
    assert asyncio.run(get_secret(datasette, "A")) == "a value"
    get_instance(datasette).reader._turn_ends = 0.0  # as after two milliseconds

    async def begin_a_read_and_end() -> None:
        read = get_secret(datasette, "A")

        def begin() -> None:
            read.send(None)  # until it gives way to others
            read.close()

        asyncio.get_running_loop().call_soon(begin)

    # asyncio.run would go on to clean up, and so let others have their turn.
    with closing(asyncio.new_event_loop()) as loop:
        loop.run_until_complete(begin_a_read_and_end())
    Path(internal).unlink()
    with pytest.raises(DatabaseUnavailable, match="was replaced or deleted; restart"):
        asyncio.run(get_secret(datasette, "A"))


async def test_a_trigger_that_never_ends_does_not_keep_the_server_from_stopping(
    datasette: Datasette, internal: str
) -> None:
    await set_secret(datasette, "A", "a value")
    with closing(sqlite3.connect(internal)) as conn, conn:
        conn.execute(
            "create trigger t after update on datasette_secrets begin "
            "select count(*) from (with recursive forever(n) as "
            "(select 1 union all select n + 1 from forever) select n from forever); end"
        )
    assert await get_secret(datasette, "A", "ann") == "a value"
    await asyncio.wait_for(stop(datasette), DEADLINE)
