"""The one check of both tables: their schema, their index, their rows.

Whoever can write to the database can also change its schema or damage an index. This names
what is wrong and the command that helps. Every change is refused until it is dealt with;
`get_secret` goes on. Nothing else in this package defends against it.
"""

from __future__ import annotations

import functools
import re
import shlex
import sqlite3
import weakref
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple

from . import schema
from .database import read
from .errors import DatabaseUnavailable
from .schema import INDEX, LOG, LOG_INDEX, TABLE, TABLES

if TYPE_CHECKING:
    from datasette.database import Database

MADE_BY_OTHERS = "made-by-others"
DAMAGED = "damaged"

# Earlier releases of SQLite check the whole file or nothing.
_CHECKS_ONE_TABLE = (3, 33)

_NAMES = frozenset(name.encode() for name in (TABLE, LOG, INDEX, LOG_INDEX))
_TOKEN = re.compile(
    rb"""\s+ | --[^\n]* | /\*.*?(?:\*/|\Z)
    | (?P<quoted> "(?:[^"]|"")*" | \[[^\]]*\] | `(?:[^`]|``)*` )
    | (?P<token> '(?:[^']|'')*' | [\w$]+ | . )""",
    re.VERBOSE | re.DOTALL,
)
# In quotes these mean something else: `"primary" "key"` is a type.
_KEYWORDS = frozenset(
    b"blob create default index integer key not null on primary table text unique".split()
)


class Finding(NamedTuple):
    """What is wrong, with a `code` for programs, and what helps."""

    code: str
    message: str
    remedy: str

    @property
    def sentence(self) -> str:
        return f"{self.message}; {self.remedy}"


class _Entry(NamedTuple):
    """An entry of `sqlite_master`, its SQL as tokens."""

    type: bytes
    name: bytes
    table: bytes
    tokens: tuple[bytes, ...]
    is_text: bool = True

    @property
    def is_about_secrets(self) -> bool:
        """Whether its SQL names one of our tables or indexes, quoted in any way."""
        names = [token.strip(b"\"'`[]") for token in self.tokens]
        if names[:2] == [b"create", b"table"]:
            # Another table can only refer to ours, which changes nothing here.
            names = names[2:3]
        return not _NAMES.isdisjoint(names)

    @property
    def has_name_of_table(self) -> bool:
        is_table = self.type.lower() in (b"table", b"view")
        return is_table and self.name.decode("utf-8", "replace").lower() in TABLES


@functools.lru_cache(maxsize=100)
def _tokens(sql: bytes) -> tuple[bytes, ...]:
    """The tokens of a statement, whatever its white space, case and quoting."""
    tokens = []
    for match in _TOKEN.finditer(sql):
        token = (match["quoted"] or match["token"] or b"").lower()
        name = token[1:-1] if match["quoted"] else b""
        is_name = re.fullmatch(rb"\w+", name) and name not in _KEYWORDS
        if token:
            tokens.append(name if is_name else token)
    return tuple(tokens)


@functools.cache
def _own_entries() -> frozenset[_Entry]:
    """What this plugin makes, and what releases of 0.x have made."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as conn:
        schema.apply_migrations(conn)
        entries = set(_entries(conn))
    [table] = [entry for entry in entries if entry.name == TABLE.encode()]
    added = sum((_tokens(f", {' '.join(pair)}".encode()) for pair in schema.ADDED), ())
    before = (*table.tokens[: -len(added) - 1], b")")
    for tokens in (table.tokens, before):
        # 0.1a0 had one more column.
        at = tokens.index(b"created_at")
        redacted = (*tokens[:at], b"redacted", b"text", b",", *tokens[at:])
        entries |= {table._replace(tokens=each) for each in (tokens, redacted)}
    return frozenset(entries)


def _entries(conn: sqlite3.Connection) -> list[_Entry]:
    """Every entry of the schema that is about our tables."""
    text_factory, conn.text_factory = conn.text_factory, bytes
    try:
        rows = conn.execute(
            """select cast(ifnull(type, '') as text), cast(ifnull(name, '') as text),
                cast(ifnull(tbl_name, '') as text), cast(sql as text),
                typeof(type) = 'text' and typeof(name) = 'text'
                and typeof(tbl_name) = 'text' and typeof(sql) = 'text'
            from sqlite_master
            where instr(lower(cast(sql as text)), :table) order by rowid""",
            {"table": TABLE},
        ).fetchall()
    finally:
        conn.text_factory = text_factory
    entries = (
        _Entry(type_, name, table, _tokens(sql), bool(is_text))
        for type_, name, table, sql, is_text in map(tuple, rows)
    )
    return [entry for entry in entries if entry.is_about_secrets]


def _foreign(conn: sqlite3.Connection, entries: list[_Entry]) -> Iterator[Finding]:
    """What of the schema neither this plugin nor a release of 0.x made.

    Raises DatabaseUnavailable where that is a table of our name, which must not be read.
    """
    foreign = [entry for entry in entries if entry not in _own_entries()]
    named = {entry.name for entry in entries}
    foreign += [
        _Entry(b"hidden trigger", name.encode(), b"", ())
        for name in sorted(_triggers(conn, _own_tables(entries)))
        if name.encode() not in named
    ]
    for entry in foreign:
        finding = _foreign_entry(conn, entry)
        if entry.has_name_of_table:
            raise DatabaseUnavailable(finding.sentence)
        yield finding


def _foreign_entry(conn: sqlite3.Connection, entry: _Entry) -> Finding:
    name, type_ = (each.decode("utf-8", "replace") for each in (entry.name, entry.type))
    message = f"The {type_} '{name}' was not made by this plugin"
    if entry.has_name_of_table:
        remedy = "restore the database from a backup, or rename it if somebody needs it"
        return Finding(MADE_BY_OTHERS, message, remedy)
    if type_ in ("index", "trigger", "view"):
        quoted = name.replace('"', '""')
        statement = f'drop {type_} "{quoted}"'
        remedy = f"remove it: {_sqlite3(conn, statement)}"
    elif type_ == "table":
        remedy = f"it can show the rows of {TABLE}, so make it again without that name"
    else:
        remedy = "it cannot be dropped, so restore the database from a backup"
    message += " and can hide, undo, forge or copy what is stored"
    return Finding(MADE_BY_OTHERS, message, remedy)


def _sqlite3(conn: sqlite3.Connection, statement: str) -> str:
    path = conn.execute("pragma database_list").fetchall()[0][2]
    return f"sqlite3 {shlex.quote(path or 'FILE')} {shlex.quote(statement)}"


def _own_tables(entries: list[_Entry]) -> list[str]:
    """Those of our tables that are there, and are as we make them."""
    own = {entry[:2] for entry in entries if entry in _own_entries()}
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


def _damaged(conn: sqlite3.Connection, tables: list[str]) -> list[Finding]:
    """What SQLite finds wrong with the tables and their indexes, and with their ids."""
    if TABLE not in tables:
        return []
    remedy = (
        f"repair it: {_sqlite3(conn, f'reindex {TABLE}')}, and if that does not help, "
        "restore the database from a backup"
    )
    if sqlite3.sqlite_version_info < _CHECKS_ONE_TABLE:
        tables = ["1"]
    for table in tables:
        answer = conn.execute(f"pragma integrity_check({table})").fetchall()[0][0]
        if answer != "ok":
            message = (
                f"The table {TABLE} or its index is damaged, so that a read can miss the "
                f"newest version (SQLite says: {str(answer).splitlines()[-1]})"
            )
            return [Finding(DAMAGED, message, remedy)]
    [(counted, found)] = conn.execute(
        f"""select (select count(*) from {TABLE}),
        (select count(*) from {TABLE} not indexed where typeof(id) = 'integer')"""  # noqa: S608
    ).fetchall()
    if counted == found:
        return []
    message = f"The table {TABLE} has {counted:,} rows, of which {found:,} are found by their ids"
    return [Finding(DAMAGED, message, remedy)]


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
            entries = _entries(conn)
            tables = _own_tables(entries)
            return [*_foreign(conn, entries), *_damaged(conn, tables)]
        finally:
            if begins:
                conn.execute("rollback")

    _found[db] = findings = await read(db, inspect_secrets_tables)
    return findings


async def current_findings(db: Database) -> list[Finding]:
    """What is wrong now: the schema is looked at, the rest only if it was wrong before.

    Raises as `inspect` does.
    """

    def inspect_secrets_schema(conn: sqlite3.Connection) -> list[Finding]:
        return list(_foreign(conn, _entries(conn)))

    return await (inspect(db) if _found.get(db) else read(db, inspect_secrets_schema))


def require_own_schema(conn: sqlite3.Connection) -> None:
    """Raises DatabaseUnavailable where the schema is not ours, so that nothing is written."""
    _refuse(list(_foreign(conn, _entries(conn))))


async def require_own(db: Database) -> None:
    """The same, as a read by itself."""
    await read(db, require_own_schema)


async def require_sound(db: Database) -> None:
    """Raises DatabaseUnavailable where `inspect` finds anything."""
    _refuse(await inspect(db))


def _refuse(findings: list[Finding]) -> None:
    if findings:
        more = len(findings) - 1
        others = f" ('datasette secrets status' names {more} more)" if more else ""
        raise DatabaseUnavailable(f"{findings[0].sentence}{others}")


async def prepare(db: Database) -> None:
    """Migrate and check the tables before the first change in the life of this process.

    What was found is looked for again before each change, until it has been dealt with.
    Raises NeedsUpgrade for a table of 0.x, and DatabaseUnavailable.
    """
    is_sound = _found.get(db) == []
    if not is_sound:
        await require_own(db)
    await schema.ensure_migrated(db)
    if not is_sound:
        await require_sound(db)
