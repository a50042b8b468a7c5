"""What a leak looks like, and where one could be: for test_leaks.py.

A secret is looked for in every spelling in which text or bytes end up in logs: raw,
Base64, hexadecimal, percent-encoded, reversed, and its first ten bytes as Python's repr
and as JSON escapes, which is what is left of a local variable that `rich` cut short.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import quote, quote_plus


def spellings(secret: str | bytes) -> Iterator[tuple[str, bytes]]:
    """Every way to spell `secret`, with the name of that way."""
    raw = secret.encode("utf-8") if isinstance(secret, str) else secret
    yield "raw", raw
    yield "reversed", raw[::-1]
    for skipped in range(3):
        # Base64 of something that contains the secret, at each of three offsets.
        part = raw[skipped : skipped + (len(raw) - skipped) // 3 * 3]
        yield "Base64", base64.b64encode(part)
        yield "Base64 for URLs", base64.urlsafe_b64encode(part)
    yield "hexadecimal", raw.hex().encode()
    yield "upper-case hexadecimal", raw.hex().upper().encode()
    yield "percent-encoded", quote(raw, safe="").encode()
    yield "form-encoded", quote_plus(raw).encode()
    yield "percent-encoded bytes", "".join(f"%{byte:02x}" for byte in raw).encode()
    yield "percent-encoded bytes", "".join(f"%{byte:02X}" for byte in raw).encode()
    yield "repr of its first bytes", repr(raw[:10])[2:-1].encode()
    yield (
        "JSON of its first bytes",
        json.dumps(raw[:10].decode("latin-1"))[1:-1].encode(),
    )
    if isinstance(secret, str):
        yield "reversed text", secret[::-1].encode("utf-8")
        yield "repr of its start", repr(secret[:10])[1:-1].encode()
        yield "ascii of its start", ascii(secret[:10])[1:-1].encode()
        yield "JSON of its start", json.dumps(secret[:10])[1:-1].encode()
        yield "UTF-16", secret.encode("utf-16-le")


class Evidence:
    """All that could be seen, piece by piece."""

    def __init__(self) -> None:
        self._pieces: list[tuple[str, bytes]] = []

    def add(self, where: str, seen: str | bytes) -> None:
        self._pieces.append(
            (where, seen.encode("utf-8", "replace") if isinstance(seen, str) else seen)
        )

    def add_files(self, folder: Path) -> None:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.add(f"file {path.relative_to(folder)}", path.read_bytes())

    def __len__(self) -> int:
        return len(self._pieces)

    @property
    def size(self) -> int:
        return sum(len(seen) for _, seen in self._pieces)

    def search(self, secrets: Iterable[tuple[str, str | bytes]]) -> list[str]:
        """Where each of the secrets was seen, and in which spelling: never the secret."""
        found = set()
        for label, secret in secrets:
            for spelling, needle in set(spellings(secret)):
                for where, seen in self._pieces:
                    if needle in seen:
                        found.add(f"{label}, {spelling}, in {where}")
        return sorted(found)
