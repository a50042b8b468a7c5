"""`keep`: a credential that a plugin stores often leaves a short history."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from datasette.app import Datasette
from support import decoder
from test_log import NAME, VALUE, log

from datasette_secrets import InvalidSecret, get_secret, set_secret, store
from datasette_secrets.instance import get_instance

#: What one change may add to the log: its row, and the entry in the index.
LOG_BYTES_MAX = 200


@pytest.mark.parametrize("keep", [1, 0, -1, True, 2.0, "2"])
async def test_fewer_than_two_versions_cannot_be_kept(
    datasette: Datasette, keep: Any
) -> None:
    with pytest.raises(InvalidSecret, match="2 or more"):
        await set_secret(datasette, NAME, VALUE, keep=keep)
    assert await get_secret(datasette, NAME) is None


async def test_older_versions_go_with_the_value_that_replaces_them(
    datasette: Datasette, internal: str
) -> None:
    for number in range(1, 5):
        await set_secret(datasette, NAME, f"value {number}")
    await set_secret(datasette, "OTHER", VALUE)
    gone = [row["encrypted"] for row in decoder.rows(internal)][:3]
    assert await set_secret(datasette, NAME, "value 5", keep=2) == 5

    db = get_instance(datasette).db
    assert [each.version for each in await store.history(db, NAME)] == [5, 4]
    assert await get_secret(datasette, "OTHER") == VALUE
    assert log(internal)[-1]["detail"] == {"pruned": [3, 2, 1]}
    file = Path(internal).read_bytes()
    assert not any(encrypted[:40] in file for encrypted in gone)
    # The number of a version is never used again.
    assert await set_secret(datasette, NAME, "value 6", keep=2) == 6


class Size(NamedTuple):
    """Rows of the secret, pages of the table of secrets, and bytes of the whole file."""

    rows: int
    pages: int
    file: int


async def store_tokens(datasette: Datasette, path: str, count: int) -> Size:
    """Store so many tokens as a plugin does that gets one every hour."""
    for number in range(count):
        await set_secret(datasette, NAME, f"token {number} " + "x" * 300, keep=10)
    with closing(sqlite3.connect(path)) as conn:
        [(rows,)] = conn.execute("select count(*) from datasette_secrets").fetchall()
        # The table and its index.
        [(pages,)] = conn.execute(
            "select count(*) from dbstat where name in "
            "('datasette_secrets', 'datasette_secrets_name_version')"
        ).fetchall()
    return Size(rows, pages, Path(path).stat().st_size)


def has_dbstat() -> bool:
    with closing(sqlite3.connect(":memory:")) as conn:
        options = {name for (name,) in conn.execute("pragma compile_options")}
    return "ENABLE_DBSTAT_VTAB" in options


@pytest.mark.skipif(not has_dbstat(), reason="needs SQLite with dbstat")
async def test_a_token_that_is_stored_every_hour_leaves_ten_rows_and_no_more_pages(
    datasette: Datasette, internal: str
) -> None:
    before = await store_tokens(datasette, internal, 30)
    after = await store_tokens(datasette, internal, 200)
    assert (before.rows, after.rows) == (10, 10)
    assert after.pages == before.pages
    # The rest of the file grows by the log alone, which has one row for each change.
    assert after.file - before.file < 200 * LOG_BYTES_MAX
