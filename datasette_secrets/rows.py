"""What the store returns and takes: rows, versions, uses and counts."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

from .envelope import Sealed


class Row(NamedTuple):
    """A stored version with its envelope. From a damaged row, any field may be anything.

    Where `encrypted` is larger than that of any value it is its size, an int.
    """

    id: int
    name: str
    version: int
    envelope_version: int | None
    key_id: str
    wrapped_key: bytes | None
    encrypted: bytes | None
    deleted_at: str | None
    last_used_at: str | None

    @property
    def is_destroyed(self) -> bool:
        return self.encrypted is None and self.wrapped_key is None

    @property
    def is_legacy(self) -> bool:
        """Whether datasette-secrets 0.x wrote it."""
        return self.envelope_version is None and self.wrapped_key is None


class Version(NamedTuple):
    """What is known of a version without opening it. Times are UTC, actors are ids."""

    id: int
    name: str
    version: int
    note: str | None
    key_id: str
    created_at: str | None
    created_by: str | None
    updated_at: str | None
    updated_by: str | None
    deleted_at: str | None
    deleted_by: str | None
    last_used_at: str | None
    last_used_by: str | None
    renew_by: str | None
    is_destroyed: bool
    is_legacy: bool

    @property
    def is_deleted(self) -> bool:
        return self.deleted_at is not None


class LastUse(NamedTuple):
    """When a secret was last used and by which actor; `version` is the one that was."""

    at: str | None = None
    by: str | None = None
    version: object = None


class KeyCount(NamedTuple):
    """How many versions name one master key. `is_legacy`: those that 0.x wrote."""

    key_id: str
    versions: int
    is_legacy: bool


class Use(NamedTuple):
    """Actor `actor_id` read row `id` in the UTC second `at`."""

    id: int
    at: str
    actor_id: str | None


class Rows:
    """Rows in the order of their ids, each made into a `Row` when it is looked at.

    Thousands of those alive at once would cost the garbage collector more than the read.
    """

    def __init__(self, rows: list[tuple[Any, ...]]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        return map(_MAKE_ROW, self._rows)

    @property
    def last_id(self) -> int:
        return int(self._rows[-1][0])


_MAKE_ROW = partial(tuple.__new__, Row)  # `Row._make` without its check of the length


#: A row as it was read, and the envelope that is to be written over it.
Replacement = tuple[Row, Sealed]


class Replaced(NamedTuple):
    """How many rows were written, and the ids of those that had changed since."""

    written: int
    changed_meanwhile: list[int]


class Recorded(NamedTuple):
    """What became of some uses: written, or to be tried again, or never to be."""

    written: bool
    try_again: bool = False


class Held(NamedTuple):
    """How many versions hold a value, how many are destroyed, and the highest id."""

    values: int = 0
    destroyed: int = 0
    highest_id: int = 0
