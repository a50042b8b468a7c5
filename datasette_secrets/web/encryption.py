"""The pages that rotate the master key and upgrade what 0.x stored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from datasette.utils.asgi import Request, Response

from .. import health, rotation, store, upgrade
from ..errors import MissingExtra, SecretsError
from ..instance import get_instance
from .answer import (
    LIST,
    as_sentence,
    explain,
    json_response,
    not_allowed,
    page,
    redirect,
    view,
)
from .request import Refused, actor_id, flag, method, read_action, wants_json

if TYPE_CHECKING:
    from datasette.app import Datasette


#: What a page re-wraps or upgrades while somebody waits for it; more is for the shell.
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
    if method(request) == "GET":
        if wants_json(request):
            raise not_allowed("POST")
        return await _rotate_page(datasette, request)
    try:
        sent = await read_action(request, "rotate")
        skip_unopenable = flag(sent, "skip_unopenable")
        if to_rewrap(await rotation.census(datasette)) > VERSIONS_MAX:
            raise _too_many("rotate-key")
        done = await rotation.rotate(
            datasette,
            batch_size=_BATCH_SIZE,
            skip_unopenable=skip_unopenable,
            actor_id=actor_id(request),
        )
        if done.problems and not done.clean_up:
            raise Refused(
                409,
                "Nothing was changed, because not everything can be re-wrapped: "
                + _problems(done.problems),
            )
    except (SecretsError, Refused) as error:
        if wants_json(request):
            raise
        status, sentence = await explain(datasette, error)
        return await _rotate_page(datasette, request, error=sentence, status=status)
    if wants_json(request):
        return json_response(
            {
                "ok": True,
                "primary": done.primary,
                "rewrapped": done.changed,
                **_outcome(done),
            }
        )
    message = f"{health.count_versions(done.changed)} re-wrapped with master key {done.primary}"
    return _done(datasette, request, message, done)


@view("GET", "POST")
async def upgrade_page(datasette: Datasette, request: Request) -> Response:
    if method(request) == "GET":
        if wants_json(request):
            raise not_allowed("POST")
        return await _upgrade_page(datasette, request)
    try:
        sent = await read_action(request, "upgrade")
        if (await rotation.census(datasette)).versions > VERSIONS_MAX:
            raise _too_many("upgrade")
        listed = await upgrade.upgrade(datasette, dry_run=True, batch_size=_BATCH_SIZE)
        shown = sent.first("digest")
        if shown != listed.digest and not (shown is None and wants_json(request)):
            raise Refused(
                409,
                "Nothing was changed, because what 0.x stored here is no longer what the "
                "list showed you: look at it again",
            )
        done = await upgrade.upgrade(
            datasette,
            only=listed.offered,
            batch_size=_BATCH_SIZE,
            actor_id=actor_id(request),
        )
    except (SecretsError, Refused) as error:
        if wants_json(request):
            raise
        status, sentence = await explain(datasette, error)
        return await _upgrade_page(datasette, request, error=sentence, status=status)
    if wants_json(request):
        return json_response({"ok": True, "upgraded": done.changed, **_outcome(done)})
    return _done(
        datasette, request, f"{health.count_versions(done.changed)} upgraded", done
    )


def _too_many(command: str) -> Refused:
    return Refused(
        400,
        f"There are more than {VERSIONS_MAX:,} versions: run "
        f"'datasette secrets {command}' in a shell",
    )


def _problems(problems: list[rotation.Problem]) -> str:
    more = f", and {len(problems) - 3:,} more" if len(problems) > 3 else ""
    return "; ".join(problem.message for problem in problems[:3]) + more


def _outcome(done: rotation.Rotation | upgrade.Upgrade) -> dict[str, Any]:
    return {
        "complete": done.complete,
        "problems": [
            {
                "name": problem.name,
                "version": problem.version,
                "code": problem.code,
                "message": problem.message,
            }
            for problem in done.problems
        ],
        "remains": done.clean_up.remains if done.clean_up else None,
    }


def _done(
    datasette: Datasette,
    request: Request,
    message: str,
    done: rotation.Rotation | upgrade.Upgrade,
) -> Response:
    datasette.add_message(request, message)
    remains = done.clean_up.remains if done.clean_up else None
    for warning in (
        f"{health.count_versions(len(done.problems))} left: {_problems(done.problems)}"
        if done.problems
        else None,
        remains and as_sentence(remains),
    ):
        if warning:
            datasette.add_message(request, warning, datasette.WARNING)
    return redirect(datasette.urls.path(LIST))


async def _rotate_page(
    datasette: Datasette, request: Request, *, error: str = "", status: int = 200
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
    datasette: Datasette, request: Request, *, error: str = "", status: int = 200
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
            "digest": report.digest,
            "lacking": lacking,
            "is_large": is_large,
            "versions_max": VERSIONS_MAX,
            "read_only": health.why_read_only(instance),
            "action_url": datasette.urls.path(f"{LIST}/-/upgrade"),
            "error": error,
        },
        status=status,
    )
