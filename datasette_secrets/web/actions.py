"""What is asked again before it is done: delete, restore, roll back, destroy.

`GET` shows what the action will do, `POST` does it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from datasette.utils.asgi import Request, Response

from .. import changes, checks, health, service, store
from ..errors import InvalidSecret
from ..instance import get_instance
from . import present
from .answer import Done, as_sentence, change, not_allowed, page, view
from .request import Body, Refused, actor_id, method, number, secret_name, wants_json
from .secrets import describe, expected, history_rows, require, show_secret

if TYPE_CHECKING:
    from datasette.app import Datasette

    Act = Callable[[Datasette, Request, str, Body], Awaitable[Done]]


@view("GET", "POST")
async def delete_page(datasette: Datasette, request: Request) -> Response:
    """`/-/secrets/NAME/-/delete`"""
    return await _page(datasette, request, "delete", ("expected_version",), _delete)


@view("GET", "POST")
async def restore_page(datasette: Datasette, request: Request) -> Response:
    """`/-/secrets/NAME/-/restore`"""
    return await _page(datasette, request, "restore", ("expected_version",), _restore)


@view("GET", "POST")
async def rollback_page(datasette: Datasette, request: Request) -> Response:
    """`/-/secrets/NAME/-/rollback`"""
    fields = ("version", "expected_version")
    return await _page(datasette, request, "rollback", fields, _roll_back)


@view("GET", "POST")
async def destroy_page(datasette: Datasette, request: Request) -> Response:
    """`/-/secrets/NAME/-/destroy`"""
    fields = ("version", "versions")
    return await _page(datasette, request, "destroy", fields, _destroy)


@view("POST")
async def check_page(datasette: Datasette, request: Request) -> Response:
    """`POST /-/secrets/NAME/-/check`: give the value to the check of its plugin."""
    name = secret_name(request)

    async def show_form(**what: Any) -> Response:
        return await show_secret(datasette, request, name, **what)

    async def perform(sent: Body) -> Done:
        result = await checks.check_stored(datasette, name, actor_id=actor_id(request))
        return _done(
            datasette,
            name,
            f"{name} was tested. {describe(result)}",
            outcome=result.outcome,
            message=result.message,
        )

    await require(datasette, name)
    return await change(datasette, request, (), perform, show_form)


async def _page(
    datasette: Datasette,
    request: Request,
    action: str,
    fields: tuple[str, ...],
    act: Act,
) -> Response:
    name = secret_name(request)

    async def show_form(**what: Any) -> Response:
        return await _confirmation(datasette, request, name, action, **what)

    async def perform(sent: Body) -> Done:
        return await act(datasette, request, name, sent)

    if method(request) == "GET":
        if wants_json(request):
            raise not_allowed("POST")
        return await show_form()
    await require(datasette, name)
    return await change(datasette, request, fields, perform, show_form)


async def _delete(
    datasette: Datasette, request: Request, name: str, sent: Body
) -> Done:
    version = await service.delete_secret(
        datasette,
        name,
        actor_id=actor_id(request),
        expected_version=number(sent, "expected_version"),
    )
    return _done(datasette, name, f"Secret {name} deleted", version=version)


async def _restore(
    datasette: Datasette, request: Request, name: str, sent: Body
) -> Done:
    version = await service.restore_secret(
        datasette,
        name,
        actor_id=actor_id(request),
        expected_version=number(sent, "expected_version"),
    )
    return _done(datasette, name, f"Secret {name} restored", version=version)


async def _roll_back(
    datasette: Datasette, request: Request, name: str, sent: Body
) -> Done:
    earlier = number(sent, "version")
    if earlier is None:
        raise InvalidSecret("Say which version to roll back to")
    version = await service.roll_back(
        datasette,
        name,
        earlier,
        actor_id=actor_id(request),
        expected_version=number(sent, "expected_version"),
    )
    message = f"Secret {name} rolled back to version {earlier}, as version {version}"
    return _done(datasette, name, message, version=version)


async def _destroy(
    datasette: Datasette, request: Request, name: str, sent: Body
) -> Done:
    instance = get_instance(datasette)
    stored = {
        str(each.version): each.version
        for each in await store.history(instance.db, name)
    }
    asked = sent.all("versions") + sent.all("version")
    if not asked:
        raise InvalidSecret("Select at least one version")
    if not all(type(each) in (int, str) and str(each) in stored for each in asked):
        raise InvalidSecret(f"{name} has no such version")
    versions = list(dict.fromkeys(stored[str(each)] for each in asked))
    destroyed, cleaned = await service.destroy_versions(
        datasette, name, versions, actor_id=actor_id(request)
    )
    return _done(
        datasette,
        name,
        f"{present.enumerate_versions(versions).capitalize()} of {name} destroyed",
        warnings=[as_sentence(cleaned.remains)] if cleaned.remains else [],
        versions=versions,
        destroyed=destroyed,
        remains=cleaned.remains,
    )


def _done(
    datasette: Datasette,
    name: str,
    said: str,
    *,
    warnings: list[str] | None = None,
    **content: Any,
) -> Done:
    url = present.secret_url(datasette, name)
    return Done({"name": name, **content}, said, url, warnings or [])


async def _confirmation(
    datasette: Datasette,
    request: Request,
    name: str,
    action: str,
    *,
    sent: Body | None = None,
    error: str = "",
    status: int = 200,
) -> Response:
    """The page that says what an action will do, and does it on a POST."""
    listed = await require(datasette, name)
    instance = get_instance(datasette)
    history = await store.history(instance.db, name)
    if not history:
        raise InvalidSecret(f"Nothing is stored for {name}")
    past = await changes.past(instance.db, name)
    rows = history_rows(instance, history, past)
    asked = sent.all("version") if sent else request.args.getlist("version")
    chosen = {str(version) for version in asked}
    if request.args.get("old"):
        chosen |= {str(row.of.version) for row in rows if not row.is_newest}
    earlier = next((row for row in rows if str(row.of.version) in chosen), None)
    if (
        action == "rollback"
        and not error
        and (earlier is None or earlier.of.is_destroyed)
    ):
        raise Refused(404, f"{name} has no such version to roll back to")
    return await page(
        datasette,
        request,
        action,
        {
            "show": await present.presenter(
                datasette, history, past.destroyed.values()
            ),
            "secret": listed,
            "rows": [row for row in rows if not row.of.is_destroyed],
            "newest": rows[0],
            "earlier": earlier,
            "chosen": chosen,
            "action": action,
            "expected_version": expected(history),
            "missing_configuration": instance.settings.missing,
            "read_only": health.why_read_only(instance),
            "error": error,
        },
        status=status,
    )
