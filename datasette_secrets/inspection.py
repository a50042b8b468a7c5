"""The one check of the whole tables: their schema, their index, their rows.

Whoever can write to the database can also change its schema or damage an index. What is
found here is named, with the command that helps, and every change is refused until it has
been dealt with. `get_secret` goes on. Nothing else in this package defends against it.
"""

from __future__ import annotations

import functools
import re
import shlex
import sqlite3
import weakref
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from . import schema
from .database import read
from .errors import DatabaseUnavailable
from .schema import TABLE, TABLES

if TYPE_CHECKING:
    from datasette.database import Database


# Earlier releases of SQLite check the whole file or nothing.
_CHECKS_ONE_TABLE = (3, 33)


MADE_BY_OTHERS = "made-by-others"


DAMAGED = "damaged"


class Finding(NamedTuple):
    """What is wrong, with a `code` for programs, and what helps."""

    code: str
    message: str
    remedy: str

    @property
    def sentence(self) -> str:
        return f"{self.message}: {self.remedy}"


class _Entry(NamedTuple):
    """An entry of `sqlite_master`, its SQL as tokens."""

    type: bytes
    name: bytes
    table: bytes
    tokens: tuple[bytes, ...]


_TOKEN = re.compile(
    rb"""\s+ | --[^\n]* | /\*.*?(?:\*/|\Z)
    | (?P<quoted> "(?:[^"]|"")*" | \[[^\]]*\] | `(?:[^`]|``)*` )
    | (?P<token> '(?:[^']|'')*' | [\w$]+ | . )""",
    re.VERBOSE | re.DOTALL,
)


@functools.lru_cache(maxsize=100)
def _tokens(sql: bytes) -> tuple[bytes, ...]:
    """The tokens of a statement, whatever its white space, case and quoting."""
    names = _names()
    tokens = []
    for match in _TOKEN.finditer(sql):
        if match["quoted"]:
            quoted = match["quoted"].lower()
            # What stands in quotes is not always a name: `"primary" "key"` is a type.
            tokens.append(quoted[1:-1] if quoted[1:-1] in names else quoted)
        elif match["token"]:
            tokens.append(match["token"].lower())
    return tuple(tokens)


@functools.cache
def _names() -> frozenset[bytes]:
    """The tables, their columns and their indexes, as they are made here."""
    with _as_made_here() as conn:
        columns = conn.execute(
            "select name from sqlite_master union "
            "select info.name from sqlite_master as made, pragma_table_info(made.name) as info"
        ).fetchall()
    return frozenset(name.encode() for (name,) in columns)


@contextmanager
def _as_made_here() -> Iterator[sqlite3.Connection]:
    """A database with the tables as this version makes them."""
    conn = sqlite3.connect(":memory:", isolation_level=None)
    try:
        schema.apply_migrations(conn)
        yield conn
    finally:
        conn.close()


@functools.cache
def _own_entries() -> frozenset[_Entry]:
    """What this plugin makes, and what releases of 0.x have made."""
    with _as_made_here() as conn:
        entries = {entry for entry, _ in _entries(conn)}
    [table] = [entry for entry in entries if entry.name == TABLE.encode()]
    added = sum((_tokens(f", {' '.join(pair)}".encode()) for pair in schema.ADDED), ())
    before = (*table.tokens[: -len(added) - 1], b")")
    for tokens in (table.tokens, before):
        # 0.1a0 had one more column.
        at = tokens.index(b"created_at")
        redacted = (*tokens[:at], b"redacted", b"text", b",", *tokens[at:])
        entries |= {table._replace(tokens=each) for each in (tokens, redacted)}
    return frozenset(entries)


def _entries(conn: sqlite3.Connection) -> list[tuple[_Entry, bool]]:
    """Every entry whose SQL names our tables, and whether all of it is text."""
    text_factory, conn.text_factory = conn.text_factory, bytes
    try:
        rows = conn.execute(
            """select type, name, tbl_name, cast(sql as text), typeof(type) = 'text'
                and typeof(name) = 'text' and typeof(tbl_name) = 'text'
                and typeof(sql) = 'text'
            from sqlite_master
            where instr(lower(cast(sql as text)), :table) order by rowid""",
            {"table": TABLE},
        ).fetchall()
    finally:
        conn.text_factory = text_factory
    return [
        (
            _Entry(_bytes(type_), _bytes(name), _bytes(table), _tokens(sql)),
            bool(is_text),
        )
        for type_, name, table, sql, is_text in map(tuple, rows)
    ]


def _bytes(cell: object) -> bytes:
    return cell if isinstance(cell, bytes) else str(cell).encode()


def _foreign(conn: sqlite3.Connection) -> Iterator[Finding]:
    """What of the schema neither this plugin nor a release of 0.x made."""
    seen = set()
    entries = _entries(conn)
    for entry, is_text in entries:
        if entry not in _own_entries() or not is_text or entry.name in seen:
            yield _foreign_entry(conn, entry)
        seen.add(entry.name)
    for name in sorted(_triggers(conn, _own_tables(entries))):
        entry = _Entry(b"hidden trigger", name.encode(), b"", ())
        if entry.name not in seen:
            yield _foreign_entry(conn, entry)


def _foreign_entry(conn: sqlite3.Connection, entry: _Entry) -> Finding:
    name, type_ = (each.decode("utf-8", "replace") for each in (entry.name, entry.type))
    message = f"The {type_} '{name}' is not one that this plugin makes"
    if name.lower() in TABLES:
        remedy = (
            "restore the database from a backup, or rename what stands there if it is "
            "something else"
        )
        return Finding(MADE_BY_OTHERS, message, remedy)
    quoted = name.replace('"', '""')
    remedy = _sqlite3(conn, f'drop {type_} "{quoted}"')
    if entry.type not in (b"index", b"table", b"trigger", b"view"):
        remedy = "it cannot be dropped, so restore the database from a backup"
    message += ", and can hide, undo, forge or copy what is stored"
    return Finding(MADE_BY_OTHERS, message, remedy)


def _sqlite3(conn: sqlite3.Connection, statement: str) -> str:
    path = conn.execute("pragma database_list").fetchall()[0][2]
    return f"run: sqlite3 {shlex.quote(path or 'FILE')} {shlex.quote(statement)}"


def _own_tables(entries: list[tuple[_Entry, bool]]) -> list[str]:
    """Those of our tables that are there, and are as we make them."""
    own = {
        entry[:2] for entry, is_text in entries if is_text and entry in _own_entries()
    }
    return [table for table in TABLES if (b"table", table.encode()) in own]


def _triggers(conn: sqlite3.Connection, tables: list[str]) -> set[str]:
    """The triggers and views that our statements would run, as SQLite compiles them."""
    found = set()

    def authorize(*arguments: object) -> int:
        if arguments[4]:
            found.add(str(arguments[4]))
        return sqlite3.SQLITE_OK

    conn.set_authorizer(authorize)
    try:
        for table in tables:
            info = conn.execute(f"pragma table_info({table})").fetchall()
            changes = ", ".join(f"{row[1]} = null" for row in info if row[1] != "id")
            for statement in (
                f"insert into {table} default values",
                f"update {table} set {changes}",  # noqa: S608
                f"delete from {table}",  # noqa: S608
                f"select id from {table}",  # noqa: S608
            ):
                conn.execute(f"explain {statement}").close()
    finally:
        # Python 3.10 has no way to take an authorizer away.
        conn.set_authorizer(lambda *_: sqlite3.SQLITE_OK)
    return found


def _damaged(conn: sqlite3.Connection) -> Iterator[Finding]:
    """What SQLite finds wrong with the tables and their indexes, and with their ids."""
    tables = _own_tables(_entries(conn))
    if TABLE not in tables:
        return
    remedy = (
        f"{_sqlite3(conn, f'reindex {TABLE}')}, and restore the database from a backup if "
        "this is then still said"
    )
    if sqlite3.sqlite_version_info < _CHECKS_ONE_TABLE:
        tables = ["1"]
    for table in tables:
        said = conn.execute(f"pragma integrity_check({table})").fetchall()[0][0]
        if said != "ok":
            message = (
                f"The table {TABLE} or its index is damaged, so that a read can miss the "
                f"newest version (SQLite says: {str(said).splitlines()[-1]})"
            )
            yield Finding(DAMAGED, message, remedy)
            return
    [(counted, found)] = conn.execute(
        f"""select (select count(*) from {TABLE}),
        (select count(*) from {TABLE} not indexed where typeof(id) = 'integer')"""  # noqa: S608
    ).fetchall()
    if counted != found:
        message = (
            f"The table {TABLE} has {counted:,} rows, of which {found:,} are found by "
            "their ids"
        )
        yield Finding(DAMAGED, message, remedy)


_found: weakref.WeakKeyDictionary[Database, list[Finding]] = weakref.WeakKeyDictionary()


async def inspect(db: Database) -> list[Finding]:
    """Check the schema, the index and the rows of the tables, all in one read transaction.

    Raises DatabaseUnavailable where the database cannot be read, or where somebody else's
    table has the name of ours.
    """

    def inspect_secrets_tables(conn: sqlite3.Connection) -> list[Finding]:
        begins = not conn.in_transaction
        if begins:
            conn.execute("begin")
        try:
            return [*_foreign(conn), *_damaged(conn)]
        finally:
            if begins:
                conn.execute("rollback")

    _found[db] = findings = await read(db, inspect_secrets_tables)
    for finding in findings:
        if f"'{TABLE}' is not" in finding.message:
            raise DatabaseUnavailable(finding.sentence)
    return findings


async def inspect_schema(db: Database) -> list[Finding]:
    """Check the schema alone, which takes no time. Raises DatabaseUnavailable."""

    def inspect_secrets_schema(conn: sqlite3.Connection) -> list[Finding]:
        return list(_foreign(conn))

    return await read(db, inspect_secrets_schema)


async def current_findings(db: Database) -> list[Finding]:
    """What is wrong now: the schema is looked at, the rest only if it was wrong before.

    Raises as `inspect` does.
    """
    return await (inspect(db) if _found.get(db) else inspect_schema(db))


def require_own_schema(conn: sqlite3.Connection) -> None:
    """Raises DatabaseUnavailable where the schema is not ours, so that nothing is written."""
    _refuse(list(_foreign(conn)))


async def require_own(db: Database) -> None:
    """Raises DatabaseUnavailable where `inspect_schema` finds anything."""
    _refuse(await inspect_schema(db))


async def require_sound(db: Database) -> None:
    """Raises DatabaseUnavailable where `inspect` finds anything."""
    _refuse(await inspect(db))


def _refuse(findings: list[Finding]) -> None:
    if findings:
        more = len(findings) - 1
        others = f" ('datasette secrets status' names {more} more)" if more else ""
        raise DatabaseUnavailable(f"{findings[0].sentence}{others}")


async def prepare(
    db: Database,
    *,
    migrate: Callable[[Database], Awaitable[None]] = schema.ensure_migrated,
) -> None:
    """Migrate and check the tables before the first change in the life of this process.

    `migrate`: what does it. What was found is looked for again before each change, until it has been dealt with.
    Raises DatabaseUnavailable.
    """
    is_sound = _found.get(db) == []
    if not is_sound:
        await require_own(db)
    await migrate(db)
    if not is_sound:
        await require_sound(db)
