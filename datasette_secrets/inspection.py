"""The one check of both tables: their schema, their index, their rows.

Whoever can write to the database can also change its schema or damage an index. This names
what is wrong and the command that helps. Every change is refused until it is dealt with;
`get_secret` goes on. The only other defence is that each change reads back what it wrote.
"""

from __future__ import annotations

import functools
import itertools
import re
import shlex
import sqlite3
import weakref
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import TYPE_CHECKING, NamedTuple

from . import schema
from .database import authorizer, file_of, read
from .errors import DatabaseUnavailable
from .schema import INDEX, LOG, LOG_INDEX, TABLE, TABLES, VERSION_MAX

if TYPE_CHECKING:
    from datasette.database import Database

MADE_BY_OTHERS = "made-by-others"
DAMAGED = "damaged"

_NAMES = frozenset((TABLE, LOG, INDEX, LOG_INDEX))
_TOKEN = re.compile(
    r"""\s+ | --[^\n]* | /\*.*?(?:\*/|\Z)
    | (?P<quoted> "(?:[^"]|"")*" | \[[^\]]*\] | `(?:[^`]|``)*` )
    | (?P<token> '(?:[^']|'')*' | [\w$\x80-\U0010ffff]+ | . )""",
    re.VERBOSE | re.DOTALL | re.ASCII,
)
# In quotes these mean something else: `"primary" "key"` is a type.
_KEYWORD = re.compile(
    "blob|create|default|if|index|integer|key|not|null|on|primary|table|text|unique"
)
# How many damaged rows are named at once.
_NAMED_MAX = 10
_DESTROY_ROW = "datasette secrets destroy-row"


class Finding(NamedTuple):
    """What is wrong, with a `code` for programs, and what helps."""

    code: str
    message: str
    remedy: str

    @property
    def sentence(self) -> str:
        return f"{self.message}; {self.remedy}"


class _Entry(NamedTuple):
    """An entry of `sqlite_master`, its SQL as tokens.

    SQLite refuses the whole schema if the first three do not fit the SQL.
    """

    type: str
    name: str
    table: str
    tokens: tuple[str, ...]

    @property
    def runs(self) -> bool:
        """Whether it may reach any table when it is used."""
        return self.type.lower() in ("view", "trigger")

    @property
    def has_name_of_ours(self) -> bool:
        """Whether it has the name of one of our tables or indexes, or is made for one."""
        names = {self.name.lower(), self.table.lower()}
        if "virtual" in self.tokens[:2]:
            # The table whose rows a full-text index shows, in `content = …`.
            pairs = itertools.pairwise(self.tokens)
            names |= {shown.strip("'") for equals, shown in pairs if equals == "="}
        return not _NAMES.isdisjoint(names)

    @property
    def has_name_of_table(self) -> bool:
        return self.type.lower() in ("table", "view") and self.name.lower() in TABLES


@functools.lru_cache(maxsize=100)
def _tokens(sql: str) -> tuple[str, ...]:
    """The tokens of a statement in lower case, whatever its white space and quoting."""
    tokens = []
    for match in _TOKEN.finditer(sql):
        token = match["quoted"] or match["token"]
        name = token[1:-1] if match["quoted"] else ""
        is_name = name.isidentifier() and not _KEYWORD.fullmatch(name)
        if token:
            tokens.append(name if is_name else token)
    return tuple(tokens)


@functools.cache
def _own_entries() -> frozenset[_Entry]:
    """What this plugin makes, and what releases of 0.x have made."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as conn:
        schema.apply_migrations(conn)
        entries = set(_entries(conn))
    [table] = [entry for entry in entries if entry.name == TABLE]
    added = sum((_tokens(f", {' '.join(pair)}") for pair in schema.ADDED), ())
    before = (*table.tokens[: -len(added) - 1], ")")
    for tokens in (table.tokens, before):
        # 0.1a0 had one more column.
        at = tokens.index("created_at")
        redacted = (*tokens[:at], "redacted", "text", ",", *tokens[at:])
        entries |= {table._replace(tokens=each) for each in (tokens, redacted)}
    return frozenset(entries)


def _entries(conn: sqlite3.Connection) -> list[_Entry]:
    """Every entry of the schema that is about our tables, or may reach them."""
    rows = conn.execute(
        """select cast(ifnull(type, '') as text), cast(ifnull(name, '') as text),
            cast(ifnull(tbl_name, '') as text), lower(cast(sql as text)) as statement,
            typeof(type) || typeof(name) || typeof(tbl_name) || typeof(sql)
        from sqlite_master where instr(statement, :table) order by rowid""",
        {"table": TABLE},
    ).fetchall()
    # SQLite ignores what follows a null character. Our own entries contain neither null
    # characters nor blobs.
    entries = []
    for *names, sql, types in rows:
        is_text = types == "text" * 4 and "\0" not in "".join(names)
        tokens = _tokens(sql) if is_text else ()
        names = [name.split("\0")[0] for name in names]
        entries.append(_Entry._make([*names, tokens]))
    return [entry for entry in entries if entry.runs or entry.has_name_of_ours]


def _foreign(conn: sqlite3.Connection, entries: list[_Entry]) -> Iterator[Finding]:
    """The entries of the schema that neither this plugin nor a release of 0.x made.

    Raises DatabaseUnavailable for a table of our name, which must not be read.
    """
    others = [entry for entry in entries if entry not in _own_entries()]
    reaching = _reaching(conn, others)
    for entry in others:
        names = {entry.name.lower(), entry.table.lower()}
        if entry.has_name_of_ours or not reaching.isdisjoint(names):
            finding = _foreign_entry(conn, entry)
            if entry.has_name_of_table:
                raise DatabaseUnavailable(finding.sentence)
            yield finding
    for (names,) in conn.execute(
        """select group_concat(cast(name as text), ' and ') from sqlite_master
        where rootpage > 0 group by cast(rootpage as integer) having count(*) > 1"""
    ).fetchall():
        message = f"{names} share their pages, so that one can change the other unseen"
        remedy = "restore the database from a backup"
        yield Finding(MADE_BY_OTHERS, message, remedy)


def _foreign_entry(conn: sqlite3.Connection, entry: _Entry) -> Finding:
    type_, name = entry.type, entry.name
    message = f"The {type_} '{name}' was not made by this plugin"
    if entry.has_name_of_table:
        remedy = "restore the database from a backup, or rename it if somebody needs it"
        return Finding(MADE_BY_OTHERS, message, remedy)
    if type_ in ("index", "trigger", "view"):
        remedy = f"remove it: {_sqlite3(conn, f'drop {type_} {_quoted(name)}')}"
    elif type_ == "table":
        remedy = f"it can show the rows of {TABLE}, so recreate it under another name"
    else:
        remedy = "it cannot be dropped, so restore the database from a backup"
    message += " and can hide, undo, forge or copy what is stored"
    return Finding(MADE_BY_OTHERS, message, remedy)


def _sqlite3(conn: sqlite3.Connection, statement: str) -> str:
    path = shlex.quote(file_of(conn) or "FILE")
    return f"sqlite3 {path} {shlex.quote(statement)}"


def _own_names(entries: list[_Entry]) -> set[str]:
    """Those of our tables and indexes that are there, and are as we make them."""
    return {entry.name for entry in entries if entry in _own_entries()}


def _reaching(conn: sqlite3.Connection, entries: list[_Entry]) -> set[str]:
    """The triggers and views that reach our tables, and their tables, in lower case.

    SQLite compiles each statement on their tables and says what it would touch.
    """
    found: set[str] = set()
    if not any(entry.runs for entry in entries):
        return found
    views = {entry.table for entry in entries if entry.type.lower() == "view"}

    def authorize(_: int, table: object, *rest: object) -> int:
        # SQLite does not name a view of which it needs no column. If a view or a trigger
        # has a `with` clause, it names the clause. So the table is found as well.
        source = rest[-1] or (name if name in views else None)
        if source and str(table).lower() in TABLES:
            found.update((str(source).lower(), name.lower()))
        return sqlite3.SQLITE_OK

    with authorizer(conn, authorize):
        for name in sorted({entry.table for entry in entries if entry.runs}):
            for statement in _statements(conn, name):
                # Not every statement can be run on each of them.
                with suppress(sqlite3.OperationalError):
                    conn.execute(f"explain {statement}").close()
    return found


def _statements(conn: sqlite3.Connection, table: str) -> Iterator[str]:
    """What can be done with a table or a view, with one column at a time.

    A trigger that cannot be compiled would hide those of other columns.
    """
    quoted = _quoted(table)
    yield f"insert into {quoted} default values"
    yield f"delete from {quoted}"  # noqa: S608
    yield f"select * from {quoted}"  # noqa: S608
    columns = ["rowid", "oid", "_rowid_"]
    with suppress(sqlite3.OperationalError):  # a view of a table that is not there
        info = conn.execute(f"pragma table_info({quoted})").fetchall()
        columns += [row[1] for row in info]
    for column in columns:
        yield f"update {quoted} set {_quoted(column)} = null"  # noqa: S608


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _missing(
    conn: sqlite3.Connection, entries: list[_Entry], *, was_made: bool
) -> Iterator[Finding]:
    """Our tables and indexes that are missing, once they were made.

    `was_made`: this process has seen them.
    """
    own = _own_names(entries)
    if not was_made and (not own or (TABLE in own and not schema.is_migrated(conn))):
        return
    if TABLE not in own:
        message = f"The table {TABLE} is gone, and with it every secret"
        remedy = "restore the database from a backup, and restart Datasette"
        yield Finding(DAMAGED, message, remedy)
        return
    twins = []
    if INDEX not in own:
        twins = conn.execute(
            f"""select group_concat(id, ' and ') from {TABLE} group by name, version
            having count(*) > 1 limit {_NAMED_MAX}"""  # noqa: S608
        ).fetchall()
    for (ids,) in twins:
        message = f"The rows {ids} of {TABLE} have the same name and version"
        remedy = f"remove all but one of them: {_DESTROY_ROW} ID"
        yield Finding(DAMAGED, message, remedy)
    for name in () if twins else sorted(_NAMES - own):
        kind = "table" if name in TABLES else "index"
        harm = "changes can be missing from the log"
        if name == INDEX:
            harm = "a read can miss the newest version"
        message = f"The {kind} {name} is missing, so that {harm}"
        yield Finding(DAMAGED, message, "restart Datasette, which recreates it")


def _damaged(conn: sqlite3.Connection, entries: list[_Entry]) -> Iterator[Finding]:
    """What SQLite finds wrong with the tables and their indexes, and with their ids."""
    own = _own_names(entries)
    if TABLE not in own:
        return
    for table in sorted(own.intersection(TABLES)):
        # SQLite before 3.33 checks the whole file.
        answer = conn.execute(f"pragma integrity_check({table})").fetchall()[0][0]
        if answer != "ok":
            message = (
                f"The table {TABLE} or its index is damaged, so that a read can miss the "
                f"newest version (SQLite says: {str(answer).splitlines()[-1]})"
            )
            remedy = (
                f"repair it: {_sqlite3(conn, f'reindex {TABLE}')}, and if that does not "
                "help, restore the database from a backup"
            )
            yield Finding(DAMAGED, message, remedy)
            return
    if not schema.is_migrated(conn):
        return  # 0.x could store any version, which the upgrade makes a number
    # The index, which agrees with the table, has all of it.
    rows = conn.execute(
        f"""select id from {TABLE} where typeof(name) <> 'text'
        or typeof(version) <> 'integer' or version not between 1 and {VERSION_MAX - 1}
        limit {_NAMED_MAX}"""  # noqa: S608
    ).fetchall()
    for (row_id,) in rows:
        message = (
            f"Row {row_id} of {TABLE} has no usable name or version, and can hide the "
            "newest value"
        )
        yield Finding(DAMAGED, message, f"remove it: {_DESTROY_ROW} {row_id}")


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
            found = _schema_findings(conn, was_made=schema.was_made(db))
            return [*found, *_damaged(conn, _entries(conn))]
        finally:
            if begins:  # over a damaged page, only this ends the transaction
                conn.execute("rollback")

    _found[db] = findings = await read(db, inspect_secrets_tables)
    return findings


async def current_findings(db: Database) -> list[Finding]:
    """What is wrong now: the schema is looked at, the rest only if it was wrong before.

    Raises as `inspect` does.
    """
    if _found.get(db):
        return await inspect(db)
    was_made = schema.was_made(db)
    return await read(db, lambda conn: _schema_findings(conn, was_made=was_made))


def _schema_findings(conn: sqlite3.Connection, *, was_made: bool) -> list[Finding]:
    entries = _entries(conn)
    return [*_foreign(conn, entries), *_missing(conn, entries, was_made=was_made)]


def require_whole_schema(conn: sqlite3.Connection) -> None:
    """Raises DatabaseUnavailable unless the schema is ours, and all of it is there."""
    _refuse(_schema_findings(conn, was_made=True))


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
        first, more = findings[0], len(findings) - 1
        others = f" ('datasette secrets status' names {more} more)" if more else ""
        raise DatabaseUnavailable(f"{first.message}{others}; {first.remedy}")


async def prepare(db: Database, *, mends: bool = False) -> None:
    """Migrate and check the tables before the first change in the life of this process.

    What was found is looked for again before each change, until it has been dealt with.
    `mends`: the change deals with it. Raises NeedsUpgrade for a table of 0.x, and
    DatabaseUnavailable.
    """
    is_sound = _found.get(db) == []
    if not is_sound:
        await require_own(db)
    await schema.ensure_migrated(db)
    if not is_sound and not mends:
        await require_sound(db)
