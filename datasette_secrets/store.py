"""The statements on the table of secrets. No function here handles a value or a key.

`changes.Changing` writes single rows, and `schema` and `inspection` look at the whole table.

Each row is a version. The newest version of a name is current, by `order by version desc,
id`: if datasette-secrets 0.x stored a number twice, it also served the lowest id.
Functions that take a connection, or a `Changing`, run inside a transaction. The others
raise DatabaseUnavailable.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from .changes import Changing
from .database import (
    Parameters,
    Reader,
    collector_paused,
    not_kept,
    run_when_unlocked,
    time_limit,
    transaction,
    tuple_cursor,
)
from .envelope import ENCRYPTED_MAX_BYTES, ENVELOPE_VERSION, Sealed
from .errors import DatabaseUnavailable, InvalidSecret, VersionConflict
from .schema import TABLE, VERSION_MAX, fetch, select

if TYPE_CHECKING:
    from datasette.database import Database


_USE_LOCK_SECONDS = 0.04

# A value that is too large is never loaded. Its size takes its place.
_ENCRYPTED = (
    f"case when length(encrypted) > {ENCRYPTED_MAX_BYTES} then length(encrypted) "
    "else encrypted end"
)
_NO_ENVELOPE = "wrapped_key is null and envelope_version is null"
_CELLS = ("envelope_version", "encryption_key_name", "wrapped_key", "encrypted")

_WRAP = "id, name, version, envelope_version, encryption_key_name, wrapped_key"
_ROW = f"{_WRAP}, {_ENCRYPTED}, deleted_at, last_used_at, note"
_VERSION = (
    "id, name, version, note, encryption_key_name, created_at, created_by, updated_at, "
    "updated_by, deleted_at, deleted_by, last_used_at, last_used_by, renew_by, "
    f"encrypted is null and wrapped_key is null, encrypted is not null and {_NO_ENVELOPE}"
)
_DESTROYED = {"encrypted": None, "wrapped_key": None}
_ORDER = "order by version desc, id limit 1"
_NAMES = "(select value from json_each(:names))"
_IDS = "id in (select value from json_each(:ids))"
_HOLDS_VALUE = "not (encrypted is null and wrapped_key is null)"
_SELECT_VERSION = f"select {_VERSION} from {TABLE} where name = :name {_ORDER}"  # noqa: S608
_SELECT_ROW = f"select {_ROW} from {TABLE} where name = :name {_ORDER}"  # noqa: S608
# Every column costs as much as a step of the cryptography. Most reads need only these.
_SELECT_CURRENT = f"""select id, version, encryption_key_name, wrapped_key, {_ENCRYPTED},
    last_used_at, deleted_at is null and envelope_version = {ENVELOPE_VERSION}
    from {TABLE} where name = ? {_ORDER}"""  # noqa: S608


class Row(NamedTuple):
    """A stored version with its envelope. In a damaged row, a field may have any type.

    If `encrypted` is larger than that of any value, the field is its size, an int.
    """

    id: int
    name: str
    version: int
    envelope_version: int | None
    key_id: str
    wrapped_key: bytes | None
    encrypted: bytes | None = None
    deleted_at: str | None = None
    last_used_at: str | None = None
    note: str | None = None

    @property
    def is_destroyed(self) -> bool:
        return self.encrypted is None and self.wrapped_key is None

    @property
    def is_legacy(self) -> bool:
        """Whether datasette-secrets 0.x wrote it."""
        return self.envelope_version is None and self.wrapped_key is None

    @property
    def is_too_large(self) -> bool:
        return isinstance(self.encrypted, int)


class Version(NamedTuple):
    """A stored version without its envelope. Times are UTC, actors are ids."""

    id: int
    name: str
    version: int
    note: str | None
    key_id: str
    created_at: str | None
    created_by: str | None
    updated_at: str | None
    updated_by: str | None
    deleted_at: str | None
    deleted_by: str | None
    last_used_at: str | None
    last_used_by: str | None
    renew_by: str | None
    is_destroyed: bool
    is_legacy: bool

    @property
    def is_deleted(self) -> bool:
        return self.deleted_at is not None


class LastUse(NamedTuple):
    """When, by which actor and in which version a secret was last used."""

    at: str | None = None
    by: str | None = None
    version: object = None


#: The ID of a master key, and a data key that it wraps.
Rewrapped = tuple[str, bytes]


class Held(NamedTuple):
    """How many versions hold a value, how many are destroyed, and the highest id."""

    values: int = 0
    destroyed: int = 0
    highest_id: int = 0


async def newest_version(reader: Reader, name: str) -> Row | None:
    """The newest version of `name`, or None when nothing is stored or there is no table."""
    rows = await _read(reader, _SELECT_CURRENT, (name,))
    if not rows:
        return None
    row_id, version, key_id, wrapped_key, encrypted, used, is_current = rows[0]
    if is_current:
        envelope = (ENVELOPE_VERSION, key_id, wrapped_key, encrypted)
        return Row(row_id, name, version, *envelope, None, used)
    rows = await _read(reader, _SELECT_ROW, {"name": name})
    return Row._make(rows[0]) if rows else None


async def newest(reader: Reader, name: str) -> Version | None:
    """The newest version of `name` without its envelope."""
    rows = await _read(reader, _SELECT_VERSION, {"name": name})
    return Version._make(rows[0]) if rows else None


async def _read(
    reader: Reader, sql: str, parameters: Parameters
) -> list[tuple[Any, ...]]:
    rows = await reader.select(sql, parameters)
    return await fetch(reader.db, sql, parameters) if rows is None else rows


def insert_version(
    changing: Changing,
    name: str,
    seal: Callable[[int], Sealed],
    *,
    note: str | None = None,
    renew_by: str | None = None,
    expected_version: int | None = None,
) -> int:
    """Store a new version, sealed for the next number, and return that number.

    `note` None keeps the note of the version before. Raises VersionConflict.
    """
    newest = find_newest(changing.conn, name)
    check_expected(name, newest, expected_version)
    version = next_version(name, newest)
    sealed = seal(version)
    if note is None and newest:
        note = newest.note
    columns: dict[str, object] = {"name": name, "note": note, "version": version}
    columns |= {"created_at": changing.at, "created_by": changing.actor_id}
    columns |= {"updated_at": changing.at, "updated_by": changing.actor_id}
    # Written as null, so that they are read back as well.
    columns |= dict.fromkeys(("deleted_at", "deleted_by"))
    columns |= dict.fromkeys(("last_used_at", "last_used_by"))
    columns |= {"renew_by": renew_by, **dict(zip(_CELLS, sealed, strict=True))}
    row_id = changing.insert(TABLE, columns)
    stored = find_newest(changing.conn, name)
    if stored is None or stored.id != row_id:
        raise not_kept()
    return version


def next_version(name: str, newest: Version | None) -> int:
    """The number after the newest. Raises DatabaseUnavailable if its row is damaged."""
    number = newest.version if newest else 0
    if type(number) is not int or not 0 <= number < VERSION_MAX:
        raise DatabaseUnavailable(
            f"The row of the newest version of {name} is damaged: run 'datasette secrets "
            "verify', and remove the row with the command that it prints"
        )
    return number + 1


def destroy(changing: Changing, name: str, versions: Iterable[int]) -> list[int]:
    """Remove the values of these versions for good; returns those that had one.

    Raises InvalidSecret for one that is not stored; nothing is then destroyed.
    """
    destroyed = []
    for version in versions:
        row = _row(changing.conn, name, version)
        if not row.is_destroyed:
            changing.update(TABLE, row.id, _DESTROYED)
            destroyed.append(version)
    return destroyed


def prune(changing: Changing, name: str, keep: int) -> list[int]:
    """Remove all but the `keep` newest versions with their records; returns those."""
    rows = changing.conn.execute(
        f"""select id, version from {TABLE} where name = :name
        order by version desc, id limit -1 offset :keep""",  # noqa: S608
        {"name": name, "keep": keep},
    ).fetchall()
    changing.delete(TABLE, [row_id for row_id, _ in rows])
    return [version for _, version in rows]


def destroy_row(changing: Changing, row_id: int) -> tuple[str, object] | None:
    """Remove the value of one row for good.

    A row without a usable name or version, or with those of another row, is deleted, since
    it could hide the newest version. Returns the name and version, or None if the row was
    destroyed before. Raises InvalidSecret when there was no such row.
    """
    rows = changing.conn.execute(
        f"""select name, version, typeof(name) = 'text' and typeof(version) = 'integer'
            and version between 1 and {VERSION_MAX - 1} and 1 =
            (select count(*) from {TABLE} where (name, version) = (one.name, one.version)),
            {_HOLDS_VALUE}
        from {TABLE} as one where id = :id""",  # noqa: S608
        {"id": row_id},
    ).fetchall()
    if not rows:
        if changing.has_destroyed(row_id):
            return None
        raise InvalidSecret(f"There is no row {row_id}")
    name, version, is_usable, holds_value = rows[0]
    if is_usable and not holds_value:
        return None
    if is_usable:
        changing.update(TABLE, row_id, _DESTROYED)
    else:
        changing.delete(TABLE, [row_id])
    return str(name), version


def _row(conn: sqlite3.Connection, name: str, version: int) -> Row:
    rows = select(
        conn,
        f"select {_ROW} from {TABLE} where name = :name and version = :version",  # noqa: S608
        {"name": name, "version": str(version)},  # of any size
    )
    if not rows:
        raise InvalidSecret(f"{name} has no version {version}")
    return Row._make(rows[0])


def find_version(conn: sqlite3.Connection, name: str, version: int) -> Row:
    """One stored version with its envelope.

    Raises InvalidSecret when there is none, or when it was destroyed.
    """
    row = _row(conn, name, version)
    if row.is_destroyed:
        raise InvalidSecret(f"{name} version {version} was destroyed")
    return row


def find_newest(conn: sqlite3.Connection, name: str) -> Version | None:
    """The newest version of `name`, even if it is deleted or destroyed."""
    rows = conn.execute(_SELECT_VERSION, {"name": name}).fetchall()
    return Version._make(rows[0]) if rows else None


def require_newest(
    conn: sqlite3.Connection, name: str, expected_version: int | None
) -> Version:
    """The newest version. Raises InvalidSecret when nothing is stored, and VersionConflict."""
    newest = find_newest(conn, name)
    if newest is None:
        raise InvalidSecret(f"Nothing is stored for {name}")
    check_expected(name, newest, expected_version)
    return newest


def check_expected(name: str, newest: Version | None, expected: object) -> None:
    """Raises VersionConflict unless `expected` is None or the number of the newest version."""
    actual = newest.version if newest else 0
    if expected is None or actual == expected:
        return
    if not isinstance(expected, int):
        raise InvalidSecret("expected_version is a number, 0 for none")
    if newest is None:
        raise VersionConflict(name, expected, 0)
    raise VersionConflict(name, expected, actual, newest.created_at, newest.created_by)


async def history(db: Database, name: str) -> list[Version]:
    """Every version of `name`, newest first."""
    sql = f"""select {_VERSION} from {TABLE} where name = :name
        order by version desc, id"""  # noqa: S608
    return list(map(Version._make, await fetch(db, sql, {"name": name})))


async def names(db: Database, *, with_date: bool = False) -> list[str]:
    """Every name that has a stored version, sorted by code points.

    `with_date`: only those of a version with a date to renew it.
    """
    distinct = f"select distinct name from {TABLE} where typeof(name) = 'text'"  # noqa: S608
    if with_date:
        distinct += " and renew_by is not null"
    # One text is twice as fast as a row for each name.
    sql = f"select json_group_array(name) from ({distinct} order by name)"  # noqa: S608
    [(texts,)] = await fetch(db, sql, {}) or [("[]",)]
    # Names that are not UTF-8 can become the same text.
    return sorted(dict.fromkeys(json.loads(texts)))


async def unusual_names(db: Database, key_ids: list[str]) -> set[str]:
    """The names with a version that is in another state than `stored`, or has a date.

    `key_ids`: the keys of the ring.
    """
    sql = f"""select distinct name from {TABLE} not indexed where typeof(name) = 'text'
        and (deleted_at is not null or renew_by is not null or wrapped_key is null
        or encryption_key_name not in (select value from json_each(:key_ids)))"""  # noqa: S608
    rows = await fetch(db, sql, {"key_ids": json.dumps(key_ids)})
    return {name for (name,) in rows}


async def newest_versions(db: Database, names: list[str]) -> list[Version]:
    """The newest version of each of these secrets."""
    sql = f"""with each(each_name) as {_NAMES}
        select {_VERSION} from each cross join {TABLE} on id = (
            select id from {TABLE} where name = each_name {_ORDER}
        )"""  # noqa: S608
    rows = await fetch(db, sql, {"names": json.dumps(names)})
    return list(map(Version._make, rows))


async def last_uses(db: Database, names: list[str]) -> dict[str, LastUse]:
    """When and by whom each of these secrets was last used, if it ever was."""
    # With max(), SQLite takes the other columns from the row of the maximum.
    sql = f"""select name, max(last_used_at), last_used_by, version from {TABLE}
        where name in {_NAMES} and last_used_at is not null group by name"""  # noqa: S608
    rows = await fetch(db, sql, {"names": json.dumps(names)})
    return {name: LastUse(*used) for name, *used in rows}


async def key_counts(db: Database) -> list[tuple[str, int, bool]]:
    """Each key ID, how many versions need it, and whether 0.x wrote those."""
    sql = f"""select encryption_key_name, count(*), {_NO_ENVELOPE} from {TABLE}
        where wrapped_key is not null or encrypted is not null group by 1, 3"""  # noqa: S608
    rows = await fetch(db, sql, {})
    return [(str(key_id), versions, bool(legacy)) for key_id, versions, legacy in rows]


async def versions_elsewhere(db: Database, key_id: str) -> list[Version]:
    """The versions that hold an envelope under any other master key than this one."""
    sql = f"""select {_VERSION} from {TABLE} where wrapped_key is not null
        and encryption_key_name is not :key_id order by name, version desc"""  # noqa: S608
    return list(map(Version._make, await fetch(db, sql, {"key_id": key_id})))


async def count_held(db: Database, up_to: int = 2**63 - 1) -> Held:
    """Count the rows of the table without using its index."""
    values = "count(ifnull(wrapped_key, encrypted))"
    sql = f"""select {values}, count(*) - {values}, ifnull(max(id), 0)
        from {TABLE} not indexed where id <= :up_to"""  # noqa: S608
    return Held(*next(iter(await fetch(db, sql, {"up_to": up_to})), ()))


@collector_paused()
def rows_from(
    conn: sqlite3.Connection,
    row_id: int,
    limit: int,
    *,
    but_key_id: str | None = None,
    legacy_only: bool = False,
    wraps_only: bool = False,
    was_made: bool = True,
) -> list[Row]:
    """Up to `limit` rows that hold a value, from id `row_id` on; all for -1.

    `but_key_id`: leave out those wrapped by that key. Rows of 0.x are never left out by
    it. `legacy_only`: only rows of 0.x. `wraps_only`: read no values; `encrypted`
    is then None. `was_made`: a missing table is an error.
    """
    if row_id >= 2**63:
        return []
    where = f"{_HOLDS_VALUE} and id >= :row_id"
    if but_key_id is not None:
        where += f" and (encryption_key_name is not :key_id or ({_NO_ENVELOPE}))"
    if legacy_only:
        where += f" and {_NO_ENVELOPE}"
    columns = _WRAP if wraps_only else _ROW
    sql = f"select {columns} from {TABLE} where {where} order by id limit :limit"  # noqa: S608
    parameters = {"row_id": row_id, "limit": limit, "key_id": but_key_id}
    rows = select(conn, sql, parameters, was_made=was_made)
    return [Row(*row) for row in rows]


async def rows_with_ids(db: Database, ids: list[int]) -> list[Row]:
    """The rows with these ids that hold a value."""
    sql = f"select {_ROW} from {TABLE} where {_HOLDS_VALUE} and {_IDS} order by id"  # noqa: S608
    return [Row(*row) for row in await fetch(db, sql, {"ids": json.dumps(ids)})]


@collector_paused()
def replace_envelopes(
    conn: sqlite3.Connection,
    envelopes: Mapping[int, Sealed | Rewrapped],
    *,
    wraps_only: bool,
) -> None:
    """Write new envelopes over those of the rows with these ids, and read them back.

    `wraps_only`: the value stays as it is, and `encrypted` is neither read nor written.
    Raises DatabaseUnavailable unless each row holds what was written to it.
    """
    columns = _CELLS[1:3] if wraps_only else _CELLS
    conn.executemany(
        f"update {TABLE} set {' = ?, '.join(columns)} = ? where id = ?",  # noqa: S608
        [(*cells, row_id) for row_id, cells in envelopes.items()],
    )
    with tuple_cursor(conn) as cursor:
        stored = cursor.execute(
            f"""select id, {", ".join(columns).replace("encrypted", _ENCRYPTED)}
            from {TABLE} where {_IDS}""",  # noqa: S608
            {"ids": json.dumps(list(envelopes))},
        ).fetchall()
    if {row[0]: row[1:] for row in stored} != envelopes:
        raise not_kept()


async def record_uses(
    db: Database, uses: Mapping[int, tuple[str, str | None]], now: str
) -> sqlite3.Error | None:
    """Write when and by which actor each row was last used, in one short transaction.

    Returns the error if it failed. A later use that another process wrote is kept, unless
    it is later than `now`, because then a clock was wrong. Waits about 40 ms for the lock.
    """

    def record_secret_uses(conn: sqlite3.Connection) -> sqlite3.Error | None:
        [(timeout,)] = conn.execute("pragma busy_timeout").fetchall()
        milliseconds = int(_USE_LOCK_SECONDS * 1000)
        conn.execute(f"pragma busy_timeout = {milliseconds}").fetchall()
        try:
            with time_limit(conn, seconds=1), transaction(conn):
                conn.executemany(
                    f"""update {TABLE} set last_used_at = :at, last_used_by = :actor_id
                    where id = :id and (last_used_at is null or last_used_at <= :at
                        or last_used_at > :now)""",  # noqa: S608
                    [
                        {"id": row_id, "at": at, "actor_id": actor_id, "now": now}
                        for row_id, (at, actor_id) in uses.items()
                    ],
                )
            return None
        except sqlite3.Error as error:
            return error.with_traceback(None)
        finally:
            conn.execute(f"pragma busy_timeout = {timeout}").fetchall()

    return await run_when_unlocked(db, record_secret_uses, _USE_LOCK_SECONDS)
