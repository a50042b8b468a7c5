"""Reads and writes one SQLite database: threads, transactions, errors, and its files.

This module knows no tables. Every read runs in Datasette's threads, or on the event loop
through a `Reader`, which never waits for a lock. Every write is one transaction that takes
the write lock first. Errors of SQLite become DatabaseUnavailable with their cause.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from datasette.utils.sqlite import sqlite3 as datasette_sqlite3

from .errors import DatabaseUnavailable, InvalidSecret

if TYPE_CHECKING:
    from datasette.database import Database


VACUUM_MAX_BYTES = 50_000_000
_CHECKPOINT_TIMEOUT_MS = 2_000
# How long a change waits for the write lock. It tries again after a pause that grows.
_LOCK_SECONDS = 5.0
_RETRY_SECONDS = 0.005
_RETRY_MAX_SECONDS = 0.02

T = TypeVar("T")
#: By name, or in order.
Parameters = Mapping[str, object] | Sequence[object]


class CleanUp(NamedTuple):
    """The outcome of a clean-up.

    `remains`: what may be left in the files, or None. `failed`: whether a step failed.
    `litestream`: whether Litestream copies the database, or has done so.
    """

    vacuumed: bool
    log_emptied: bool
    remains: str | None = None
    failed: bool = False
    litestream: bool = False


async def read(db: Database, fn: Callable[[sqlite3.Connection], T]) -> T:
    """Run `fn(conn)` on one of Datasette's connections, in a thread.

    Raises DatabaseUnavailable if the database cannot be read.
    """
    require_same_file(db)
    fn = _restoring_authorizer(db, fn)
    try:
        try:
            return await db.execute_fn(fn)  # type: ignore[no-any-return]
        except sqlite3.OperationalError as error:
            if not str(error).startswith(_WANTS_WRITER) or not db.is_mutable:
                raise
        # Shared-cache memory is locked, or a killed writer left a journal. The write
        # connection waits its turn, and can roll the journal back.
        return await db.execute_write_fn(fn, transaction=False)  # type: ignore[no-any-return]
    except (sqlite3.DatabaseError, UnicodeError) as error:
        raise _explained(error, "read") from None


async def write(db: Database, fn: Callable[[sqlite3.Connection], T]) -> T:
    """Run `fn(conn)` in one transaction that takes the write lock first, on the write thread.

    An error rolls back and is raised here, because Datasette would print it if it were
    raised there. Raises DatabaseUnavailable if the database cannot be written.
    """
    if not db.is_mutable:
        raise DatabaseUnavailable(f"The database {db.path or db.name!r} is immutable")

    @wraps(fn)
    def in_transaction(conn: sqlite3.Connection) -> T | Exception:
        try:
            with transaction(conn):
                return fn(conn)
        except Exception as error:  # it is raised again below, in the caller's frame
            return error.with_traceback(None)

    run = _restoring_authorizer(db, in_transaction)
    try:
        outcome = await run_when_unlocked(db, run, _LOCK_SECONDS)
    except sqlite3.DatabaseError as error:
        outcome = error
    if isinstance(outcome, Exception):
        raise _explained(outcome, "written") from None
    return outcome


async def run_when_unlocked(
    db: Database, fn: Callable[[sqlite3.Connection], T], seconds: float
) -> T:
    """Run `fn(conn)` on the write thread, and again while it returns Locked.

    To wait in `fn` would hold up other writes. Datasette also compares the schema before
    and after `fn`, and takes tables that a VACUUM moved in between for renamed ones.
    """
    ends, pause = None, _RETRY_SECONDS
    while True:
        require_same_file(db)
        outcome: T = await db.execute_write_fn(fn, transaction=False)
        ends = ends or time.monotonic() + seconds
        if not isinstance(outcome, Locked) or time.monotonic() > ends:
            return outcome
        await asyncio.sleep(pause)
        pause = min(2 * pause, _RETRY_MAX_SECONDS)


_files: weakref.WeakKeyDictionary[Database, tuple[int, int]] = (
    weakref.WeakKeyDictionary()
)


def require_same_file(db: Database) -> None:
    """Raise DatabaseUnavailable if the database was closed, or its file replaced or deleted.

    Datasette's connections stay on the old file, and new ones would open the new file.
    """
    # Datasette itself refuses everything when all of it is closed.
    if getattr(db, "_closed", False) and not db.ds._closed:
        raise DatabaseUnavailable(
            f"The database {db.path or db.name!r} was closed; restart Datasette"
        )
    if db.is_memory or not db.path:
        return
    identity = None
    with suppress(OSError):
        found = os.stat(db.path)
        identity = (found.st_dev, found.st_ino)
    if _files.get(db, identity) != identity:
        raise DatabaseUnavailable(
            f"The database {db.path!r} was replaced or deleted; restart Datasette"
        )
    if identity is not None:  # else the first connection is about to create the file
        _files[db] = identity


def create_private(db: Database) -> None:
    """Create the file of a database that does not exist yet, with mode 0600.

    Datasette would create it with the default mode.
    """
    if db.path and not db.is_memory and ":memory:" not in db.path:
        with suppress(OSError):
            path = os.path.realpath(db.path)  # a link may lead to no file yet
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def file_of(conn: sqlite3.Connection) -> str:
    """The path of the database, empty for one in memory."""
    return str(conn.execute("pragma database_list").fetchall()[0][2])


def make_private(conn: sqlite3.Connection) -> None:
    """Give an empty database mode 0600, if others can read it."""
    path = file_of(conn)
    is_empty = not conn.execute("select 1 from sqlite_master limit 1").fetchall()
    for name in (path, f"{path}-wal", f"{path}-shm") if path and is_empty else ():
        with suppress(OSError):
            if os.stat(name).st_mode & 0o007:
                os.chmod(name, 0o600)


@contextmanager
def time_limit(conn: sqlite3.Connection, seconds: float) -> Iterator[None]:
    """Within this context, interrupt a statement of `conn` that runs after `seconds`."""
    ends = time.monotonic() + seconds
    conn.set_progress_handler(lambda: time.monotonic() > ends, 10_000)
    try:
        yield
    finally:
        conn.set_progress_handler(None, 0)


class Locked(sqlite3.OperationalError):
    """Another connection holds the write lock. Nothing was done."""


@contextmanager
def transaction(conn: sqlite3.Connection) -> Iterator[None]:
    """A transaction that takes the write lock first and overwrites what it deletes.

    Raises Locked at once if somebody else has the lock.
    """
    conn.execute("pragma secure_delete = on").fetchall()
    [(timeout,)] = conn.execute("pragma busy_timeout").fetchall()
    conn.execute("pragma busy_timeout = 0").fetchall()
    try:
        conn.execute("begin immediate")
    except sqlite3.OperationalError as error:
        raise Locked(*error.args) if is_locked(error) else error from None
    finally:
        conn.execute(f"pragma busy_timeout = {timeout}").fetchall()
    try:
        yield
        conn.execute("commit")
    except BaseException:
        if conn.in_transaction:
            conn.execute("rollback")
        raise


@contextmanager
def authorizer(
    conn: sqlite3.Connection,
    authorize: Callable[..., int],
    others: Callable[..., int] | None = None,
) -> Iterator[None]:
    """Within this context, SQLite asks `authorize` for each statement of `conn`.

    `others`: the authorizer that `conn` had before. It is asked too, and set again.
    Without it, `_restoring_authorizer` sets what other plugins want.
    """

    def ask_both(*statement: object) -> int:
        answer = authorize(*statement)
        return others(*statement) if others and answer == sqlite3.SQLITE_OK else answer

    conn.set_authorizer(ask_both)
    try:
        yield
    finally:
        conn.set_authorizer(others or _allow)
        if others is None:
            _replaced.add(id(conn))


def _allow(*_: object) -> int:
    """Python 3.10 cannot remove an authorizer."""
    return sqlite3.SQLITE_OK


#: The connections whose authorizer `authorizer` replaced.
_replaced: set[int] = set()


def _restoring_authorizer(
    db: Database, fn: Callable[[sqlite3.Connection], T]
) -> Callable[[sqlite3.Connection], T]:
    """`fn`, after which its connection has the authorizer of other plugins again."""

    @wraps(fn)
    def restoring(conn: sqlite3.Connection) -> T:
        try:
            return fn(conn)
        finally:
            if id(conn) in _replaced:
                with suppress(Exception):  # of a plugin; the next call tries it again
                    conn.set_authorizer(authorizer_of_plugins(db) or _allow)
                    _replaced.discard(id(conn))

    return restoring


class _Recording(datasette_sqlite3.Connection):  # type: ignore[misc]
    """A connection that only keeps the authorizer it is given."""

    authorize: Callable[..., int] | None = None

    def set_authorizer(self, authorizer_callback: Callable[..., int] | None) -> None:
        self.authorize = authorizer_callback


def authorizer_of_plugins(db: Database) -> Callable[..., int] | None:
    """The authorizer that other plugins set on each connection to this database.

    SQLite cannot be asked for it. So they prepare another connection, which is made as
    Datasette makes those that read.
    """
    # Another copy of SQLite in this process would drop the locks that this one holds.
    uri = f"file:{db.path}?{'mode=ro' if db.is_mutable else 'immutable=1'}"
    if db.memory_name:
        uri = f"file:{db.memory_name}?mode=memory&cache=shared"
    elif not db.path:
        uri = "file::memory:"
    conn = datasette_sqlite3.connect(uri, uri=True, factory=_Recording)
    with closing(conn):
        db.ds._prepare_connection(conn, db.name)
        return conn.authorize  # type: ignore[no-any-return]


def tables_out_of_reach(
    conn: sqlite3.Connection,
    tables: Collection[str],
    others: Callable[..., int] | None,
) -> AbstractContextManager[None]:
    """Within this context, no statement of `conn` can touch `tables`.

    `others`: the authorizer that `conn` has.
    """

    def authorize(action: int, first: object, second: object, *_: object) -> int:
        # A table is the first argument of most actions, and the second of those on
        # its indexes and triggers, and of `alter table`.
        named = {str(first).lower(), str(second).lower()}
        return sqlite3.SQLITE_OK if named.isdisjoint(tables) else sqlite3.SQLITE_DENY

    return authorizer(conn, authorize, others)


# SQLite's messages by their first words, since Python 3.10 has no error codes.
_LOCKED = ("database table is locked", "database schema is locked")
_WANTS_WRITER = (*_LOCKED, "attempt to write a readonly database")
_DAMAGED = "database disk image is malformed"
_CAUSES = {
    ("database is locked",): "another process holds its lock: try again when that has "
    "finished",
    _LOCKED: "another connection holds its lock: try again when that has finished",
    (
        "attempt to write a readonly database",
    ): "it is read-only: check the permissions of the file and its folder",
    ("database or disk is full",): "the disk is full: make room and try again",
    (_DAMAGED, "malformed database schema"): "it is damaged: restore it from a backup",
    ("unable to open",): "it cannot be opened: check the path and its permissions",
    ("file is not a database",): "it is not a SQLite database",
}


def is_locked(error: Exception) -> bool:
    """Whether somebody else holds a lock, so that it is worth trying again."""
    return str(error).startswith(("database is locked", *_LOCKED))


def _cause(error: sqlite3.Error) -> str:
    message = str(error)
    for beginnings, cause in _CAUSES.items():
        if message.startswith(beginnings):
            return cause
    return f"SQLite says: {message}"


def _explained(error: Exception, verb: str) -> Exception:
    """The exception to raise for an error of a read or a write."""
    if isinstance(error, UnicodeDecodeError):  # SQLite quotes a damaged schema
        error = sqlite3.DatabaseError(_DAMAGED)
    if isinstance(error, sqlite3.DatabaseError):
        return DatabaseUnavailable(
            f"The database of the secrets cannot be {verb}: {_cause(error)}"
        )
    if isinstance(error, UnicodeEncodeError):
        return InvalidSecret(
            "The name of a secret and the ID of an actor must be valid UTF-8"
        )
    return error


def not_kept() -> DatabaseUnavailable:
    """The error of a change whose rows are not stored as they were written."""
    return DatabaseUnavailable(
        "The database of the secrets does not contain what was written to it. A trigger in "
        "it may undo changes, or another process may change the same rows: run 'datasette "
        "secrets status' and try again"
    )


def is_temporary(db: Database) -> bool:
    """Whether the database is gone when the process ends."""
    return bool(db.is_memory or getattr(db, "is_temp_disk", False))


_TURN_SECONDS = 0.002


class Reader:
    """Runs queries on the event loop, on one connection that is already open.

    That costs less than handing the work to a thread. A query that would have to wait for
    a lock or for another query is left to a thread. A caller in a tight loop yields to the
    event loop every two milliseconds. The connection belongs to Datasette's `Database` and
    is closed with it.
    """

    def __init__(self, db: Database) -> None:
        self.db = db
        self._lock = threading.Lock()
        self._conn: sqlite3.Connection | None = None
        self._turn_ends = 0.0
        self._turning: asyncio.AbstractEventLoop | None = None

    async def select(
        self, sql: str, parameters: Parameters
    ) -> list[tuple[Any, ...]] | None:
        """All rows of a query, or None if it has to run in a thread."""
        if time.perf_counter() > self._turn_ends:
            await self._turn()
        # Memory has no file to open, and only a thread can wait for its locked tables.
        if self.db.is_memory or not self._lock.acquire(blocking=False):
            return None
        try:
            conn = self._conn or self._connect()
            # All rows are fetched: an open cursor would hold the write-ahead log.
            return conn.execute(sql, parameters).fetchall()
        except (sqlite3.Error, UnicodeError):
            # A thread can wait for a lock and read text that is not UTF-8. It also raises
            # the right error.
            return None
        finally:
            self._lock.release()

    async def _turn(self) -> None:
        loop = asyncio.get_running_loop()
        # Another loop may have ended before its turn began.
        if self._turning is not loop:
            require_same_file(self.db)
            self._turning = loop
            loop.call_soon(self._begin_turn)
        await asyncio.sleep(0)

    def _begin_turn(self) -> None:
        self._turning = None
        self._turn_ends = time.perf_counter() + _TURN_SECONDS

    def _connect(self) -> sqlite3.Connection:
        if getattr(self.db, "_closed", False):  # `connect` would open it again
            raise sqlite3.ProgrammingError
        conn: sqlite3.Connection = self.db.connect()
        conn.execute("pragma query_only = on").fetchall()
        conn.execute("pragma busy_timeout = 0").fetchall()
        self._conn = conn
        return conn


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the garbage collector, which scans thousands of live tuples again and again."""
    is_collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_collecting:
            gc.enable()


@contextmanager
def tuple_cursor(conn: sqlite3.Connection) -> Iterator[sqlite3.Cursor]:
    """A cursor that makes tuples of str, at half the cost of Datasette's settings."""
    text_factory = conn.text_factory
    conn.text_factory = str
    cursor = conn.cursor()
    cursor.row_factory = None
    try:
        yield cursor
    finally:
        conn.text_factory = text_factory


async def journal_mode(db: Database) -> str:
    """`wal`, `delete`, … : the administrator's choice. Raises DatabaseUnavailable."""

    def secrets_journal_mode(conn: sqlite3.Connection) -> str:
        return str(conn.execute("pragma journal_mode").fetchall()[0][0])

    return await read(db, secrets_journal_mode)


def _table_that_vacuum_renumbers(conn: sqlite3.Connection) -> str | None:
    """A table whose rows would get other rowids, on which a full-text index may depend.

    VACUUM gives new rowids, from 1, to the rows of a table with neither a primary key nor
    an index. https://sqlite.org/lang_vacuum.html
    """
    # A column may have the name of the rowid, and hide it.
    tables = conn.execute("""
        select cast(name as text), (
            select value from json_each('["rowid", "_rowid_", "oid"]')
            where value not in (select lower(name) from pragma_table_info(one.name))
        ) as rowid_name
        from sqlite_master as one where type = 'table' and rootpage > 0
        and substr(name, 1, 7) <> 'sqlite_' and rowid_name is not null
        and not exists (select 1 from pragma_table_info(one.name) where pk)
        and not exists (select 1 from pragma_index_list(one.name))
    """).fetchall()
    for name, rowid in tables:
        quoted = name.replace('"', '""')
        sql = f'select max({rowid}) > count(*) or min({rowid}) < 1 from "{quoted}"'  # noqa: S608
        if conn.execute(sql).fetchall()[0][0]:
            return str(name)
    return None


async def clean_up(db: Database, *, vacuum: bool) -> CleanUp:
    """Remove deleted and replaced content from the database's files.

    With `vacuum` the file is rewritten. Then the write-ahead log, if there is one, is
    moved into the file and emptied. A failure is returned in `remains` and not raised,
    because the change before it was made all the same.
    """

    def clean_up_secrets(conn: sqlite3.Connection) -> CleanUp:
        remains = []
        log_emptied = False
        try:
            conn.execute("pragma secure_delete = on").fetchall()
            renumbered = _table_that_vacuum_renumbers(conn) if vacuum else None
            if renumbered is not None:
                remains.append(
                    "old ciphertext may remain in the file, which was not rewritten, "
                    "because VACUUM would change the row numbers of the table "
                    f"'{renumbered}', and a full-text index on it would find the wrong "
                    "rows: create an index on that table, and run 'datasette secrets "
                    "rotate-key --vacuum'"
                )
            elif vacuum:
                conn.execute("vacuum")
        except sqlite3.DatabaseError as error:
            remains.append(
                "old ciphertext may remain in the file, which could not be rewritten: "
                f"{_cause(error)}"
            )
        vacuumed = vacuum and not remains
        try:
            # It holds the write lock while it waits for readers. Writers wait 5 seconds.
            conn.execute(f"pragma busy_timeout = {_CHECKPOINT_TIMEOUT_MS}").fetchall()
            [(busy, *_)] = conn.execute("pragma wal_checkpoint(truncate)").fetchall()
            log_emptied = not busy
        except sqlite3.DatabaseError as error:
            remains.append(f"the write-ahead log could not be emptied: {_cause(error)}")
        # Litestream has a folder beside the file, or its tables in it.
        folder, name = os.path.split(db.path or "")
        query = (
            "select 1 from sqlite_master where type = 'table' and "
            "name = '_litestream_seq'"
        )
        return CleanUp(
            vacuumed,
            log_emptied,
            "; ".join(remains) or None,
            failed=bool(remains),
            litestream=os.path.exists(os.path.join(folder, f".{name}-litestream"))
            or bool(conn.execute(query).fetchall()),
        )

    # This uses its own connection, outside of Datasette's write hooks. They mistake a
    # table that VACUUM moved to another page for a renamed one.
    try:
        return await db.execute_isolated_fn(clean_up_secrets)  # type: ignore[no-any-return]
    except sqlite3.DatabaseError as error:
        remains = f"the database's files could not be cleaned up: {_cause(error)}"
        return CleanUp(vacuumed=False, log_emptied=False, remains=remains, failed=True)
