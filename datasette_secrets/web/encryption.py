"""The pages that rotate the master key and upgrade what 0.x stored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from datasette.utils.asgi import Request, Response

from .. import health, rotation, serialize, store, upgrade
from ..errors import MissingExtra
from ..instance import get_instance
from .answer import LIST, Done, as_sentence, change, not_allowed, page, view
from .request import Body, Refused, actor_id, flag, method, wants_json

if TYPE_CHECKING:
    from datasette.app import Datasette


#: What a page rotates or upgrades while somebody waits for it; more is for the shell.
VERSIONS_MAX = 10_000


#: How many at a time, so that the event loop goes on turning for everybody else.
_BATCH_SIZE = 100


def to_rewrap(census: rotation.Census) -> int:
    return sum(
        versions
        for key_id, versions in census.counts.items()
        if key_id != census.primary
    )


@view("GET", "POST")
async def rotate_page(datasette: Datasette, request: Request) -> Response:
    """`/-/secrets/-/rotate`: re-encrypt the data keys under the primary key."""

    async def show_form(**what: Any) -> Response:
        return await _rotate_page(datasette, request, **what)

    async def perform(sent: Body) -> Done:
        return await _rotate(datasette, request, sent)

    if method(request) == "GET":
        if wants_json(request):
            raise not_allowed("POST")
        return await show_form()
    return await change(datasette, request, ("skip_unopenable",), perform, show_form)


async def _rotate(datasette: Datasette, request: Request, sent: Body) -> Done:
    skip_unopenable = flag(sent, "skip_unopenable")
    if to_rewrap(await rotation.census(datasette)) > VERSIONS_MAX:
        raise _too_many("rotate-key")
    report = await rotation.rotate(
        datasette,
        batch_size=_BATCH_SIZE,
        skip_unopenable=skip_unopenable,
        actor_id=actor_id(request),
    )
    if report.problems and not report.clean_up:
        raise Refused(
            409,
            "Nothing was changed, because some versions cannot be rotated: "
            + _problems(report.problems),
        )
    message = (
        f"{health.count_versions(report.changed)} re-encrypted with master key "
        f"{report.primary}"
    )
    content = {"primary": report.primary, "rewrapped": report.changed}
    return _done(datasette, report, message, content)


@view("GET", "POST")
async def upgrade_page(datasette: Datasette, request: Request) -> Response:
    """`/-/secrets/-/upgrade`: convert what datasette-secrets 0.x stored."""

    async def show_form(**what: Any) -> Response:
        return await _upgrade_page(datasette, request, **what)

    async def perform(sent: Body) -> Done:
        return await _upgrade(datasette, request)

    if method(request) == "GET":
        if wants_json(request):
            raise not_allowed("POST")
        return await show_form()
    return await change(datasette, request, (), perform, show_form)


async def _upgrade(datasette: Datasette, request: Request) -> Done:
    if (await rotation.census(datasette)).versions > VERSIONS_MAX:
        raise _too_many("upgrade")
    report = await upgrade.upgrade(
        datasette,
        batch_size=_BATCH_SIZE,
        actor_id=actor_id(request),
    )
    message = f"{health.count_versions(report.changed)} upgraded"
    return _done(datasette, report, message, {"upgraded": report.changed})


def _too_many(command: str) -> Refused:
    return Refused(
        400,
        f"There are more than {VERSIONS_MAX:,} versions: run "
        f"'datasette secrets {command}' in a shell",
    )


def _problems(problems: list[rotation.Problem]) -> str:
    more = f", and {len(problems) - 3:,} more" if len(problems) > 3 else ""
    return "; ".join(problem.message for problem in problems[:3]) + more


def _done(
    datasette: Datasette,
    report: rotation.Rotation | upgrade.Upgrade,
    message: str,
    content: dict[str, Any],
) -> Done:
    warnings = []
    if report.problems:
        left = health.count_versions(len(report.problems))
        warnings.append(f"{left} left: {_problems(report.problems)}")
    if report.clean_up and report.clean_up.remains:
        warnings.append(as_sentence(report.clean_up.remains))
    content |= serialize.outcome_json(report)
    return Done(content, message, datasette.urls.path(LIST), warnings)


async def _rotate_page(
    datasette: Datasette,
    request: Request,
    *,
    sent: Body | None = None,
    error: str = "",
    status: int = 200,
) -> Response:
    instance = get_instance(datasette)
    primary = instance.settings.require_ring().primary.id
    census = await rotation.census(datasette)
    versions = to_rewrap(census)
    is_large = versions > VERSIONS_MAX
    touched: list[store.Version] = []
    problems: list[rotation.Problem] = []
    if versions and not is_large:
        if not health.why_read_only(instance):
            problems = (
                await rotation.rotate(datasette, dry_run=True, batch_size=_BATCH_SIZE)
            ).problems
        stuck = {(problem.name, problem.version) for problem in problems}
        touched = [
            version
            for version in await store.versions_elsewhere(instance.db, primary)
            if (version.name, version.version) not in stuck
        ]
    return await page(
        datasette,
        request,
        "rotate",
        {
            "primary": primary,
            "keys": health.key_rows(census, instance.settings.sources),
            "legacy": census.legacy,
            "to_rewrap": versions,
            "touched": touched,
            "problems": problems,
            "is_large": is_large,
            "versions_max": VERSIONS_MAX,
            "read_only": health.why_read_only(instance),
            "action_url": datasette.urls.path(f"{LIST}/-/rotate"),
            "upgrade_url": datasette.urls.path(f"{LIST}/-/upgrade"),
            "error": error,
        },
        status=status,
    )


async def _upgrade_page(
    datasette: Datasette,
    request: Request,
    *,
    sent: Body | None = None,
    error: str = "",
    status: int = 200,
) -> Response:
    instance = get_instance(datasette)
    instance.settings.require_ring()
    census = await rotation.census(datasette)
    is_large = census.versions > VERSIONS_MAX
    report = upgrade.Upgrade(dry_run=True)
    lacking = ""
    if census.legacy and not is_large:
        try:
            report = await upgrade.upgrade(
                datasette, dry_run=True, batch_size=_BATCH_SIZE
            )
        except MissingExtra as missing:
            lacking = str(missing)
    return await page(
        datasette,
        request,
        "upgrade",
        {
            "legacy": census.legacy,
            "found": report.found,
            "problems": report.problems,
            "lacking": lacking,
            "is_large": is_large,
            "versions_max": VERSIONS_MAX,
            "read_only": health.why_read_only(instance),
            "action_url": datasette.urls.path(f"{LIST}/-/upgrade"),
            "error": error,
        },
        status=status,
    )
