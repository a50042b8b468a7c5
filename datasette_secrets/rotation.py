"""Re-wraps every version with the primary master key, and proves what can be decrypted.

Preflight before anything changes; batches, each one a transaction in which a row changes
only if it still is the one that was read; a read-back of every batch; passes until none
is left; a clean-up. Killed at any instant, every secret can still be decrypted with the
same key ring, and running it again finishes the work.
"""

from __future__ import annotations

import shlex
from array import array
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from . import database, envelope, schema, service, store
from .errors import (
    CannotOpen,
    CannotUpgrade,
    NeedsUpgrade,
    SecretsError,
    UnknownMasterKey,
)
from .instance import Instance, get_instance

if TYPE_CHECKING:
    from datasette.app import Datasette


BATCH_SIZE = 5_000


PASSES_MAX = 20


# The preflight keeps so many new wraps, so that they are not made twice: some 55 MB.
_PREPARED_MAX = 200_000


Progress = Callable[[int], None]


#: What could not be changed, the ids of what was to be, and how many rows were.
_Outcome = tuple[list["Problem"], list[int], int]


@dataclass(frozen=True)
class Problem:
    """A version that does not open, and the command that deals with it."""

    name: str
    version: object
    code: str
    message: str
    remedy: str

    @classmethod
    def of(cls, row: store.Row, error: SecretsError) -> Problem:
        name, version = str(row.name), row.version
        destroy = (
            f"datasette secrets destroy {shlex.quote(name)} "
            f"--version {shlex.quote(str(version))}"
        )
        if isinstance(error, NeedsUpgrade):
            remedy = "datasette secrets upgrade"
        elif isinstance(error, CannotUpgrade):
            remedy = (
                "add its key to encryption-key and run 'datasette secrets upgrade' again, "
                f"or give the version up: {destroy}"
            )
        elif isinstance(error, UnknownMasterKey):
            remedy = (
                f"add key {error.key_id} to encryption-key, or give the version up: "
                f"{destroy}"
            )
        else:
            remedy = destroy
        return cls(name, version, error.code, str(error), remedy)

    @classmethod
    def unseen(cls, row: store.Row) -> Problem:
        """A row of 0.x that was not there, or not as it is now, when the list was made."""
        name, version = str(row.name), row.version
        return cls(
            name,
            version,
            NeedsUpgrade.code,
            f"{name} version {version} was not on the list of what was to be brought in: "
            "find out who put it there since",
            "datasette secrets upgrade",
        )


@dataclass
class Census:
    """How many versions each master key wraps; nothing was opened to know it."""

    primary: str | None
    ring: tuple[str, ...]
    counts: dict[str, int]
    legacy: int

    @property
    def versions(self) -> int:
        """The versions that hold a value, 0.x ones included."""
        return sum(self.counts.values()) + self.legacy

    @property
    def missing(self) -> list[str]:
        """The key ids that rows need and the ring does not have."""
        return [key_id for key_id in self.counts if key_id not in self.ring]

    @property
    def removable(self) -> list[str]:
        """The keys of the ring, the primary aside, that no row here needs now.

        While rows of 0.x are left there is none: those do not say which key they need.
        Neither do damaged ones that name no key.
        """
        if (
            self.legacy
            or not self.versions
            or not all(map(envelope.is_key_id, self.counts))
        ):
            return []
        return [
            key_id
            for key_id in self.ring
            if key_id != self.primary and not self.counts.get(key_id)
        ]


@dataclass
class Rotation:
    """What a rotation found and did."""

    primary: str
    dry_run: bool = False
    to_change: int = 0
    current: int = 0
    changed: int = 0
    problems: list[Problem] = field(default_factory=list)
    census: Census | None = None
    clean_up: database.CleanUp | None = None
    #: False when the preflight stopped it, or versions were left behind.
    complete: bool = False


@dataclass
class Verification:
    """How many versions open, and those that do not."""

    opened: int = 0
    destroyed: int = 0
    problems: list[Problem] = field(default_factory=list)


async def census(datasette: Datasette) -> Census:
    """Count the versions per master key. Raises DatabaseUnavailable."""
    instance = get_instance(datasette)
    ring = instance.settings.ring
    counts: dict[str, int] = {}
    legacy = 0
    for count in await store.key_counts(instance.db):
        if count.is_legacy:
            legacy += count.versions
        else:
            counts[count.key_id] = counts.get(count.key_id, 0) + count.versions
    return Census(
        primary=ring.primary.id if ring else None,
        ring=tuple(key.id for key in ring) if ring else (),
        counts=counts,
        legacy=legacy,
    )


async def verify(
    datasette: Datasette,
    *,
    batch_size: int = BATCH_SIZE,
    progress: Progress | None = None,
) -> Verification:
    """Open every version, its wrap and its value.

    Raises NotConfigured and DatabaseUnavailable.
    """
    instance = get_instance(datasette)
    ring = instance.settings.require_ring()
    found = Verification()
    async for rows in batches(instance, batch_size):
        problems = list(_unopenable(ring, rows, envelope.unseal))
        found.opened += len(rows) - len(problems)
        found.problems += problems
        if progress:
            progress(len(rows))
    stored = await store.count_versions(instance.db)
    found.destroyed = max(0, stored - found.opened - len(found.problems))
    return found


async def rotate(
    datasette: Datasette,
    *,
    dry_run: bool = False,
    new_data_keys: bool = False,
    skip_unopenable: bool = False,
    batch_size: int = BATCH_SIZE,
    vacuum: bool = False,
    actor_id: str | None = None,
    progress: Progress | None = None,
) -> Rotation:
    """Wrap every stored version with the primary master key.

    `new_data_keys`: also re-seal every value under a fresh data key. `skip_unopenable`:
    change the rest when some do not open; without it, nothing is then changed.
    `progress` is told how many rows each step has dealt with: each row twice, unless
    others change them meanwhile.

    Raises NotConfigured and DatabaseUnavailable.
    """
    instance = get_instance(datasette)
    ring = instance.settings.require_ring()
    report = Rotation(primary=ring.primary.id, dry_run=dry_run)
    work = _Work(
        instance, ring, batch_size, new_data_keys, progress or (lambda _: None)
    )

    report.census = await census(datasette)
    await work.preflight(report, skip_unopenable=skip_unopenable)
    report.current = max(0, report.census.versions - report.to_change)
    if dry_run or (report.problems and not skip_unopenable):
        return report

    await schema.ensure_migrated(instance.db)
    finished = await work.write_prepared(report)
    counted = await census(datasette)
    for _ in range(PASSES_MAX):
        if finished and work.count_elsewhere(counted) <= work.stuck:
            break
        finished = await work.change(report)
        counted = await census(datasette)
    elsewhere = work.count_elsewhere(counted)
    report.census = counted
    report.clean_up = await service.clean_up(instance, vacuum=vacuum)
    report.complete = not report.problems and not elsewhere
    if report.changed:
        await service.announce_rotation(
            datasette, ring.primary.id, report.changed, actor_id
        )
    return report


class _Prepared(NamedTuple):
    """The new wraps of a batch, in 216 bytes a row where tuples would take 380."""

    ids: array[int]
    new: bytes
    old: bytes

    @classmethod
    def of(cls, changes: list[store.NewWrap]) -> _Prepared:
        return cls(
            array("q", [row_id for _, _, row_id, _ in changes]),
            b"".join([new for new, _, _, _ in changes]),
            b"".join([old for _, _, _, old in changes]),
        )

    def changes(self, key_id: str) -> list[store.NewWrap]:
        size = envelope.WRAPPED_KEY_BYTES
        return [
            (self.new[at : at + size], key_id, row_id, self.old[at : at + size])
            for at, row_id in zip(range(0, len(self.new), size), self.ids, strict=True)
        ]


@dataclass
class _Work:
    """One rotation's means."""

    instance: Instance
    ring: envelope.KeyRing
    batch_size: int
    new_data_keys: bool
    progress: Progress
    #: What the preflight has made already, to be written unless a row has changed since.
    prepared: list[_Prepared] = field(default_factory=list, repr=False)
    #: How many versions under another key the last pass had to leave.
    stuck: int = 0
    #: Whether those under the primary key are still to be changed, too.
    everything: bool = False
    #: Rows that this run has sealed afresh: once is enough.
    resealed: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.everything = self.new_data_keys

    async def preflight(self, report: Rotation, *, skip_unopenable: bool) -> None:
        """Open every wrap that is to be changed; change nothing."""
        prove = envelope.unseal if self.new_data_keys else envelope.unwrap
        prepare = not (report.dry_run or self.new_data_keys)
        async for rows in self._batches():
            if prepare and report.to_change < _PREPARED_MAX:
                problems, changes = self._rewrapped(rows)
                self.prepared.append(_Prepared.of(changes))
            else:
                problems = list(_unopenable(self.ring, rows, prove))
            report.problems += problems
            report.to_change += len(rows)
            self.progress(len(rows))
            # Nothing is going to be written then.
            prepare &= skip_unopenable or not report.problems

    async def write_prepared(self, report: Rotation) -> bool:
        """The first pass, as far as the preflight has prepared it; False if more is left."""
        for prepared in self.prepared:
            changes = prepared.changes(self.ring.primary.id)
            report.changed += await self._write(changes)
            self.progress(len(changes))
        self.prepared.clear()
        return report.changed == report.to_change

    async def change(self, report: Rotation) -> bool:
        """One pass; False when somebody else changed rows meanwhile: then do another."""
        report.problems = []
        self.stuck = lost = 0
        async for rows in self._batches():
            problems, ids, changed = (
                await self._reseal(rows)
                if self.new_data_keys
                else await self._rewrap(rows)
            )
            report.problems += problems
            report.changed += changed
            lost += len(ids) - changed
            if problems:
                self.stuck += self._count_stuck(rows, ids)
            self.progress(len(rows))
        if not lost and len(report.problems) == self.stuck:
            self.everything = False
        return not lost

    def _rewrapped(self, rows: store.Rows) -> tuple[list[Problem], list[store.NewWrap]]:
        primary_id = self.ring.primary.id
        changes: list[store.NewWrap] = []

        def rewrap(
            ring: envelope.KeyRing, name: str, version: int, row: store.Row
        ) -> None:
            wrapped_key = envelope.rewrap(ring, name, version, row)
            old: Any = row.wrapped_key  # 104 bytes, as `rewrap` has seen
            changes.append((wrapped_key, primary_id, row.id, old))

        return list(_unopenable(self.ring, rows, rewrap)), changes

    async def _rewrap(self, rows: store.Rows) -> _Outcome:
        problems, changes = self._rewrapped(rows)
        changed = await self._write(changes)
        return problems, [row_id for _, _, row_id, _ in changes], changed

    async def _write(self, changes: list[store.NewWrap]) -> int:
        changed = await store.replace_wrapped_keys(self.instance.db, changes)
        await self._read_back([row_id for _, _, row_id, _ in changes])
        return changed

    async def _reseal(self, rows: store.Rows) -> _Outcome:
        changes: list[store.Replacement] = []
        primary_id = self.ring.primary.id

        def reseal(
            ring: envelope.KeyRing, name: str, version: int, row: store.Row
        ) -> None:
            if row.id in self.resealed and row.key_id == primary_id:
                return
            sealed = envelope.reseal(ring, name, version, row, version)
            changes.append(store.Replacement(row, sealed))

        problems = list(_unopenable(self.ring, rows, reseal))
        changed = await store.replace_envelopes(self.instance.db, changes)
        self.resealed |= await self._written(changes, changed)
        return problems, [change.id for change in changes], changed

    async def _written(self, changes: list[store.Replacement], count: int) -> set[int]:
        """The ids of the `count` rows that were written, and not somebody else's."""
        if count == len(changes):
            return {change.id for change in changes}
        stored = {
            row.id: row.wrapped_key
            for row in await store.rows_with_ids(
                self.instance.db, [change.id for change in changes], wraps_only=True
            )
        }
        return {
            change.id
            for change in changes
            if stored.get(change.id) == change.new.wrapped_key
        }

    def count_elsewhere(self, counted: Census) -> int:
        """The versions that the primary key does not wrap."""
        return counted.versions - counted.counts.get(self.ring.primary.id, 0)

    def _count_stuck(self, rows: store.Rows, ids: list[int]) -> int:
        changed = set(ids)
        return sum(
            row.key_id != self.ring.primary.id or row.is_legacy
            for row in rows
            if row.id not in changed
        )

    def _batches(self) -> AsyncIterator[store.Rows]:
        return batches(
            self.instance,
            self.batch_size,
            None if self.everything else self.ring.primary.id,
            wraps_only=not self.new_data_keys,
        )

    async def _read_back(self, ids: list[int]) -> None:
        """Open the wraps that now stand in the file. One destroyed meanwhile is fine."""
        for row in await store.rows_with_ids(self.instance.db, ids, wraps_only=True):
            # Under another key, somebody else has changed it since: the next pass sees it.
            if row.key_id == self.ring.primary.id:
                envelope.unwrap(self.ring, row.name, row.version, row)


async def batches(
    instance: Instance,
    size: int,
    but_key_id: str | None = None,
    *,
    wraps_only: bool = False,
) -> AsyncIterator[store.Rows]:
    await schema.require_own_table(instance.db)
    row_id = -(2**63)
    while row_id < 2**63 and (
        rows := await store.rows_from(
            instance.db, row_id, size, but_key_id=but_key_id, wraps_only=wraps_only
        )
    ):
        yield rows
        row_id = rows.last_id + 1


def _unopenable(
    ring: envelope.KeyRing,
    rows: store.Rows,
    open_row: Callable[[envelope.KeyRing, str, int, store.Row], object],
) -> Iterator[Problem]:
    """Do `open_row` to each row; the rows for which it cannot be done."""
    for row in rows:
        try:
            open_row(ring, row.name, row.version, row)
        except (CannotOpen, UnknownMasterKey) as error:
            if row.is_legacy:
                yield Problem.of(row, NeedsUpgrade(str(row.name), row.version))
            else:
                yield Problem.of(row, error)
