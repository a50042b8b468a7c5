"""Re-seals what datasette-secrets 0.x stored under the primary master key.

The start of a server does it once, in the transaction that adds the new columns. A row of 0.x
that is added later may be an attack, because it is bound to no name. Only the command and
the page convert such a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from . import envelope, fernet, inspection, rotation, schema, service, store
from .changes import announce
from .database import read
from .errors import say
from .events import Change, via
from .instance import get_instance

if TYPE_CHECKING:
    from datasette.app import Datasette


@dataclass
class Upgrade(rotation.Report):
    """The rows of 0.x that were found, and the outcome."""

    #: Name and version of every row of 0.x that holds a value.
    found: list[tuple[str, object]] = field(default_factory=list)


async def upgrade(
    datasette: Datasette,
    *,
    dry_run: bool = False,
    batch_size: int = rotation.BATCH_SIZE,
    vacuum: bool = False,
    actor_id: str | None = None,
    progress: rotation.Progress | None = None,
) -> Upgrade:
    """Re-seal what datasette-secrets 0.x stored under the primary master key.

    Every key of the ring is tried, since those rows have no key ID. A row that no key
    decrypts is left and reported. Names, versions, notes, times, actors and deleted marks
    stay. `dry_run`: only report what can be decrypted; the table is not even migrated.
    `progress` is called with the number of rows of each step.

    Raises NotConfigured, DatabaseUnavailable, and MissingExtra if there is something to
    upgrade and `cryptography` is not installed.
    """
    instance = get_instance(datasette)
    ring = instance.settings.require_ring()
    await inspection.require_sound(instance.db)
    report = Upgrade(dry_run)
    if dry_run:
        reseal = _resealing(ring, report)
        async for _, problems in rotation.checked(
            instance, reseal, batch_size, legacy_only=True
        ):
            report.problems += problems
        return report
    await _convert(datasette, report, actor_id, batch_size, progress)
    made = [_change(report.changed)] if report.changed else []
    report.clean_up = await service.finish(datasette, actor_id, *made, vacuum=vacuum)
    await inspection.require_sound(instance.db)
    return report


async def upgrade_at_start(datasette: Datasette) -> Upgrade | None:
    """Migrate a table of 0.x and re-seal its rows, all in one transaction.

    Returns None if this is not a table of 0.x with a value in it. A row that no key of the
    ring decrypts is left and reported.

    Raises NotConfigured, MissingExtra and DatabaseUnavailable; nothing is then changed.
    """
    instance = get_instance(datasette)
    if await read(instance.db, schema.legacy_value) is None:
        return None
    fernet.require_fernet()
    report = Upgrade()
    token = via.set("start")
    try:
        await _convert(datasette, report, only_first=True)
    finally:
        via.reset(token)
    if report.changed:
        report.clean_up = await service.clean_up(instance)
        change = _change(report.changed)
        try:
            await announce(datasette, None, change)
        except Exception as error:  # of a plugin, which may not have started yet
            say(f"a plugin failed on the event {change.action}: {type(error).__name__}")
    return report


async def _convert(
    datasette: Datasette,
    report: Upgrade,
    actor_id: str | None = None,
    batch_size: int = -1,
    progress: rotation.Progress | None = None,
    *,
    only_first: bool = False,
) -> None:
    """Migrate the table, and re-seal its rows in transactions of `batch_size` rows.

    `only_first`: only if no other server has done so already.
    """

    def migrate(conn: Any) -> bool:
        if only_first and schema.legacy_value(conn) is None:
            return False
        schema.apply_migrations(conn)
        return True

    ring = get_instance(datasette).settings.require_ring()
    reseal = _resealing(ring, report)
    which: dict[str, Any] = {"migrate": migrate, "legacy_only": True}
    problems = await rotation.rewrite_batches(
        datasette, report, reseal, batch_size, _change, actor_id, progress, **which
    )
    report.problems += problems.values()
    report.complete = not report.problems


def _resealing(ring: envelope.KeyRing, report: Upgrade) -> rotation.Operation:
    def reseal(row: store.Row) -> envelope.Sealed:
        report.found.append((str(row.name), row.version))
        return envelope.upgrade(ring, row.name, row.version, row.encrypted)

    return reseal


def _change(versions: int) -> Change:
    return Change("upgrade-secrets", detail={"versions": versions})
