"""A second implementation of the envelope, written from its description alone.

It imports nothing of the package: what both agree on is the format, not a shared mistake.

    person      = b"dsecrets-v1"
    key_id      = hex(BLAKE2b-8(b"key-id", key=master_key, person))
    context     = BLAKE2b-32(u64le(len(name)) || name || u64le(version), person)
    wrapped_key = SecretBox(master_key).encrypt(context || data_key)
    encrypted   = Aead(data_key).encrypt(sodium_pad(value, 256), aad=context)

Everything here takes nonces and data keys from its caller, so that vectors can be made
again byte for byte. That is for tests only.
"""

from __future__ import annotations

import base64
import hashlib
import sqlite3
import struct
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from nacl.exceptions import CryptoError
from nacl.secret import Aead, SecretBox

PERSON = b"dsecrets-v1"
BLOCK = 256


class Refused(Exception):
    """The blobs are not what the description says."""


@dataclass(frozen=True, repr=False)
class Opened:
    """What a row held: its data key (32 bytes) and its value."""

    name: str
    version: int
    data_key: bytes
    value: bytes


def master_key(text: str) -> bytes:
    """The 32 bytes that a configured key spells."""
    return base64.b64decode(text.strip(), altchars=b"-_", validate=True)


def key_id(master_key: bytes) -> str:
    return hashlib.blake2b(
        b"key-id", digest_size=8, key=master_key, person=PERSON
    ).hexdigest()


def context(name: str, version: int) -> bytes:
    utf8 = name.encode("utf-8")
    hashed = hashlib.blake2b(digest_size=32, person=PERSON)
    hashed.update(struct.pack("<Q", len(utf8)))
    hashed.update(utf8)
    hashed.update(struct.pack("<Q", version))
    return hashed.digest()


def pad(value: bytes) -> bytes:
    """ISO/IEC 7816-4: 0x80, then zeros up to a multiple of 256; at least one byte."""
    return value + b"\x80" + b"\0" * (-(len(value) + 1) % BLOCK)


def unpad(padded: bytes) -> bytes:
    value = padded.rstrip(b"\0")
    if (
        not padded
        or len(padded) % BLOCK
        or len(padded) - len(value) >= BLOCK
        or not value.endswith(b"\x80")
    ):
        raise Refused("padding")
    return value[:-1]


def wrap(master_key: bytes, context: bytes, data_key: bytes, nonce: bytes) -> bytes:
    return bytes(SecretBox(master_key).encrypt(context + data_key, nonce))


def unwrap(master_key: bytes, context: bytes, wrapped_key: bytes) -> bytes:
    try:
        plain = SecretBox(master_key).decrypt(wrapped_key)
    except (CryptoError, ValueError):
        raise Refused("wrapped_key") from None
    if len(plain) != 64 or plain[:32] != context:
        raise Refused("context")
    return plain[32:]


def seal(data_key: bytes, context: bytes, value: bytes, nonce: bytes) -> bytes:
    return bytes(Aead(data_key).encrypt(pad(value), context, nonce))


def open_value(data_key: bytes, context: bytes, encrypted: bytes) -> bytes:
    try:
        return unpad(Aead(data_key).decrypt(encrypted, context))
    except (CryptoError, ValueError):
        raise Refused("encrypted") from None


def open_row(
    master_keys: list[bytes], name: str, version: int, row: dict[str, Any]
) -> Opened:
    """Open a row, with the one key that it names."""
    if row["envelope_version"] != 1:
        raise Refused("envelope_version")
    [key] = [key for key in master_keys if key_id(key) == row["encryption_key_name"]]
    bound = context(name, version)
    data_key = unwrap(key, bound, row["wrapped_key"])
    return Opened(
        name, version, data_key, open_value(data_key, bound, row["encrypted"])
    )


def rows(path: str) -> list[dict[str, Any]]:
    """Every row of the table in the database file at `path`, oldest first."""
    with closing(sqlite3.connect(path)) as conn:
        if not conn.execute(
            "select 1 from sqlite_master where name = 'datasette_secrets'"
        ).fetchone():
            return []
        conn.row_factory = sqlite3.Row
        found = conn.execute("select * from datasette_secrets order by id").fetchall()
        return [dict(row) for row in found]


def open_file(path: str, *key_texts: str) -> Iterator[Opened]:
    """Open everything that the database file at `path` holds, oldest first."""
    keys = [master_key(text) for text in key_texts]
    for row in rows(path):
        if row["encrypted"] is not None or row["wrapped_key"] is not None:
            yield open_row(keys, row["name"], row["version"], row)
