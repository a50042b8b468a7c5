"""Makes every change in one transaction with its row of the log, and reads the log.

A change and its row of the log are stored together, or neither is. The log does not reveal
tampering, because whoever can write to the database can edit it. Every async function
raises DatabaseUnavailable.
"""

from __future__ import annotations

import functools
import json
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from . import config, database, fernet, inspection, schema
from .errors import NeedsUpgrade
from .events import Change, via

if TYPE_CHECKING:
    from datasette.app import Datasette
    from datasette.database import Database


T = TypeVar("T")


def now() -> str:
    """This second in UTC, `YYYY-MM-DD HH:MM:SS`."""
    return _utc(int(time.time()))


@functools.lru_cache(maxsize=2)  # every read of a secret calls it
def _utc(second: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(second))


@dataclass
class Changing:
    """One transaction: who makes it and when, and the rows that it writes.

    `made`: the changes, for the log and for other plugins. Every row that is written here
    is read back before the transaction ends, because somebody's trigger can undo a write.
    """

    conn: sqlite3.Connection
    actor_id: str | None
    via: str
    at: str = field(default_factory=now)
    made: list[Change] = field(default_factory=list)
    _written: dict[tuple[str, int], Mapping[str, object] | None] = field(
        default_factory=dict, repr=False
    )

    def insert(self, table: str, columns: Mapping[str, object]) -> int:
        """Insert a row and return its id."""
        names, values = ", ".join(columns), ", ".join(f":{name}" for name in columns)
        sql = f"insert into {table} ({names}) values ({values})"  # noqa: S608
        row_id = int(self.conn.execute(sql, columns).lastrowid or 0)
        self._written[table, row_id] = columns
        return row_id

    def update(self, table: str, row_id: int, columns: Mapping[str, object]) -> None:
        """Write these columns of a row."""
        names = ", ".join(f"{name} = :{name}" for name in columns)
        sql = f"update {table} set {names} where id = :id"  # noqa: S608
        self.conn.execute(sql, {**columns, "id": row_id})
        before = self._written.get((table, row_id)) or {}
        self._written[table, row_id] = {**before, **columns}

    def delete(self, table: str, row_ids: Iterable[int]) -> None:
        """Delete these rows."""
        sql = f"delete from {table} where id = :id"  # noqa: S608
        for row_id in row_ids:
            self.conn.execute(sql, {"id": row_id})
            self._written[table, row_id] = None

    def log(self, change: Change, row_id: int | None = None) -> int:
        """Write the log row of a change, or update the detail of the row `row_id`.

        Returns the id of the row.
        """
        detail = json.dumps(change.detail, default=str) if change.detail else None
        if row_id is not None:
            self.update(schema.LOG, row_id, {"detail": detail})
            return row_id
        version = change.version if type(change.version) is int else None
        columns = {"at": self.at, "actor_id": self.actor_id, "via": self.via}
        columns |= {"action": change.action, "name": change.name}
        return self.insert(
            schema.LOG, {**columns, "version": version, "detail": detail}
        )

    def has_destroyed(self, row_id: int) -> bool:
        """Whether the log says that the value of this row was destroyed."""
        sql = f"""select 1 from {schema.LOG} where action = 'destroy-secret' and :id is
            case when json_valid(detail) then json_extract(detail, '$.id') end limit 1"""  # noqa: S608
        return bool(self.conn.execute(sql, {"id": row_id}).fetchall())

    def read_back(self) -> None:
        """Raise DatabaseUnavailable if a row is not as it was written."""
        for (table, row_id), columns in self._written.items():
            expected = {} if columns is None else columns
            where = "".join(f" and {name} is :{name}" for name in expected)
            sql = f"select 1 from {table} where id = :id{where}"  # noqa: S608
            is_stored = self.conn.execute(sql, {**expected, "id": row_id}).fetchall()
            if bool(is_stored) != (columns is not None):
                raise database.not_kept()


async def make(
    datasette: Datasette,
    db: Database,
    actor_id: str | None,
    change: Callable[[Changing], T],
    *,
    migrates: bool = False,
) -> T:
    """Run `change` in one transaction, send its events, and return what it returns.

    Raises as `commit` and `announce` do.
    """
    result, made = await commit(datasette, db, actor_id, change, migrates=migrates)
    await announce(datasette, actor_id, *made)
    return result


async def commit(
    datasette: Datasette,
    db: Database,
    actor_id: str | None,
    change: Callable[[Changing], T],
    *,
    migrates: bool = False,
    mends: bool = False,
) -> tuple[T, list[Change]]:
    """Run `change` in one transaction. Returns what it returns, and what to announce.

    Its rows and those of the log are read back before the commit. `migrates`: `change`
    migrates the table itself. `mends`: it removes what the check of the tables found.
    Raises what `change` raises, NeedsUpgrade for a table of 0.x, and DatabaseUnavailable;
    nothing is then changed.
    """
    try:
        if not migrates:
            await inspection.prepare(db, mends=mends)
    except NeedsUpgrade as error:
        is_configured = config.load(datasette).ring is not None
        way_out = fernet.way_out(is_configured=is_configured)
        raise NeedsUpgrade(error.name, error.version, way_out) from None
    who = str(actor_id) if actor_id else None
    door = via.get()  # the transaction runs in another thread

    def in_transaction(conn: sqlite3.Connection) -> tuple[T, list[Change]]:
        if migrates or mends:
            inspection.require_own_schema(conn)
        else:
            inspection.require_whole_schema(conn)
        changing = Changing(conn, who, door)
        result = change(changing)
        for each in changing.made:
            changing.log(each)
        changing.read_back()
        return result, changing.made

    # Datasette's telemetry records the name of a write.
    in_transaction.__qualname__ = change.__qualname__
    return await database.write(db, in_transaction)


async def announce(datasette: Datasette, actor_id: str | None, *made: Change) -> None:
    """Send the events of changes that are stored.

    The first exception of another plugin's `track_event` is passed on at the end.
    """
    failed = []
    token = via.set("plugin")  # what other plugins change now
    for each in made if hasattr(datasette, "event_classes") else ():  # not in the shell
        event = each.event(str(actor_id) if actor_id else None)
        try:
            if event is not None:
                await datasette.track_event(event)
        except Exception as error:  # a plugin's code may raise anything
            failed.append(error)
    via.reset(token)
    if failed:
        raise failed[0]


async def record(
    datasette: Datasette, db: Database, actor_id: str | None, change: Change
) -> None:
    """Log that a secret was read in the shell, or checked."""

    def record_change(changing: Changing) -> None:
        changing.made.append(change)

    await make(datasette, db, actor_id, record_change)


class Entry(NamedTuple):
    """A row of the log. `detail`: empty if the row has none, or if it is not JSON."""

    id: int
    at: str
    actor_id: str | None
    via: str
    action: str
    name: str | None
    version: int | None
    detail: dict[str, Any]

    @property
    def outcome(self) -> str:
        """The outcome of a check."""
        return str(self.detail.get("outcome"))


async def entries(
    db: Database,
    *,
    name: str | None = None,
    before: int | None = None,
    limit: int = -1,
) -> list[Entry]:
    """The log, newest first.

    `name`: only the rows of this secret. `before`: only rows older than the one with
    this id.
    """
    of_name = "" if name is None else "name = :name and"
    older = "" if before is None else "id < :before and"
    where = f"{of_name} {older} true order by id desc limit :limit"
    return await _select(db, where, {"name": name, "before": before, "limit": limit})


async def newest_checks(db: Database, names: list[str]) -> dict[str, Entry]:
    """The newest check of each of these secrets since its value was set.

    Leaves out checks of values that were rejected before they were stored.
    """
    where = f"""action = 'check-secret' and id in (
        select (
            select id from {schema.LOG} where name = value and version is not null
            and action in ('set-secret', 'check-secret') order by id desc limit 1
        ) from json_each(:names)
    )"""  # noqa: S608
    found = await _select(db, where, {"names": json.dumps(names)})
    return {str(entry.name): entry for entry in found}


class Past(NamedTuple):
    """What the log holds about the versions of a secret, by their numbers.

    `rolled_back_from`: the version that was copied. `destroyed`: the log row of that change.
    """

    rolled_back_from: dict[int, int]
    destroyed: dict[object, Entry]

    def copies(self, version: object) -> list[int]:
        """The other versions that are known to have the same value."""
        origins = self.rolled_back_from

        def origin(number: Any) -> object:
            # Always to a lower number, so that an edited log cannot cause a loop.
            while origins.get(number, number) < number:
                number = origins[number]
            return number

        known = {*origins, *origins.values()} - {version}
        return sorted(each for each in known if origin(each) == origin(version))


async def past(db: Database, name: str) -> Past:
    """What the log holds about the versions of a secret."""
    where = """name = :name and (action = 'destroy-secret' or
        (action = 'set-secret' and instr(detail, 'rolled_back_from'))) order by id"""
    known = Past({}, {})
    for entry in await _select(db, where, {"name": name}):
        origin = entry.detail.get("rolled_back_from")
        if type(origin) is int and type(entry.version) is int:
            known.rolled_back_from[entry.version] = origin
        versions = entry.detail.get("versions")
        for version in versions if isinstance(versions, list) else ():
            if isinstance(version, (int, str)):
                known.destroyed[version] = entry
    return known


async def _select(
    db: Database, where: str, parameters: Mapping[str, object]
) -> list[Entry]:
    sql = f"select {', '.join(Entry._fields)} from {schema.LOG} where {where}"  # noqa: S608
    rows = await schema.fetch(db, sql, parameters)
    return [Entry._make([*row[:-1], _detail(row[-1])]) for row in rows]


def _detail(text: object) -> dict[str, Any]:
    try:
        detail = json.loads(str(text))
    except (ValueError, RecursionError):
        return {}
    return detail if isinstance(detail, dict) else {}
