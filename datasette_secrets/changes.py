"""Makes every change in one way: one transaction, its rows read back, its log, its events.

A change either happens with its row in the log, or neither does. `datasette_secrets_log` is
a record, not tamper evidence: whoever can write to the database can edit it.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from . import database, schema
from .events import Author, Change

if TYPE_CHECKING:
    from datasette.app import Datasette
    from datasette.database import Database
    from datasette.events import Event


T = TypeVar("T")


def now() -> str:
    """This second in UTC, `YYYY-MM-DD HH:MM:SS`."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())


class Changing:
    """One transaction: who makes it and when, and the rows that it writes.

    A statement can succeed and its effect be undone, by a trigger or a constraint that
    somebody else made. So what is written here is read back before the transaction ends.
    """

    def __init__(self, conn: sqlite3.Connection, author: Author, at: str) -> None:
        self.conn = conn
        self.author = author
        self.at = at
        self._written: dict[tuple[str, int], Mapping[str, object] | None] = {}

    @property
    def actor_id(self) -> str | None:
        return self.author.actor_id

    def insert(self, table: str, columns: dict[str, object]) -> int:
        """Insert a row and return its id."""
        names, values = ", ".join(columns), ", ".join(f":{name}" for name in columns)
        cursor = self.conn.execute(
            f"insert into {table} ({names}) values ({values})",  # noqa: S608
            columns,
        )
        row_id = int(cursor.lastrowid or 0)
        self._written[table, row_id] = columns
        return row_id

    def update(self, table: str, row_id: int, columns: Mapping[str, object]) -> None:
        """Write these columns of a row."""
        names = ", ".join(f"{name} = :{name}" for name in columns)
        self.conn.execute(
            f"update {table} set {names} where id = :id",  # noqa: S608
            {**columns, "id": row_id},
        )
        self._written[table, row_id] = {
            **(self._written.get((table, row_id)) or {}),
            **columns,
        }

    def delete(self, table: str, row_ids: Iterable[int]) -> None:
        """Delete these rows."""
        for row_id in row_ids:
            self.conn.execute(
                f"delete from {table} where id = :id",  # noqa: S608
                {"id": row_id},
            )
            self._written[table, row_id] = None

    def log(self, change: Change, row_id: int | None = None) -> int:
        """Write the row of a change, or its detail into the row that it has already.

        Returns the id of that row.
        """
        detail = json.dumps(change.detail, default=str) if change.detail else None
        if row_id is not None:
            self.update(schema.LOG, row_id, {"detail": detail})
            return row_id
        return self.insert(
            schema.LOG,
            {
                "at": self.at,
                "actor_id": self.author.actor_id,
                "via": self.author.via,
                "action": change.action,
                "name": change.name,
                "version": change.version if type(change.version) is int else None,
                "detail": detail,
            },
        )

    def read_back(self) -> None:
        """Raises DatabaseUnavailable where a row is not as it was written."""
        for (table, row_id), columns in self._written.items():
            names = ", ".join(columns or ("id",))
            stored = self.conn.execute(
                f"select {names} from {table} where id = :id",  # noqa: S608
                {"id": row_id},
            ).fetchall()
            expected = [] if columns is None else [tuple(columns.values())]
            if list(map(_typed, stored)) != list(map(_typed, expected)):
                raise database.not_kept()


def _typed(row: Iterable[object]) -> list[tuple[type, object]]:
    return [(type(column), column) for column in row]


async def make(
    datasette: Datasette,
    db: Database,
    author: Author,
    change: Callable[[Changing], tuple[T, list[Change]]],
) -> T:
    """Run `change`, which returns a result and what it did, in one transaction.

    Its rows and those of the log are read back before the commit; events go out after it.
    Raises what `change` raises, and DatabaseUnavailable; nothing is then changed.
    """
    await schema.ensure_migrated(db)

    def in_transaction(conn: Any, track_event: Callable[[Any], None]) -> T:
        changing = Changing(conn, author, now())
        result, made = change(changing)
        for each in made:
            changing.log(each)
        changing.read_back()
        for event in (_event(datasette, author, each) for each in made):
            if event is not None:
                track_event(event)
        return result

    # Datasette's telemetry records what a write is called.
    in_transaction.__qualname__ = change.__qualname__
    return await database.write(db, in_transaction)


def _event(datasette: Datasette, author: Author, change: Change) -> Event | None:
    """The event of a change, if there is one. The shell starts no plugins, so has none."""
    return change.event(author) if hasattr(datasette, "event_classes") else None


async def announce(datasette: Datasette, author: Author, change: Change) -> None:
    """Send the event of what took several transactions."""
    event = _event(datasette, author, change)
    if event is not None:
        await datasette.track_event(event)


async def record(db: Database, author: Author, change: Change) -> None:
    """Log what changes no secret: that one was read in the shell, or checked.

    Raises DatabaseUnavailable.
    """
    await schema.ensure_migrated(db)

    def record_change(conn: Any) -> None:
        changing = Changing(conn, author, now())
        changing.log(change)
        changing.read_back()

    await database.write(db, record_change)
