"""Re-seals what datasette-secrets 0.x stored under the primary master key."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from . import database, envelope, schema, service, store
from .errors import CannotUpgrade, NeedsUpgrade
from .instance import Instance, get_instance
from .rotation import BATCH_SIZE, PASSES_MAX, Problem, Progress, batches

if TYPE_CHECKING:
    from datasette.app import Datasette


@dataclass
class Upgrade:
    """What of 0.x was found, and what became of it."""

    dry_run: bool = False
    #: Name and version of every row of 0.x that holds a value.
    found: list[tuple[str, object]] = field(default_factory=list)
    changed: int = 0
    #: The same rows by id, each with a fingerprint of what it holds.
    offered: dict[int, bytes] = field(default_factory=dict)
    #: What was left as it is.
    problems: list[Problem] = field(default_factory=list)
    clean_up: database.CleanUp | None = None
    #: True once no row of 0.x that holds a value is left.
    complete: bool = False

    @property
    def digest(self) -> str:
        """What was found in 64 hex digits, to tell whether it still is the same."""
        found = hashlib.blake2b(digest_size=32)
        for row_id, fingerprint in sorted(self.offered.items()):
            found.update(row_id.to_bytes(8, "little", signed=True) + fingerprint)
        return found.hexdigest()


async def upgrade(
    datasette: Datasette,
    *,
    only: Mapping[int, bytes] | None = None,
    dry_run: bool = False,
    batch_size: int = BATCH_SIZE,
    vacuum: bool = False,
    actor_id: str | None = None,
    progress: Progress | None = None,
) -> Upgrade:
    """Re-seal what datasette-secrets 0.x stored under the primary master key.

    Every key of the ring is tried, since those rows name none. What opens with none is
    left and named. Names, versions, notes, times, actors and deleted marks stay.
    `only`: what an earlier run has `offered`, and somebody has read; a row that is not in
    it, or holds something else by now, is left. `dry_run`: only say what would open; the
    table is not even migrated. `progress` is told how many of those rows each step has dealt with.

    Raises NotConfigured, DatabaseUnavailable, and MissingExtra where there is something
    to bring in and `cryptography` is not installed.
    """
    instance = get_instance(datasette)
    ring = instance.settings.require_ring()
    if not dry_run:
        await schema.ensure_migrated(instance.db)
    report = Upgrade(dry_run=dry_run)
    found: dict[int, tuple[str, object]] = {}
    for _ in range(PASSES_MAX):
        report.problems = []
        lost: list[store.Row] = []
        async for rows in batches(instance, batch_size):
            old = [row for row in rows if row.is_legacy]
            found.update((row.id, (str(row.name), row.version)) for row in old)
            report.offered.update((row.id, _fingerprint(row)) for row in old)
            unseen = [
                row
                for row in old
                if only is not None and only.get(row.id) != report.offered[row.id]
            ]
            report.problems += map(Problem.unseen, unseen)
            left = {row.id for row in unseen}
            known = [row for row in old if row.id not in left]
            changes = _upgraded(ring, known, report.problems)
            if not dry_run:
                report.changed += await _replace_legacy(instance, ring, changes, lost)
            if progress and old:
                progress(len(old))
        if not lost:
            break
    report.problems += [
        Problem.of(row, NeedsUpgrade(row.name, row.version)) for row in lost
    ]
    report.found = list(found.values())
    if dry_run:
        return report
    report.clean_up = await service.clean_up(instance, vacuum=vacuum)
    report.complete = not report.problems
    if report.changed:
        await service.announce_upgrade(datasette, report.changed, actor_id)
    return report


def _fingerprint(row: store.Row) -> bytes:
    """32 bytes that stand for the row's name and token.

    Not for its version: the migration gives another number to one that is there twice.
    """
    content = repr((row.name, row.encrypted))
    return hashlib.blake2b(content.encode(), digest_size=32).digest()


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
    instance: Instance,
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
    changed = await store.replace_envelopes(instance.db, changes)
    for row in await store.rows_with_ids(instance.db, [each.id for each in changes]):
        if row.is_legacy:
            lost.append(row)
        else:
            envelope.unseal(ring, row.name, row.version, row)
    return changed
