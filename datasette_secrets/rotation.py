"""Re-wraps every version with the primary master key, and checks that all can be decrypted.

A rotation checks that it can unwrap every data key before it changes anything. Then each
batch is one transaction, which reads the rows, checks their new envelopes, writes them and
compares what is stored. It has the write lock from its beginning, so nobody else can change
a row in between. Passes are repeated until no row is left. If a rotation is killed at any
moment, every secret can still be decrypted with the same key ring, and another rotation
finishes the work.
"""

from __future__ import annotations

import shlex
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from . import database, envelope, inspection, schema, service, store
from .changes import Changing, make
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
# With their values, which can be large: other writers wait for a batch.
_BATCH_SIZE_WITH_VALUES = 500
# How many passes a rotation makes, since other servers may write rows meanwhile.
PASSES_MAX = 20

Progress = Callable[[int], None]
#: Returns what replaces the envelope of a row, or None if nothing does. Raises CannotOpen
#: and UnknownMasterKey.
Operation = Callable[[store.Row], "envelope.Sealed | store.Rewrapped | None"]


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
        or_destroy = f", or, if the key is lost, destroy the version: {remedy}"
        if isinstance(error, NeedsUpgrade):
            remedy = "datasette secrets upgrade"
        elif isinstance(error, UnknownMasterKey):
            remedy = f"add key {error.key_id} to encryption-key{or_destroy}"
        elif isinstance(error, CannotUpgrade) and not error.is_too_large:
            remedy = (
                "add its key to encryption-key and run 'datasette secrets upgrade' again"
                f"{or_destroy}"
            )
        return cls(name, version, error.code, str(error), remedy)


def _destroy_command(row: store.Row) -> str:
    """The command that destroys this row, whatever its name and version are."""
    name, version = str(row.name), row.version
    is_usable = name == row.name and name.isprintable() and not name.startswith("-")
    if is_usable and type(version) is int and 0 < version < schema.VERSION_MAX:
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
        is_known = self.counts and all(map(envelope.is_key_id, self.counts))
        if self.legacy or not is_known:
            return []
        return [key_id for key_id in self.ring[1:] if not self.counts.get(key_id)]


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
    #: The row of the log, once there is one.
    log_id: int | None = None


@dataclass
class Rotation(Report):
    """What a rotation found and did."""

    primary: str = ""
    to_change: int = 0
    census: Census = field(default_factory=Census)

    @property
    def current(self) -> int:
        """How many versions need no change, because they use the primary key already."""
        others = self.to_change
        if self.clean_up is not None:  # others may have stored versions meanwhile
            others = self.changed + max(self.census.elsewhere, len(self.problems))
        return max(0, self.census.versions - others)


@dataclass
class Verification:
    """How many versions can be decrypted, and those that cannot."""

    opened: int = 0
    destroyed: int = 0
    problems: list[Problem] = field(default_factory=list)


async def census(datasette: Datasette) -> Census:
    """Count the versions per master key. Raises DatabaseUnavailable."""
    instance = get_instance(datasette)
    ring = tuple(key.id for key in instance.settings.ring or ())
    found = Census(ring[0] if ring else None, ring)
    for key_id, versions, is_legacy in await store.key_counts(instance.db):
        if is_legacy:
            found.legacy += versions
        else:
            found.counts[key_id] = found.counts.get(key_id, 0) + versions
    return found


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

    seen, start = 0, store.Held()

    def unseal(row: store.Row) -> None:
        nonlocal seen
        seen += row.id <= start.highest_id
        envelope.unseal(ring, row.name, row.version, row)

    # Counts again before it reports missing rows, since a server may be writing.
    for _ in range(2):
        found = Verification()
        seen, start = 0, await store.count_held(instance.db)
        async for count, problems in checked(instance, unseal, batch_size):
            found.opened += count - len(problems)
            found.problems += problems
            if progress:
                progress(count)
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
    can_open: Callable[..., object] = envelope.unwrap
    which: dict[str, Any] = {"wraps_only": True, "but_key_id": primary}
    if new_data_keys:
        batch_size = min(batch_size, _BATCH_SIZE_WITH_VALUES)
        can_open, which = envelope.unseal, {}

    def prove(row: store.Row) -> None:
        can_open(ring, row.name, row.version, row)

    def rewrite(row: store.Row) -> envelope.Sealed | store.Rewrapped:
        if new_data_keys:
            return envelope.reseal(ring, row.name, row.version, row, row.version)
        return primary, envelope.rewrap(ring, row.name, row.version, row)

    def change(versions: int) -> Change:
        detail = {"key_id": primary, "versions": versions}
        return Change("rotate-encryption-key", detail=detail)

    await inspection.require_sound(instance.db)
    async for count, problems in checked(instance, prove, batch_size, **which):
        report.problems += problems
        report.to_change += count
        if progress:
            progress(count)
    if dry_run or (report.problems and not skip_unopenable):
        report.census = await census(datasette)
        return report

    left: dict[int, Problem] = {}
    for _ in range(PASSES_MAX):
        before = report.changed
        left |= await rewrite_batches(
            datasette, report, rewrite, batch_size, change, actor_id, progress, **which
        )
        report.census = await census(datasette)
        if report.changed == before or not report.census.elsewhere:
            break
        # Next, the rows that a server with another primary key has stored meanwhile.
        which["but_key_id"], progress = primary, None
    # The rows with problems may have been destroyed or replaced meanwhile.
    again = await store.rows_with_ids(instance.db, list(left))
    report.problems = list(rewritten(again, prove)[1].values())
    made = [change(report.changed)] if report.changed else []
    report.clean_up = await service.finish(datasette, actor_id, *made, vacuum=vacuum)
    await inspection.require_sound(instance.db)
    report.complete = not report.problems and not report.census.elsewhere
    return report


async def checked(
    instance: Instance, operation: Operation, size: int, **which: Any
) -> AsyncIterator[tuple[int, list[Problem]]]:
    """Run `operation` on all rows that hold a value, in the order of their ids.

    `which`: parameters of `rows_from`. Yields, for each batch, the number of its rows and
    the problems.
    """
    row_id = -(2**63)

    def check_secrets(conn: Any) -> tuple[int, list[Problem]]:
        nonlocal row_id
        was_made = schema.was_made(instance.db)
        rows = store.rows_from(conn, row_id, size, was_made=was_made, **which)
        if rows:
            row_id = rows[-1].id + 1
        return len(rows), list(rewritten(rows, operation)[1].values())

    while (batch := await database.read(instance.db, check_secrets))[0]:
        yield batch


async def rewrite_batches(
    datasette: Datasette,
    report: Report,
    operation: Operation,
    size: int,
    describe: Callable[[int], Change],
    actor_id: str | None,
    progress: Progress | None,
    *,
    migrate: Callable[[Any], bool] | None = None,
    **which: Any,
) -> dict[int, Problem]:
    """Write what `operation` makes of the rows, in one transaction for each batch.

    All batches have one row of the log, for which `describe` is given the number of rows
    that were changed. `migrate` runs first in each transaction, and returns False to leave
    the rows as they are. `which`: parameters of `rows_from`. Returns the problems.
    """
    row_id = -(2**63)
    problems: dict[int, Problem] = {}

    def rewrite_secret_versions(changing: Changing) -> int:
        nonlocal row_id
        if migrate and not migrate(changing.conn):
            return 0
        rows = store.rows_from(changing.conn, row_id, size, **which)
        envelopes, found = rewritten(rows, operation)
        problems.update(found)
        wraps_only = which.get("wraps_only", False)
        store.replace_envelopes(changing.conn, envelopes, wraps_only=wraps_only)
        if envelopes:
            report.changed += len(envelopes)
            report.log_id = changing.log(describe(report.changed), report.log_id)
        if rows:
            row_id = rows[-1].id + 1
        return len(rows)

    def has_more_secrets(conn: Any) -> bool:
        return bool(store.rows_from(conn, row_id, 1, **which))

    db, migrates = get_instance(datasette).db, migrate is not None
    while count := await make(
        datasette, db, actor_id, rewrite_secret_versions, migrates=migrates
    ):
        if progress:
            progress(count)
        # A read, since another transaction could fail after all of the work is done.
        if not await database.read(db, has_more_secrets):
            break
    return problems


@database.collector_paused()
def rewritten(
    rows: Iterable[store.Row], operation: Operation
) -> tuple[dict[int, envelope.Sealed | store.Rewrapped], dict[int, Problem]]:
    """The new envelopes of these rows, and the problems of the other rows, by their ids."""
    envelopes = {}
    problems = {}
    for row in rows:
        try:
            sealed = operation(row)
        except (CannotOpen, UnknownMasterKey) as error:
            problems[row.id] = Problem.of(row, error)
        else:
            if sealed is not None:
                envelopes[row.id] = sealed
    return envelopes, problems
