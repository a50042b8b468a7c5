"""The pages that rotate the master key and upgrade what 0.x stored."""

from __future__ import annotations

from typing import Any

from datasette.utils.asgi import Response

from .. import health, rotation, serialize, store, upgrade
from ..errors import MissingExtra
from .answer import Done, as_sentence, form, page
from .request import Refused, Visit

#: A page rotates or upgrades so many versions while somebody waits for it.
VERSIONS_MAX = 10_000

#: So many at a time, so that other requests are answered in between.
_BATCH_SIZE = 100


async def _rotate(visit: Visit) -> Done:
    skip_unopenable = visit.sent.flag("skip_unopenable")
    census = await rotation.census(visit.datasette)
    _refuse_many(census.elsewhere - census.legacy, "rotate-key")
    report = await rotation.rotate(
        visit.datasette,
        batch_size=_BATCH_SIZE,
        skip_unopenable=skip_unopenable,
        actor_id=visit.actor_id,
    )
    if report.problems and not report.clean_up:
        sentence = "Nothing was changed, because some versions cannot be rotated: "
        raise Refused(409, sentence + _problems(report.problems))
    done = f"re-encrypted with master key {report.primary}"
    for remark in health.unneeded_keys(report.census)[:3]:
        done += f". {as_sentence(remark.message)}".rstrip(".")
    content = {"primary": report.primary, "rewrapped": report.changed}
    return _done(visit, report, done, content)


async def _upgrade(visit: Visit) -> Done:
    _refuse_many((await rotation.census(visit.datasette)).versions, "upgrade")
    report = await upgrade.upgrade(
        visit.datasette, batch_size=_BATCH_SIZE, actor_id=visit.actor_id
    )
    return _done(visit, report, "upgraded", {"upgraded": report.changed})


def _refuse_many(versions: int, command: str) -> None:
    if versions > VERSIONS_MAX:
        raise Refused(
            400,
            f"There are more than {VERSIONS_MAX:,} versions. Run 'datasette secrets "
            f"{command}' in a shell instead",
        )


def _problems(problems: list[rotation.Problem]) -> str:
    more = f", and {len(problems) - 3:,} more" if len(problems) > 3 else ""
    return "; ".join(problem.message for problem in problems[:3]) + more


def _done(
    visit: Visit,
    report: rotation.Rotation | upgrade.Upgrade,
    done: str,
    content: dict[str, Any],
) -> Done:
    left = health.count_versions(len(report.problems))
    warnings = [
        f"{left} not changed: {_problems(report.problems)}" if report.problems else "",
        report.clean_up and report.clean_up.remains,
    ]
    message = f"{health.count_versions(report.changed)} {done}"
    content |= serialize.outcome_json(report)
    return Done(message, visit.list_url, content, warnings)


async def _show_rotate(visit: Visit) -> Response:
    instance = visit.instance
    primary = instance.settings.require_ring().primary.id
    census = await rotation.census(visit.datasette)
    to_rewrap = census.elsewhere - census.legacy
    touched: list[store.Version] = []
    problems: list[rotation.Problem] = []
    if 0 < to_rewrap <= VERSIONS_MAX:
        report = await rotation.rotate(
            visit.datasette, dry_run=True, batch_size=_BATCH_SIZE
        )
        problems = report.problems
        stuck = {(problem.name, problem.version) for problem in problems}
        touched = [
            version
            for version in await store.versions_elsewhere(instance.db, primary)
            if (version.name, version.version) not in stuck
        ]
    return await page(
        visit,
        "rotate",
        primary=primary,
        legacy=census.legacy,
        to_rewrap=to_rewrap,
        touched=touched,
        problems=problems,
        versions_max=VERSIONS_MAX,
    )


async def _show_upgrade(visit: Visit) -> Response:
    visit.instance.settings.require_ring()
    census = await rotation.census(visit.datasette)
    report = upgrade.Upgrade(dry_run=True)
    lacking = ""
    if census.legacy and census.versions <= VERSIONS_MAX:
        try:
            report = await upgrade.upgrade(
                visit.datasette, dry_run=True, batch_size=_BATCH_SIZE
            )
        except MissingExtra as missing:
            lacking = str(missing)
    return await page(
        visit,
        "upgrade",
        census=census,
        found=report.found,
        problems=report.problems,
        lacking=lacking,
        versions_max=VERSIONS_MAX,
    )


rotate_page = form(_show_rotate, _rotate, "skip_unopenable", only_asks=True)
upgrade_page = form(_show_upgrade, _upgrade, only_asks=True)
