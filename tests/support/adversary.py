"""What somebody who can write to the database can do to its schema and its pages.

Each change takes the path of a database that holds secrets. What the table and its index
were is changed; rows are changed in test_attacks.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

Change = Callable[[str], None]

_TABLE = "datasette_secrets"
_INDEX = "datasette_secrets_name_version"


def sql(*statements: str) -> Change:
    """Run these."""

    def change(path: str) -> None:
        with closing(sqlite3.connect(path, isolation_level=None)) as conn:
            for statement in statements:
                conn.execute(statement)

    return change


def schema(*statements: str) -> Change:
    """Edit `sqlite_master` itself."""
    return sql("pragma writable_schema = on", *statements)


def rebuilt(old: str, new: str, *, suffix: str = "") -> Change:
    """The table with `old` replaced by `new` in its SQL, and the same rows."""

    def change(path: str) -> None:
        with closing(sqlite3.connect(path, isolation_level=None)) as conn:
            [(made,)] = conn.execute(
                "select sql from sqlite_master where name = ?", [_TABLE]
            )
            assert old in made
            made = made.replace(old, new, 1) + suffix
            columns = [
                row[1]
                for row in conn.execute(f"pragma table_info({_TABLE})")
                if f"{row[1]} text as" not in made
            ]
            names = ", ".join(columns)
            conn.execute(f"create table kept as select * from {_TABLE}")
            conn.execute(f"drop table {_TABLE}")
            conn.execute(made)
            conn.execute(f"insert into {_TABLE} ({names}) select {names} from kept")
            conn.execute("drop table kept")
            conn.execute(f"create unique index {_INDEX} on {_TABLE} (name, version)")

    return change


_DO_NOTHING = "begin select 1; end"
_IGNORE = "begin select raise(ignore); end"
_HIDDEN = "update sqlite_master set {} where name = 'planted'"

#: Changes of the schema. Each must be named, whatever a read returns.
SCHEMA: dict[str, Change] = {
    "id desc": rebuilt("id integer primary key", "id integer primary key desc"),
    "without rowid": rebuilt(
        "id integer primary key", "id integer primary key", suffix=" without rowid"
    ),
    "text ids": rebuilt("id integer primary key", "id text primary key"),
    "quoted type": rebuilt("id integer primary key", 'id integer "primary" "key"'),
    "not null on conflict replace": rebuilt(
        "name text not null", "name text not null on conflict replace default 'OTHER'"
    ),
    "unique on conflict ignore": rebuilt(
        "renew_by text", "renew_by text, unique (name) on conflict ignore"
    ),
    "unique on conflict replace": rebuilt(
        "renew_by text", "renew_by text, unique (name) on conflict replace"
    ),
    "generated column": rebuilt("deleted_at text", "deleted_at text as (null) virtual"),
    "collation": rebuilt("name text", "name text collate nocase"),
    "column collation by edit": schema(
        "update sqlite_master set sql = replace(sql, 'name text', "
        f"'name text collate nocase') where name = '{_TABLE}'"
    ),
    "check": rebuilt("note text", "note text check (note is null)"),
    "one more column": sql(f"alter table {_TABLE} add column extra text"),
    "renamed column": sql(f"alter table {_TABLE} rename column note to remark"),
    "before update": sql(f"create trigger planted before update on {_TABLE} {_IGNORE}"),
    "before insert": sql(f"create trigger planted before insert on {_TABLE} {_IGNORE}"),
    "after delete": sql(
        f"create trigger planted after delete on {_TABLE} {_DO_NOTHING}"
    ),
    "quoted name and case": sql(
        f'create trigger planted after update on "{_TABLE.upper()}" {_DO_NOTHING}'
    ),
    "on the log": sql(f"create trigger planted after insert on {_TABLE}_log {_IGNORE}"),
    "on another table": sql(
        "create table other (a)",
        f"create trigger planted after insert on other begin update {_TABLE} "
        "set deleted_at = 'now'; end",
    ),
    "on the catalog": sql(
        "create table if not exists catalog_databases (database_name text primary key)",
        "create trigger planted after insert on catalog_databases "
        f"begin delete from {_TABLE}; end",
    ),
    "trigger of another type": schema(
        f"create trigger planted after update on {_TABLE} {_IGNORE}",
        _HIDDEN.format("type = 'TRIGGER'"),
    ),
    "trigger of a blob of a table": schema(
        f"create trigger planted after update on {_TABLE} {_IGNORE}",
        _HIDDEN.format("tbl_name = cast(tbl_name as blob)"),
    ),
    "trigger of a blob of SQL": schema(
        f"create trigger planted after update on {_TABLE} {_IGNORE}",
        _HIDDEN.format("sql = cast(sql as blob)"),
    ),
    "trigger with null characters": schema(
        f"create trigger planted after update on {_TABLE} {_IGNORE}",
        _HIDDEN.format(
            "type = type || char(0) || 'x', name = name || char(0) || 'x', "
            "tbl_name = tbl_name || char(0) || 'x'"
        ),
    ),
    "trigger on another table with null characters": schema(
        "create table other (a)",
        f"create trigger planted after insert on other begin delete from {_TABLE}; end",
        _HIDDEN.format(
            "type = type || char(0) || 'x', name = name || char(0) || 'x', "
            "tbl_name = tbl_name || char(0) || 'x'"
        ),
    ),
    "view": sql(f"create view planted as select name from {_TABLE}"),
    "table that shows the rows": sql(
        f"create virtual table planted using fts5(name, content={_TABLE})"
    ),
    "trigger that quotes the name as text": sql(
        "create table other (a)",
        f"create trigger planted after insert on other begin update '{_TABLE}' "
        "set deleted_at = 'now'; end",
    ),
    "trigger beside one that cannot run": sql(
        'create table "ö ""ther" (a, b)',
        f'create trigger planted after update of a on "ö ""ther" begin '
        f"delete from {_TABLE}; end",
        f'create trigger broken after update of b on "ö ""ther" begin '
        f"delete from missing where '{_TABLE}'; end",
    ),
    "trigger of the row id": sql(
        "create table other (a)",
        "create trigger planted after update of rowid on other begin "
        f"delete from {_TABLE}; end",
    ),
    "trigger of a view": sql(
        f"create view seen as select 1 as a from [{_TABLE}]",
        "create trigger planted instead of update on seen begin "
        f"update {_TABLE} set deleted_at = 'now'; end",
    ),
    "trigger of a view of nothing": sql(
        "create view seen as select 1 as a",
        "create trigger planted instead of insert on seen begin "
        f"delete from {_TABLE}; end",
    ),
    "view that quotes the name as text": sql(
        f"create view planted as select 1 where 1 in '{_TABLE}'"
    ),
    "view in a list": sql(
        f"create view planted as select 1 from sqlite_master, main.'{_TABLE}'"
    ),
    "view with a clause": sql(
        f"create view planted as with z as (select encrypted from {_TABLE}) "
        "select * from z"
    ),
    "view with a recursive clause": sql(
        "create view planted as with recursive z (a) as "
        f"(select name from {_TABLE} union select a from z) select * from z"
    ),
    "trigger with a clause": sql(
        "create table other (a)",
        "create trigger planted after insert on other begin insert into other "
        f"with z as (select wrapped_key from {_TABLE}) select * from z; end",
    ),
    "trigger with a clause in its condition": sql(
        "create table other (a)",
        "create trigger planted after insert on other when (with z as "
        f"(select count(*) as a from {_TABLE}) select a from z) {_DO_NOTHING}",
    ),
    "table of a blob of a type": schema(
        f"update sqlite_master set type = cast(type as blob) where name = '{_TABLE}'"
    ),
    "table with null characters": schema(
        f"update sqlite_master set type = type || char(0) where name = '{_TABLE}'"
    ),
    "partial index": sql(
        f"drop index {_INDEX}",
        f"create unique index {_INDEX} on {_TABLE} (name, version) where version < 2",
    ),
    "expression index": sql(
        f"drop index {_INDEX}",
        f"create unique index {_INDEX} on {_TABLE} (name, -version)",
    ),
    "index with a collation": sql(
        f"drop index {_INDEX}",
        f"create unique index {_INDEX} on {_TABLE} (name collate nocase, version)",
    ),
    "one more index": sql(
        f"create index planted on {_TABLE} (name) where deleted_at is null"
    ),
    "index made partial by edit": schema(
        f"update sqlite_master set sql = sql || ' where 0' where name = '{_INDEX}'"
    ),
}

#: Objects of somebody else that only look like ours, or refer to them. None is named.
UNRELATED: dict[str, Change] = {
    "longer name": sql(
        f"create table my_{_TABLE}_notes (a)",
        f"create index {_TABLE}_notes on my_{_TABLE}_notes (a)",
        f"create view {_TABLE}_view as select * from my_{_TABLE}_notes",
        f"create trigger {_TABLE}_trigger after insert on my_{_TABLE}_notes begin "
        "select 'on datasette_secrets'; end",
    ),
    "comment": sql(f"create table other (a) /* not {_TABLE} */"),
    "column": sql(f"create table other ({_TABLE} text default '{_TABLE}')"),
    "partial index": sql(
        "create table other (a)",
        f"create unique index planted on other (a) where a <> '{_TABLE}'",
    ),
    "text in a view": sql(
        f"create view planted as select '{_TABLE}' as {_TABLE}, (1, '{_TABLE}') in "
        f"(values (2, '{_TABLE}')) where 'a' is distinct from '{_TABLE}'"
        if sqlite3.sqlite_version_info >= (3, 39)
        else f"create view planted as select '{_TABLE}' as {_TABLE}"
    ),
    "name within a view": sql(
        f"create view planted as with {_TABLE} as (select 1) select * from {_TABLE}"
    ),
    "view of what is not there": sql(
        f"create view planted as select '{_TABLE}' from missing"
    ),
    "text in a trigger": sql(
        "create table other (a, b)",
        "create trigger planted after update on other "
        f"when new.a <> '{_TABLE}' begin insert into other values ('{_TABLE}', 1); end",
    ),
    "column of a full-text index": sql(
        f"create virtual table planted using fts5({_TABLE}, content)"
    ),
    "foreign key": sql(f"create table other (id references {_TABLE} (id))"),
}

#: A view or a table of somebody else under the name of ours, before ours is made.
IN_ITS_PLACE: dict[str, Change] = {
    "view": sql("create table t (a)", f"create view {_TABLE} as select * from t"),
    "endless view": sql(
        f"create view {_TABLE} as with recursive e(n) as "
        "(select 1 union all select n + 1 from e) select n as id, n as name from e"
    ),
    "table": sql(f"create table {_TABLE} (name text, value text)"),
    "renamed table": sql(
        "create table t (id integer primary key, name text unique on conflict ignore)",
        f"alter table t rename to {_TABLE}",
    ),
}


def pages(path: str) -> dict[str, int]:
    """The byte at which the root page of the table, of its index and the schema begin."""
    with closing(sqlite3.connect(path)) as conn:
        [(size,)] = conn.execute("pragma page_size")
        found = dict(
            conn.execute(
                "select name, rootpage from sqlite_master where name in (?, ?)",
                [_TABLE, _INDEX],
            ).fetchall()
        )
    return {
        "schema": 100,
        "index": (found[_INDEX] - 1) * size,
        "end of index": found[_INDEX] * size,
    }


def flips(path: str, begin: int, end: int, step: int) -> Iterator[None]:
    """Flip one bit after another of the bytes from `begin` to `end`, each put back."""
    file = Path(path)
    content = file.read_bytes()
    for bit in range(begin * 8, end * 8, step):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        yield
    file.write_bytes(content)


def remedies(said: str) -> list[str]:
    """The SQL that sentences say to run with the sqlite3 program."""
    return re.findall(r": sqlite3 \S+ '([^']+)'", said)
