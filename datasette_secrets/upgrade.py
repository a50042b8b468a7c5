"""Re-seals what datasette-secrets 0.x stored under the primary master key.

The start of a server does it once, in the transaction that adds our columns. A row of 0.x
that is found later is bound to no name, so that only the command and the page convert it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from . import envelope, fernet, inspection, schema, service, store
from .changes import Changing, make
from .events import Change, via
from .instance import get_instance
from .rotation import (
    BATCH_SIZE,
    PASSES_MAX,
    Problem,
    Progress,
    Report,
    Rewriting,
    batches,
    rewritten,
)

if TYPE_CHECKING:
    from datasette.app import Datasette
    from datasette.database import Database


@dataclass
class Upgrade(Report):
    """What of 0.x was found, and what became of it."""

    #: Name and version of every row of 0.x that holds a value.
    found: list[tuple[str, object]] = field(default_factory=list)


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

    Every key of the ring is tried, since those rows name none. What none of them decrypts
    is left and named. Names, versions, notes, times, actors and deleted marks stay.
    `dry_run`: only say what could be decrypted; the table is not even migrated.
    `progress` is told how many of those rows each step has dealt with.

    Raises NotConfigured, DatabaseUnavailable, and MissingExtra where there is something
    to upgrade and `cryptography` is not installed.
    """
    instance = get_instance(datasette)
    operation = partial(_upgrade, instance.settings.require_ring())
    report = Upgrade(dry_run)
    found: dict[int, tuple[str, object]] = {}

    async def legacy_rows() -> AsyncIterator[list[store.Row]]:
        async for rows in batches(instance, batch_size, legacy_only=True):
            found.update((row.id, (str(row.name), row.version)) for row in rows)
            yield rows

    await inspection.require_sound(instance.db)
    left: dict[int, Problem] = {}
    work = Rewriting(datasette, actor_id, operation, _change)
    if dry_run:
        async for rows in legacy_rows():
            left |= rewritten(rows, operation)[1]
    else:
        await inspection.prepare(instance.db, migrate=_migrate)
        for _ in range(PASSES_MAX):
            before = work.changed
            left = await work.run(legacy_rows(), progress)
            if work.changed == before:
                break
            progress = None  # the rest is what another process has stored meanwhile
    report.problems = list(left.values())
    report.found = list(found.values())
    if not dry_run:
        await work.finish(report, vacuum)
        report.complete = not report.problems
    return report


async def upgrade_at_start(datasette: Datasette) -> Upgrade | None:
    """Migrate a table of 0.x and re-seal its rows, all in one transaction.

    Returns None where the table is not one of 0.x that holds a value. What no key of the
    ring decrypts is left and named.

    Raises NotConfigured, MissingExtra and DatabaseUnavailable; nothing is then changed.
    """
    instance = get_instance(datasette)
    if not await schema.is_of_zero(instance.db):
        return None
    operation = partial(_upgrade, instance.settings.require_ring())
    fernet.require_fernet()
    report = Upgrade()

    def upgrade_secrets_at_start(changing: Changing) -> None:
        if schema.value_of_zero(changing.conn) is None:  # another server was quicker
            return
        schema.apply_migrations(changing.conn)
        rows = store.legacy_rows(changing.conn)
        report.found = [(str(row.name), row.version) for row in rows]
        resealed, left = rewritten(rows, operation)
        report.problems = list(left.values())
        report.changed = store.replace_envelopes(changing.conn, resealed).written
        if report.changed:
            changing.made.append(_change(report.changed))

    token = via.set("start")
    try:
        await make(
            datasette, instance.db, None, upgrade_secrets_at_start, migrates=True
        )
    finally:
        via.reset(token)
    if report.changed:
        report.clean_up = await service.clean_up(instance)
    report.complete = not report.problems
    return report


async def _migrate(db: Database) -> None:
    if await schema.is_of_zero(db):
        fernet.require_fernet()
    await schema.migrate(db, of_zero=True)


def _change(versions: int) -> Change:
    return Change("upgrade-secrets", detail={"versions": versions})


def _upgrade(ring: envelope.KeyRing, row: store.Row) -> envelope.Sealed | None:
    if not row.is_legacy:  # somebody else upgraded it meanwhile
        return None
    return envelope.upgrade(ring, row.name, row.version, row.encrypted)
