"""Write tests/vectors/corpus-v1.json: rows that each have exactly one fault.

    python scripts/make_corpus.py

Every row is made from one intact row by one change, with the independent decoder in
tests/support/decoder.py: nothing of the package takes part. All randomness comes from labels, so
the file is the same every time. Its keys and values protect nothing.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from nacl.secret import Aead, SecretBox  # noqa: E402
from support import decoder  # noqa: E402

TARGET = ROOT / "tests/vectors/corpus-v1.json"
NAME, VERSION, VALUE = "OPENAI_API_KEY", 3, b"sk-corpus-0123456789"

Row = dict[str, Any]


def take(label: str, size: int) -> bytes:
    """`size` bytes that look random and are always the same for a label."""
    return hashlib.shake_256(label.encode()).digest(size)


PRIMARY, OLDER, FOREIGN = (take(f"master key {each}", 32) for each in range(3))
DATA_KEY = take("data key", 32)


def text(key: bytes) -> str:
    return base64.urlsafe_b64encode(key).decode("ascii")


def intact(
    *,
    master_key: bytes = PRIMARY,
    name: str = NAME,
    version: int = VERSION,
    data_key: bytes = DATA_KEY,
    value: bytes = VALUE,
    label: str = "intact",
) -> Row:
    context = decoder.context(name, version)
    return {
        "name": name,
        "version": version,
        "encryption_key_name": decoder.key_id(master_key),
        "wrapped_key": decoder.wrap(
            master_key, context, data_key, take(f"{label} wrap nonce", 24)
        ),
        "encrypted": decoder.seal(
            data_key, context, value, take(f"{label} value nonce", 24)
        ),
        "envelope_version": 1,
    }


def flipped(blob: bytes, bit: int) -> bytes:
    changed = bytearray(blob)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def wrap_of(plain: bytes, master_key: bytes = PRIMARY) -> bytes:
    return bytes(SecretBox(master_key).encrypt(plain, take("odd wrap nonce", 24)))


def value_of(padded: bytes, aad: bytes, data_key: bytes = DATA_KEY) -> bytes:
    return bytes(Aead(data_key).encrypt(padded, aad, take("odd value nonce", 24)))


def fernet(key: bytes, value: bytes) -> bytes:
    """A token as 0.x stored them; https://github.com/fernet/spec."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    iv = take("fernet iv", 16)
    padding = 16 - len(value) % 16
    encryptor = Cipher(algorithms.AES(key[16:]), modes.CBC(iv)).encryptor()
    body = encryptor.update(value + bytes([padding]) * padding) + encryptor.finalize()
    token = b"\x80" + (1_700_000_000).to_bytes(8, "big") + iv + body
    return base64.urlsafe_b64encode(
        token + hmac.digest(key[:16], token, hashlib.sha256)
    )


def faults() -> Iterator[tuple[str, str, Row]]:
    """What is wrong, the code of the error to expect, and what differs from the intact row."""
    row = intact()
    context = decoder.context(NAME, VERSION)
    bad = "cannot-open"

    # Single bits, one in each part of each blob.
    wrap, sealed = row["wrapped_key"], row["encrypted"]
    for column, blob, parts in (
        ("wrapped_key", wrap, {"nonce": 0, "tag": 24, "context": 40, "data key": 72}),
        (
            "encrypted",
            sealed,
            {"nonce": 0, "value": 24, "padding": 100, "tag": len(sealed) - 16},
        ),
    ):
        for part, start in parts.items():
            yield (
                f"{column}: the first bit of its {part} is flipped",
                bad,
                {column: flipped(blob, start * 8)},
            )
        yield (
            f"{column}: its last bit is flipped",
            bad,
            {column: flipped(blob, len(blob) * 8 - 1)},
        )

    # Lengths.
    for column, blob in (("wrapped_key", wrap), ("encrypted", sealed)):
        for fault, changed in (
            ("is empty", b""),
            ("is one byte", blob[:1]),
            ("ends after its nonce", blob[:24]),
            ("ends within its tag", blob[:39]),
            ("lacks its last byte", blob[:-1]),
            ("lacks its first byte", blob[1:]),
            ("has a zero byte more at its end", blob + b"\0"),
            ("has a zero byte more at its start", b"\0" + blob),
            ("stands there twice", blob + blob),
            ("is zeros", bytes(len(blob))),
            ("has its halves swapped", blob[len(blob) // 2 :] + blob[: len(blob) // 2]),
        ):
            yield f"{column}: {fault}", bad, {column: changed}
    yield "encrypted: lacks its last block", bad, {"encrypted": sealed[:40]}
    yield (
        "encrypted: its tag stands before its body",
        bad,
        {"encrypted": sealed[:24] + sealed[-16:] + sealed[24:-16]},
    )

    # Types that the columns can hold all the same.
    for column, blob in (("wrapped_key", wrap), ("encrypted", sealed)):
        for fault, changed in (
            ("is null", None),
            ("is text, its own hexadecimal digits", blob.hex()),
            ("is text, its own Base64", base64.b64encode(blob).decode()),
            ("is an integer", 104),
            ("is a real number", 1.5),
        ):
            yield f"{column}: {fault}", bad, {column: changed}

    # The format.
    for fault, changed in (
        ("is null", None),
        ("is 0", 0),
        ("is 2", 2),
        ("is negative", -1),
        ("is a real number", 1.5),
        ("is text", "one"),
        ("is a blob", b"1"),
    ):
        yield f"envelope_version: {fault}", bad, {"envelope_version": changed}

    # The number of the version.
    for fault, changed in (
        ("is another one", VERSION + 1),
        ("is 0", 0),
        ("is negative", -VERSION),
        ("is the largest integer", 2**63 - 1),
        ("is a real number", 3.5),
        ("is text", "three"),
        ("is a blob", b"3"),
    ):
        yield f"version: {fault}", bad, {"version": changed}

    # The name.
    for fault, changed in (
        ("is another one", "ANTHROPIC_API_KEY"),
        ("is in lower case", NAME.lower()),
        ("has a space at its end", NAME + " "),
    ):
        yield f"name: {fault}", bad, {"name": changed}

    # The key that the row names.
    own = row["encryption_key_name"]
    for fault, code, changed in (
        ("is another key of the ring", bad, decoder.key_id(OLDER)),
        ("is a key outside the ring", "unknown-master-key", decoder.key_id(FOREIGN)),
        ("is empty", bad, ""),
        ("is a digit short", bad, own[:-1]),
        ("has a digit more", bad, own + "0"),
        ("is in upper case", bad, own.upper()),
        ("ends with a newline", bad, own + "\n"),
        ("is what 0.x wrote", bad, "default"),
        ("is a blob", bad, own.encode()),
        ("is not UTF-8", bad, {"text": "ff" * 16}),
    ):
        yield f"encryption_key_name: {fault}", code, {"encryption_key_name": changed}
    yield (
        "the row is intact, under a key outside the ring",
        "unknown-master-key",
        intact(master_key=FOREIGN, label="foreign"),
    )

    # One layer from somewhere else, itself intact.
    for fault, other in (
        ("version 2", {"version": 2}),
        ("another name", {"name": "ANTHROPIC_API_KEY"}),
    ):
        moved = intact(label=fault, **other)
        for column in ("wrapped_key", "encrypted"):
            yield f"{column}: is that of {fault}", bad, {column: moved[column]}
        yield (
            f"both blobs are those of {fault}",
            bad,
            {column: moved[column] for column in ("wrapped_key", "encrypted")},
        )
    again = intact(data_key=take("another data key", 32), label="sealed again")
    for column in ("wrapped_key", "encrypted"):
        yield f"{column}: is that of another sealing", bad, {column: again[column]}
    yield (
        "wrapped_key and encrypted have changed places",
        bad,
        {
            "wrapped_key": sealed,
            "encrypted": wrap,
        },
    )

    # What only a holder of the keys could write.
    other = decoder.context(NAME, VERSION + 1)
    for fault, plain in (
        ("holds the context of another version", other + DATA_KEY),
        ("holds the data key before the context", DATA_KEY + context),
        ("holds no context", DATA_KEY),
        ("holds a context of zeros", bytes(32) + DATA_KEY),
        ("holds a data key that is one byte short", context + DATA_KEY[:-1]),
        ("holds a data key that is one byte long", context + DATA_KEY + b"\0"),
        ("holds another data key", context + take("another data key", 32)),
    ):
        yield f"wrapped_key: {fault}", bad, {"wrapped_key": wrap_of(plain)}
    yield (
        "wrapped_key: was made by another key of the ring",
        bad,
        {"wrapped_key": wrap_of(context + DATA_KEY, OLDER)},
    )
    padded = decoder.pad(VALUE)
    for fault, plain, aad in (
        ("is bound to another version", padded, other),
        ("is bound to nothing", padded, b""),
        ("is bound to the name alone", padded, NAME.encode()),
        ("is not padded", VALUE.ljust(256, b" "), context),
        ("is zeros where its padding must end", bytes(256), context),
        ("is padded to 16 bytes", VALUE + b"\x80" + bytes(11), context),
        ("has a padding longer than a block", padded + bytes(256), context),
        ("has a padding of other bytes", padded[:-1] + b"\1", context),
        ("is not UTF-8", decoder.pad(b"\xff\xfe"), context),
        ("is half a surrogate pair", decoder.pad(b"\xed\xa0\x80"), context),
    ):
        yield f"encrypted: {fault}", bad, {"encrypted": value_of(plain, aad)}
    yield (
        "encrypted: was sealed with the master key",
        bad,
        {"encrypted": value_of(padded, context, PRIMARY)},
    )

    # Rows of 0.x: never opened, whoever made them.
    for fault, token in (
        ("under the primary key", fernet(PRIMARY, VALUE)),
        ("under another key of the ring", fernet(OLDER, VALUE)),
        ("under a key outside the ring", fernet(FOREIGN, VALUE)),
        ("of random bytes", take("no token", 100)),
    ):
        legacy = {
            "encryption_key_name": "default",
            "wrapped_key": None,
            "encrypted": token,
            "envelope_version": None,
        }
        yield f"a row of 0.x, with a token {fault}", "needs-upgrade", legacy
        yield (
            f"format 1 with no wrap, and a token {fault}",
            bad,
            {**legacy, "envelope_version": 1},
        )


def as_json(cell: Any) -> Any:
    """Blobs as {"blob": hex}; text that is no UTF-8 is {"text": hex} already."""
    return {"blob": cell.hex()} if isinstance(cell, bytes) else cell


def corpus() -> dict[str, Any]:
    def written(difference: Row) -> Row:
        row = {**intact(), **difference}
        return {column: as_json(cell) for column, cell in row.items()}

    return {
        "format": 1,
        "note": "Made by scripts/make_corpus.py. A cell is what JSON says; "
        '{"blob": hex} is a blob, and {"text": hex} text of those bytes. Every row of '
        "'faults' differs from 'intact' by the one fault that it names; reading it with "
        "this ring gives the error of that code.",
        "ring": [text(PRIMARY), text(OLDER)],
        "intact": {"row": written({}), "value": VALUE.decode()},
        "faults": [
            {"fault": fault, "error": code, "row": written(difference)}
            for fault, code, difference in faults()
        ],
    }


def as_text() -> str:
    return json.dumps(corpus(), indent=1) + "\n"


if __name__ == "__main__":
    TARGET.write_text(as_text(), encoding="utf-8")
    print(f"{TARGET}: {len(corpus()['faults'])} faults")
