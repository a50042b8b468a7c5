"""Delete, restore, roll back, destroy and test a secret.

All but the test ask first: `GET` shows what will happen, `POST` does it.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from datasette.utils.asgi import Response

from .. import checks, listing, service
from ..errors import InvalidSecret
from . import present
from .answer import Done, form, page
from .request import Refused, Visit
from .secrets import describe, show_secret

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


def _done(visit: Visit, said: str, /, **content: Any) -> Done:
    return Done(said, visit.secret_url, {"name": visit.name, **content})


async def _mark(act: Callable[..., Awaitable[int]], done: str, visit: Visit) -> Done:
    version = await act(
        visit.datasette,
        visit.name,
        actor_id=visit.actor_id,
        expected_version=visit.sent.number("expected_version"),
    )
    return _done(visit, f"Secret {visit.name} {done}", version=version)


async def _roll_back(visit: Visit) -> Done:
    earlier = visit.sent.number("version")
    if earlier is None:
        raise InvalidSecret("Select a version to roll back to")
    version = await service.roll_back(
        visit.datasette,
        visit.name,
        earlier,
        actor_id=visit.actor_id,
        expected_version=visit.sent.number("expected_version"),
    )
    message = (
        f"Secret {visit.name} rolled back to version {earlier}, as version {version}"
    )
    return _done(visit, message, version=version)


async def _destroy(visit: Visit) -> Done:
    numbers = visit.sent.numbers("versions", "version", as_text=True)
    versions = list(dict.fromkeys(numbers))
    if not versions:
        raise InvalidSecret("Select at least one version")
    destroyed, cleaned = await service.destroy_versions(
        visit.datasette, visit.name, versions, actor_id=visit.actor_id
    )
    done = _done(
        visit,
        f"{present.enumerate_versions(sorted(versions)).capitalize()} of {visit.name} destroyed",
        versions=versions,
        destroyed=destroyed,
        remains=cleaned.remains,
    )
    return done._replace(warnings=[cleaned.remains])


async def _test(visit: Visit) -> Done:
    result = await checks.check_stored(
        visit.datasette, visit.name, actor_id=visit.actor_id
    )
    said = f"{visit.name} was tested. {describe(result)}"
    if result.outcome == "unknown":
        why = f": {result.message}" if result.message else ""
        said = f"{visit.name} could not be tested{why}"
    return _done(visit, said, outcome=result.outcome, message=result.message)


async def _confirm(action: str, visit: Visit) -> Response:
    secret = await visit.secret()
    rows = await listing.history(visit.datasette, visit.name)
    if not rows:
        raise InvalidSecret(f"Nothing is stored for {visit.name}")
    chosen = visit.sent.texts("version") or set(visit.request.args.getlist("version"))
    old_refused = ""
    if action == "destroy":
        try:
            older = await service.older_versions(visit.datasette, visit.name)
        except InvalidSecret as error:
            old_refused = str(error)
        else:
            chosen |= set(map(str, older)) if visit.argument("old") else set()
    earlier = next((row for row in rows if str(row.of.version) in chosen), None)
    can_roll_back = earlier is not None and not earlier.of.is_destroyed
    if action == "rollback" and not can_roll_back and not visit.error:
        raise Refused(
            404, f"{visit.name} has no such version, or its value was destroyed"
        )
    return await page(
        visit,
        action,
        [secret.used, *(row.of for row in rows)],
        action=action,
        secret=secret,
        rows=[row for row in rows if not row.of.is_destroyed],
        newest=rows[0],
        earlier=earlier,
        chosen=chosen,
        old_refused=old_refused,
    )


def _action(
    name: str, perform: Callable[[Visit], Awaitable[Done]], *fields: str
) -> Any:
    show = partial(_confirm, name)
    return form(show, perform, *fields, of_secret=True, only_asks=True)


delete_page = _action(
    "delete", partial(_mark, service.delete_secret, "deleted"), "expected_version"
)
restore_page = _action(
    "restore", partial(_mark, service.restore_secret, "restored"), "expected_version"
)
rollback_page = _action("rollback", _roll_back, "version", "expected_version")
destroy_page = _action("destroy", _destroy, "version", "versions")
check_page = form(show_secret, _test, methods=["POST"], of_secret=True)
