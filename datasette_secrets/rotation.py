"""Re-wraps every version with the primary master key, and checks that all can be decrypted.

A rotation checks that every row can be decrypted before it changes anything. Then each
batch is one transaction. A row is written only if it has not changed since it was read.
Its new envelope is checked before it is written, and compared with the stored bytes before
the commit. Passes are repeated until no row is left. If a rotation is killed at any moment,
every secret can still be decrypted with the same key ring, and another rotation finishes
the work.
"""

from __future__ import annotations

import shlex
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from . import database, envelope, inspection, schema, service, store
from .changes import Changing, announce, make
from .errors import (
    CannotOpen,
    CannotUpgrade,
    NeedsUpgrade,
    SecretsError,
    UnknownMasterKey,
)
from .events import Change
from .instance import Instance, get_instance

if TYPE_CHECKING:
    from datasette.app import Datasette

BATCH_SIZE = 5_000
# How many passes a rotation makes, since other servers may write rows meanwhile, and how
# often it retries a batch in which somebody else has changed a row.
PASSES_MAX = 20

Progress = Callable[[int], None]
#: Returns the new envelope of a row, or None if it needs none. Raises CannotOpen and
#: UnknownMasterKey.
Operation = Callable[[store.Row], "envelope.Sealed | None"]


@dataclass(frozen=True)
class Problem:
    """A problem, and the command that deals with it.

    `name`, `version`: of the version that cannot be decrypted; None for the whole table.
    """

    name: str | None
    version: object
    code: str
    message: str
    remedy: str

    @classmethod
    def of(cls, row: store.Row, error: SecretsError) -> Problem:
        name, version = str(row.name), row.version
        if row.is_legacy and not isinstance(error, CannotUpgrade):
            error = NeedsUpgrade(name, version)
        remedy = _destroy_command(row)
        if isinstance(error, NeedsUpgrade):
            remedy = "datasette secrets upgrade"
        elif isinstance(error, CannotUpgrade) and not error.is_too_large:
            remedy = (
                "add its key to encryption-key and run 'datasette secrets upgrade' again, "
                f"or give the version up: {remedy}"
            )
        elif isinstance(error, UnknownMasterKey):
            remedy = (
                f"add key {error.key_id} to encryption-key, or give the version up: "
                f"{remedy}"
            )
        return cls(name, version, error.code, str(error), remedy)

    @classmethod
    def of_finding(cls, finding: inspection.Finding) -> Problem:
        return cls(None, None, *finding)


def _destroy_command(row: store.Row) -> str:
    """The command that destroys this row, whatever its name and version are."""
    name: object = row.name
    version: object = row.version
    if (
        isinstance(name, str)
        and name.isprintable()
        and not name.startswith("-")
        and type(version) is int
        and 0 < version < schema.VERSION_MAX
    ):
        return f"datasette secrets destroy {shlex.quote(name)} --version {version}"
    return f"datasette secrets destroy-row {row.id}"


@dataclass
class Census:
    """How many versions each master key wraps, counted without decrypting."""

    primary: str | None = None
    ring: tuple[str, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)
    legacy: int = 0

    @property
    def versions(self) -> int:
        """The versions that hold a value, 0.x ones included."""
        return sum(self.counts.values()) + self.legacy

    @property
    def elsewhere(self) -> int:
        """The versions that the primary key does not wrap, 0.x ones included."""
        return self.versions - self.counts.get(self.primary or "", 0)

    @property
    def missing(self) -> list[str]:
        """The key IDs that rows need and the ring does not have."""
        return [key_id for key_id in self.counts if key_id not in self.ring]

    @property
    def removable(self) -> list[str]:
        """The keys of the ring, except the primary key, that no row needs.

        Empty while there are rows without a valid key ID: rows of 0.x, and damaged ones.
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
class Report:
    """What a rotation or an upgrade did."""

    dry_run: bool = False
    changed: int = 0
    #: Why some rows were not changed.
    problems: list[Problem] = field(default_factory=list)
    clean_up: database.CleanUp | None = None
    #: True once nothing is left to change.
    complete: bool = False


@dataclass
class Rotation(Report):
    """What a rotation found and did."""

    primary: str = ""
    to_change: int = 0
    census: Census = field(default_factory=Census)

    @property
    def current(self) -> int:
        """How many versions need no change, because they use the primary key already."""
        return max(0, self.census.versions - self.to_change)


@dataclass
class Verification:
    """How many versions can be decrypted, and those that cannot."""

    opened: int = 0
    destroyed: int = 0
    problems: list[Problem] = field(default_factory=list)


async def census(datasette: Datasette) -> Census:
    """Count the versions per master key. Raises DatabaseUnavailable."""
    instance = get_instance(datasette)
    ring = instance.settings.ring
    counts: dict[str, int] = {}
    legacy = 0
    for key_id, versions, is_legacy in await store.key_counts(instance.db):
        if is_legacy:
            legacy += versions
        else:
            counts[key_id] = counts.get(key_id, 0) + versions
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
    """Decrypt every version, its wrap and its value.

    Every version that was there at the start is counted. Raises NotConfigured and
    DatabaseUnavailable.
    """
    instance = get_instance(datasette)
    ring = instance.settings.require_ring()

    def unseal(row: store.Row) -> None:
        envelope.unseal(ring, row.name, row.version, row)

    # Counts again before it reports missing rows, since a server may be writing.
    for _ in range(2):
        found = Verification()
        start = await store.count_held(instance.db)
        seen = 0
        async for rows in batches(instance, batch_size):
            problems = rewritten(rows, unseal)[1]
            seen += sum(row.id <= start.highest_id for row in rows)
            found.opened += len(rows) - len(problems)
            found.problems += problems.values()
            if progress:
                progress(len(rows))
        progress = None
        left = await store.count_held(instance.db, start.highest_id)
        found.destroyed = left.destroyed
        if left.values <= seen:
            return found
    missed = f"{left.values - seen:,} rows with a value were not found by their ids"
    remedy = "restore the database from a backup"
    found.problems.append(Problem(None, None, "damaged", missed, remedy))
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

    `new_data_keys`: also re-seal every value with a new data key. `skip_unopenable`: if
    some versions cannot be decrypted, re-wrap the others; without it, nothing is changed.
    `progress` is called with the number of rows of each step. Each row counts twice, unless
    others change rows meanwhile.

    Raises NotConfigured and DatabaseUnavailable, also if the check of the tables finds a
    problem before or after the rotation.
    """
    instance = get_instance(datasette)
    ring = instance.settings.require_ring()
    primary = ring.primary.id
    report = Rotation(dry_run, primary=primary)

    def rows_to_change(but_key_id: str | None) -> AsyncIterator[list[store.Row]]:
        return batches(instance, batch_size, but_key_id, wraps_only=not new_data_keys)

    def prove(row: store.Row) -> None:
        can_open = envelope.unseal if new_data_keys else envelope.unwrap
        can_open(ring, row.name, row.version, row)

    def rewrite(row: store.Row) -> envelope.Sealed | None:
        if new_data_keys:
            return envelope.reseal(ring, row.name, row.version, row, row.version)
        if row.key_id == primary and not row.is_legacy:
            return None  # another rotation has re-wrapped it
        wrapped_key = envelope.rewrap(ring, row.name, row.version, row)
        return envelope.Sealed(envelope.ENVELOPE_VERSION, primary, wrapped_key, None)

    def describe(versions: int) -> Change:
        detail = {"key_id": primary, "versions": versions}
        return Change("rotate-encryption-key", detail=detail)

    await inspection.require_sound(instance.db)
    everywhere = None if new_data_keys else primary
    problems: dict[int, Problem] = {}
    async for rows in rows_to_change(everywhere):
        problems |= rewritten(rows, prove)[1]
        report.to_change += len(rows)
        if progress:
            progress(len(rows))
    report.problems = list(problems.values())
    if dry_run or (problems and not skip_unopenable):
        report.census = await census(datasette)
        return report

    await inspection.prepare(instance.db)
    log_id: int | None = None

    async def replace(changes: list[store.Replacement]) -> list[int]:
        """Returns the ids of the rows that somebody else changed after they were read."""

        def replace_secret_envelopes(changing: Changing) -> store.Replaced:
            nonlocal log_id
            replaced = store.replace_envelopes(
                changing.conn, changes, wraps_only=not new_data_keys
            )
            if replaced.written:
                described = describe(report.changed + replaced.written)
                log_id = changing.log(described, log_id)
            return replaced

        replaced = await make(
            datasette, instance.db, actor_id, replace_secret_envelopes
        )
        report.changed += replaced.written
        return replaced.changed_meanwhile

    left: dict[int, Problem] = {}
    passing = rows_to_change(everywhere)
    for _ in range(PASSES_MAX):
        before = report.changed
        async for rows in passing:
            size = len(rows)
            for _ in range(PASSES_MAX):
                changes, found = rewritten(rows, rewrite)
                left |= found
                changed_meanwhile = await replace(changes) if changes else []
                if not changed_meanwhile:
                    break
                rows = await store.rows_with_ids(
                    instance.db, changed_meanwhile, wraps_only=not new_data_keys
                )
            else:
                raise database.not_kept()
            if progress:
                progress(size)
        report.census = await census(datasette)
        if report.changed == before or not report.census.elsewhere:
            break
        # Next, the rows that a server with another primary key has stored meanwhile.
        passing, progress = rows_to_change(primary), None
    # The rows with problems may have been destroyed or replaced meanwhile.
    again = await store.rows_with_ids(instance.db, list(left))
    report.problems = list(rewritten(again, prove)[1].values())
    report.clean_up = await service.clean_up(instance, vacuum=vacuum)
    await inspection.require_sound(instance.db)
    report.complete = not report.problems and not report.census.elsewhere
    if report.changed:
        await announce(datasette, actor_id, describe(report.changed))
    return report


async def batches(
    instance: Instance,
    size: int,
    but_key_id: str | None = None,
    *,
    legacy_only: bool = False,
    wraps_only: bool = False,
) -> AsyncIterator[list[store.Row]]:
    """All rows that hold a value, in the order of their ids; parameters as `rows_from`."""
    row_id = -(2**63)
    while row_id < 2**63 and (
        rows := await store.rows_from(
            instance.db,
            row_id,
            size,
            but_key_id=but_key_id,
            legacy_only=legacy_only,
            wraps_only=wraps_only,
        )
    ):
        yield rows
        row_id = rows[-1].id + 1


@database.collector_paused()
def rewritten(
    rows: Iterable[store.Row], operation: Operation
) -> tuple[list[store.Replacement], dict[int, Problem]]:
    """The new envelopes of these rows, and the problems of the other rows by their ids."""
    changes: list[store.Replacement] = []
    problems = {}
    for row in rows:
        try:
            sealed = operation(row)
        except (CannotOpen, UnknownMasterKey) as error:
            problems[row.id] = Problem.of(row, error)
        else:
            if sealed is not None:
                changes.append((row, sealed))
    return changes, problems
