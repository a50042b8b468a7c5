"""Re-wraps every version with the primary master key, and proves what opens.

Preflight before anything changes; batches, each one a transaction in which a row changes
only if it still is the one that was read; a read-back of every batch; passes until none
is left; a clean-up. Killed at any instant, every secret still opens with the same ring,
and running it again finishes the work.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from . import envelope, service, store
from .errors import (
    CannotOpen,
    CannotUpgrade,
    NeedsUpgrade,
    SecretsError,
    UnknownMasterKey,
)

if TYPE_CHECKING:
    from datasette.app import Datasette

BATCH_SIZE = 2_000
_PASSES_MAX = 20

Progress = Callable[[int], None]


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
        if isinstance(error, NeedsUpgrade):
            remedy = "datasette secrets upgrade"
        elif isinstance(error, CannotUpgrade):
            remedy = (
                "add its key to encryption-key and run 'datasette secrets upgrade' again, "
                "or give the version up: "
                f"datasette secrets destroy {name} --version {version}"
            )
        elif isinstance(error, UnknownMasterKey):
            remedy = (
                f"add key {error.key_id} to encryption-key, or give the version up: "
                f"datasette secrets destroy {name} --version {version}"
            )
        else:
            remedy = f"datasette secrets destroy {name} --version {version}"
        return cls(name, version, error.code, str(error), remedy)


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
        """
        if self.legacy or not self.versions:
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
    clean_up: store.CleanUp | None = None
    #: False when the preflight stopped it, or versions were left behind.
    complete: bool = False


@dataclass
class Verification:
    """How many versions open, and those that do not."""

    opened: int = 0
    destroyed: int = 0
    problems: list[Problem] = field(default_factory=list)


@dataclass
class Upgrade:
    """What of 0.x was found, and what became of it."""

    dry_run: bool = False
    #: Name and version of every row of 0.x that holds a value.
    found: list[tuple[str, object]] = field(default_factory=list)
    changed: int = 0
    #: What was left as it is.
    problems: list[Problem] = field(default_factory=list)
    clean_up: store.CleanUp | None = None
    #: True once no row of 0.x that holds a value is left.
    complete: bool = False


async def census(datasette: Datasette) -> Census:
    """Count the versions per master key. Raises DatabaseUnavailable."""
    place = service.vault(datasette)
    ring = place.settings.ring
    counts: dict[str, int] = {}
    legacy = 0
    for count in await store.key_counts(place.db):
        if count.legacy:
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
    place = service.vault(datasette)
    ring = place.settings.require_ring()
    found = Verification()
    async for rows in _batches(place, batch_size):
        for row in rows:
            problem = _try(row, lambda row: _open_row(ring, row))
            if problem is None:
                found.opened += 1
            else:
                found.problems.append(problem)
        if progress:
            progress(len(rows))
    stored = await store.count_versions(place.db)
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
    `progress` is told how many rows each step has dealt with: each row twice.

    Raises NotConfigured and DatabaseUnavailable.
    """
    place = service.vault(datasette)
    ring = place.settings.require_ring()
    await store.ensure_migrated(place.db)
    report = Rotation(primary=ring.primary.id, dry_run=dry_run)
    work = _Work(place, ring, batch_size, new_data_keys, progress or (lambda _: None))

    await work.preflight(report)
    if dry_run or (report.problems and not skip_unopenable):
        report.census = await census(datasette)
        return report

    report.problems = []
    await work.change(report)
    report.clean_up = await service.clean_up(place, vacuum=vacuum)
    report.census = await census(datasette)
    report.complete = not report.problems
    if report.changed:
        await service.announce_rotation(
            datasette, ring.primary.id, report.changed, actor_id
        )
    return report


async def upgrade(
    datasette: Datasette,
    *,
    dry_run: bool = False,
    batch_size: int = BATCH_SIZE,
    vacuum: bool = False,
    actor_id: str | None = None,
    progress: Progress | None = None,
) -> Upgrade:
    """Re-seal what datasette-secrets 0.x stored under the primary master key.

    Every key of the ring is tried, since those rows name none. What opens with none is
    left and named. Names, versions, notes, times, actors and deleted marks stay.
    `dry_run`: only say what would open; the table is not even migrated.
    `progress` is told how many rows each step has dealt with.

    Raises NotConfigured, DatabaseUnavailable, and MissingExtra where there is something
    to bring in and `cryptography` is not installed.
    """
    place = service.vault(datasette)
    ring = place.settings.require_ring()
    if not dry_run:
        await store.ensure_migrated(place.db)
    report = Upgrade(dry_run=dry_run)
    found: dict[int, tuple[str, object]] = {}
    for _ in range(_PASSES_MAX):
        report.problems = []
        lost: list[store.Row] = []
        async for rows in _batches(place, batch_size):
            old = [row for row in rows if row.is_legacy]
            found.update((row.id, (str(row.name), row.version)) for row in old)
            changes = _upgraded(ring, old, report.problems)
            if not dry_run:
                report.changed += await _replace_legacy(place, ring, changes, lost)
            if progress:
                progress(len(rows))
        if not lost:
            break
    report.problems += [
        Problem.of(row, NeedsUpgrade(row.name, row.version)) for row in lost
    ]
    report.found = list(found.values())
    if dry_run:
        return report
    report.clean_up = await service.clean_up(place, vacuum=vacuum)
    report.complete = not report.problems
    if report.changed:
        await service.announce_upgrade(datasette, report.changed, actor_id)
    return report


def _upgraded(
    ring: envelope.KeyRing, rows: list[store.Row], problems: list[Problem]
) -> list[store.Replacement]:
    changes: list[store.Replacement] = []
    for row in rows:
        try:
            sealed = envelope.upgrade(ring, row.name, row.version, row.encrypted)
        except CannotUpgrade as error:
            problems.append(Problem.of(row, error))
        else:
            changes.append(store.Replacement(row, sealed))
    return changes


async def _replace_legacy(
    place: service.Vault,
    ring: envelope.KeyRing,
    changes: list[store.Replacement],
    lost: list[store.Row],
) -> int:
    """Write the envelopes and open what then stands in the file.

    Returns how many rows were changed. Those that somebody else had changed since they
    were read, and that still are 0.x's, are added to `lost`.
    """
    if not changes:
        return 0
    changed = await store.replace_envelopes(place.db, changes)
    written = {change.old.id for change in changes}
    for row in await store.rows_between(
        place.db, changes[0].old.id, changes[-1].old.id
    ):
        if row.id in written and row.is_legacy:
            lost.append(row)
        elif row.id in written:
            envelope.open(ring, row.name, row.version, row.sealed)
    return changed


@dataclass
class _Work:
    """One rotation's means."""

    place: service.Vault
    ring: envelope.KeyRing
    batch_size: int
    new_data_keys: bool
    progress: Progress

    async def preflight(self, report: Rotation) -> None:
        """Unwrap every wrap that is to be changed; change nothing."""
        counted = await store.key_counts(self.place.db)
        stored = sum(count.versions for count in counted)
        async for rows in self._batches_to_change():
            for row in rows:
                problem = _try(row, self._unwrap)
                report.to_change += 1
                if problem:
                    report.problems.append(problem)
            self.progress(len(rows))
        report.current = stored - report.to_change

    async def change(self, report: Rotation) -> None:
        """Passes, until none is left under another key: a server may still be writing."""
        primary = self.ring.primary.id
        leave_out = None if self.new_data_keys else primary
        for _ in range(_PASSES_MAX):
            report.problems = []
            lost = stuck = 0
            async for rows in _batches(self.place, self.batch_size, leave_out):
                changes = self._prepare(rows, report.problems)
                changed = await self._replace(changes)
                await self._read_back(changes)
                report.changed += changed
                lost += len(changes) - changed
                unchanged = {row.id for row in rows} - {each.old.id for each in changes}
                stuck += sum(
                    row.key_id != primary for row in rows if row.id in unchanged
                )
                self.progress(len(rows))
            if not lost:
                leave_out = primary
                if await self._count_elsewhere() <= stuck:
                    return

    async def _count_elsewhere(self) -> int:
        counts = await store.key_counts(self.place.db)
        return sum(
            count.versions for count in counts if count.key_id != self.ring.primary.id
        )

    def _batches_to_change(self) -> AsyncIterator[list[store.Row]]:
        leave_out = None if self.new_data_keys else self.ring.primary.id
        return _batches(self.place, self.batch_size, leave_out)

    def _prepare(
        self, rows: list[store.Row], problems: list[Problem]
    ) -> list[store.Replacement]:
        change = self._reseal if self.new_data_keys else self._rewrap
        changes: list[store.Replacement] = []
        for row in rows:
            problem = _try(row, lambda row: changes.append(change(row)))
            if problem:
                problems.append(problem)
        return changes

    async def _replace(self, changes: list[store.Replacement]) -> int:
        if not changes:
            return 0
        replace = (
            store.replace_envelopes
            if self.new_data_keys
            else store.replace_wrapped_keys
        )
        return await replace(self.place.db, changes)

    async def _read_back(self, changes: list[store.Replacement]) -> None:
        """Open the wraps that now stand in the file. One destroyed meanwhile is fine."""
        if not changes:
            return
        written = {change.old.id for change in changes}
        for row in await store.rows_between(
            self.place.db, changes[0].old.id, changes[-1].old.id
        ):
            if row.id in written:
                envelope.unwrap(self.ring, row.name, row.version, row.sealed)

    def _unwrap(self, row: store.Row) -> None:
        _refuse_legacy(row)
        if self.new_data_keys:
            _open_row(self.ring, row)
        else:
            envelope.unwrap(self.ring, row.name, row.version, row.sealed)

    def _rewrap(self, row: store.Row) -> store.Replacement:
        _refuse_legacy(row)
        return store.Replacement(
            row, envelope.rewrap(self.ring, row.name, row.version, row.sealed)
        )

    def _reseal(self, row: store.Row) -> store.Replacement:
        _refuse_legacy(row)
        return store.Replacement(
            row,
            envelope.reseal(self.ring, row.name, row.version, row.sealed, row.version),
        )


async def _batches(
    place: service.Vault, size: int, but_key_id: str | None = None
) -> AsyncIterator[list[store.Row]]:
    last = -(2**63)
    while rows := await store.rows_after(place.db, last, size, but_key_id=but_key_id):
        yield rows
        last = rows[-1].id


def _try(row: store.Row, action: Callable[[store.Row], Any]) -> Problem | None:
    try:
        action(row)
    except (CannotOpen, NeedsUpgrade, UnknownMasterKey) as error:
        return Problem.of(row, error)
    return None


def _open_row(ring: envelope.KeyRing, row: store.Row) -> None:
    _refuse_legacy(row)
    envelope.open(ring, row.name, row.version, row.sealed)


def _refuse_legacy(row: store.Row) -> None:
    if row.is_legacy:
        raise NeedsUpgrade(str(row.name), row.version)
