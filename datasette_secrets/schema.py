"""The tables and their migrations.

A migration that shipped is never edited. Every migration can run again without harm,
because the record of applied migrations is in a table that others can write. The table of
0.x is migrated in place and never rebuilt, since a rebuild leaves old copies in the file.
"""

from __future__ import annotations

import sqlite3
import weakref
from typing import TYPE_CHECKING, Any

import sqlite_utils

from .database import Parameters, make_private, read, tuple_cursor, write
from .errors import DatabaseUnavailable, NeedsUpgrade

if TYPE_CHECKING:
    from datasette.database import Database


TABLE = "datasette_secrets"
INDEX = f"{TABLE}_name_version"
#: Who did what, when and from where; see `changes`.
LOG = f"{TABLE}_log"
LOG_INDEX = f"{LOG}_name_id"
TABLES = (TABLE, LOG)
# No secret is ever set this often. A row with a greater version is damaged.
VERSION_MAX = 2**53

migrations = sqlite_utils.Migrations("datasette-secrets")

#: The columns that 0.x did not have.
ADDED = (("wrapped_key", "blob"), ("envelope_version", "integer"), ("renew_by", "text"))


@migrations(name="0001_table")
def _create_tables(db: sqlite_utils.Database) -> None:
    if "version" in _columns(db.conn) and not is_migrated(db.conn):
        _renumber_versions(db)
    db.execute(
        f"""create table if not exists {TABLE} (
            id integer primary key,
            name text not null,
            note text,
            version integer not null default 1,
            encrypted blob,
            encryption_key_name text not null,
            created_at text,
            created_by text,
            updated_at text,
            updated_by text,
            deleted_at text,
            deleted_by text,
            last_used_at text,
            last_used_by text,
            wrapped_key blob,
            envelope_version integer,
            renew_by text
        )"""
    )
    for column, type_ in ADDED:
        if column not in _columns(db.conn):
            db.execute(f"alter table {TABLE} add column {column} {type_}")
    db.execute(
        f"""create table if not exists {LOG} (
            id integer primary key,
            at text,
            actor_id text,
            via text,
            action text,
            name text,
            version integer,
            detail text
        )"""
    )
    db.execute(f"create index if not exists {LOG_INDEX} on {LOG} (name, id)")


def _renumber_versions(db: sqlite_utils.Database) -> None:
    """Give each version a number of its own. The row that 0.x served stays the newest.

    0.x could store one number twice, and served versions that were not numbers.
    """
    last: dict[str, int] = {}
    rows = db.execute(
        f"select id, name, version from {TABLE} order by version, id desc"  # noqa: S608
    ).fetchall()
    for row_id, name, version in rows:
        is_number = type(version) is int and version < VERSION_MAX
        last[name] = max(last.get(name, 0) + 1, version if is_number else 0)
        if last[name] != version:
            db.execute(
                f"update {TABLE} set version = :number where id = :id",  # noqa: S608
                {"number": last[name], "id": row_id},
            )


@migrations(name="0002_unique_versions")
def _make_versions_unique(db: sqlite_utils.Database) -> None:
    """Somebody may have stored one twice; the check of the tables names those rows."""
    twins = f"select 1 from {TABLE} group by name, version having count(*) > 1 limit 1"  # noqa: S608
    if not db.execute(twins).fetchall():
        db.execute(
            f"create unique index if not exists {INDEX} on {TABLE} (name, version)"
        )


def apply_migrations(conn: sqlite3.Connection) -> None:
    """Run all migrations unless all columns and indexes exist.

    The record of applied migrations is ignored, because somebody may have changed it or
    restored a table of 0.x without it.
    """
    if _is_complete(conn):
        return
    if migrations.migrations_table in _entries(conn):
        conn.execute(
            f"delete from {migrations.migrations_table} where migration_set = :name",  # noqa: S608
            {"name": migrations.name},
        )
    # Recursive triggers would stay on for all that follows on this connection.
    db = sqlite_utils.Database(conn, execute_plugins=False, recursive_triggers=False)
    migrations.apply(db)


def _is_complete(conn: sqlite3.Connection) -> bool:
    has_columns = {column for column, _ in ADDED} <= _columns(conn)
    return has_columns and {INDEX, LOG_INDEX} <= _entries(conn)


def _entries(conn: sqlite3.Connection) -> set[str]:
    return {row[0] for row in conn.execute("select name from sqlite_master").fetchall()}


def _columns(conn: sqlite3.Connection) -> set[str]:
    return {row[1] for row in conn.execute(f"pragma table_info({TABLE})").fetchall()}


def is_migrated(conn: sqlite3.Connection) -> bool:
    """Whether the table, if there is one, has the columns that 0.x did not have."""
    return "wrapped_key" in _columns(conn)


def legacy_value(conn: sqlite3.Connection) -> tuple[str, int] | None:
    """Name and version of a value in a table of 0.x that has not been migrated."""
    columns = _columns(conn)
    if is_migrated(conn) or not {"name", "version", "encrypted"} <= columns:
        return None
    rows = conn.execute(
        f"select name, version from {TABLE} where encrypted is not null limit 1"  # noqa: S608
    ).fetchall()
    return (str(rows[0][0]), rows[0][1]) if rows else None


_migrated: weakref.WeakSet[Database] = weakref.WeakSet()


def was_made(db: Database) -> bool:
    """Whether this process has seen the tables, so that they must be there."""
    return db in _migrated


async def ensure_migrated(db: Database) -> None:
    """Migrate the tables, once in this process.

    Raises NeedsUpgrade for a table of 0.x with values in it, and DatabaseUnavailable.
    """

    def migrate_secrets_tables(conn: sqlite3.Connection) -> None:
        value = legacy_value(conn)
        if value is not None:
            raise NeedsUpgrade(*value)
        make_private(conn)
        apply_migrations(conn)

    if db not in _migrated:
        # Reads first, so that a server can start while another process holds the lock.
        if not await read(db, _is_complete):
            await write(db, migrate_secrets_tables)
        _migrated.add(db)


async def fetch(
    db: Database, sql: str, parameters: Parameters
) -> list[tuple[Any, ...]]:
    """All rows of a query on our tables. Raises DatabaseUnavailable."""

    def rows_of_secrets(conn: sqlite3.Connection) -> list[tuple[Any, ...]]:
        return select(conn, sql, parameters, was_made=was_made(db))

    return await read(db, rows_of_secrets)


def select(
    conn: sqlite3.Connection,
    sql: str,
    parameters: Parameters,
    *,
    was_made: bool = True,
) -> list[tuple[Any, ...]]:
    """All rows, or none before the tables were made.

    Columns that 0.x did not have are null. `was_made`: a missing table is an error.
    """
    try:
        with tuple_cursor(conn) as cursor:
            return cursor.execute(sql, parameters).fetchall()
    except sqlite3.OperationalError as error:
        # Only the first words are fixed. The rest may be text that is not UTF-8.
        message = str(error)
        if message.startswith("no such table"):
            if was_made:
                raise DatabaseUnavailable(
                    "The table of the secrets is gone; restore the database and restart "
                    "Datasette"
                ) from None
            return []
        if message.startswith("no such column"):
            for column, _ in ADDED:
                sql = sql.replace(column, "null")
        elif not message.startswith("Could not decode"):
            raise
    # Datasette's own settings can read text that is not UTF-8.
    return list(map(tuple, conn.execute(sql, parameters).fetchall()))
