"""Tables as datasette-secrets 0.x left them: its schema, its tokens, its way of reading."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from typing import Any

from cryptography.fernet import Fernet

# What 0.1a1 to 0.3a0 create, to the letter. 0.1a0 had one more column, `redacted text`.
SCHEMA = """
create table if not exists datasette_secrets (
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
    last_used_by text
);
"""
COLUMNS = (
    "id, name, note, version, encryption_key_name, created_at, created_by, updated_at, "
    "updated_by, deleted_at, deleted_by, last_used_at, last_used_by"
)


def token(key: str, value: str | bytes) -> bytes:
    """`value` as 0.x encrypted it."""
    utf8 = value.encode() if isinstance(value, str) else value
    return Fernet(key).encrypt(utf8)


def insert(
    conn: sqlite3.Connection, name: Any, version: Any, encrypted: Any, **columns: Any
) -> None:
    """A row as 0.x wrote it; `columns` overrides what it would have written."""
    row = {
        "name": name,
        "note": "",
        "version": version,
        "encrypted": encrypted,
        "encryption_key_name": "default",
        "created_at": "2025-01-02 03:04:05",
        "created_by": "root",
        "updated_at": "2025-01-02 03:04:05",
        "updated_by": "root",
        **columns,
    }
    conn.execute(
        f"insert into datasette_secrets ({', '.join(row)}) "
        f"values ({', '.join(':' + column for column in row)})",
        row,
    )


def write(path: str, rows: Iterable[tuple[Any, ...]] = (), **columns: Any) -> None:
    """Make the table in the file at `path`, with rows of (name, version, encrypted)."""
    conn = sqlite3.connect(path)
    with conn:
        conn.execute(SCHEMA)
        for row in rows:
            insert(conn, *row, **columns)
    conn.close()


def served(conn: sqlite3.Connection, name: str) -> bytes | None:
    """The token that 0.x decrypts for `name`: its own statement."""
    row = conn.execute(
        "select id, encrypted from datasette_secrets "
        "where name = ? order by version desc limit 1",
        (name,),
    ).fetchone()
    return row[1] if row else None
