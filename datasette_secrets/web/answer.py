"""What all pages have in common: permission, errors, headers, HTML or JSON.

Only actors with the permission `manage-secrets` get past `view`. It lets no exception out,
because with `rich` installed Datasette prints the locals of every frame of an exception.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from datasette.utils import await_me_maybe
from datasette.utils.asgi import Request, Response

from .. import database, health, service
from ..errors import (
    CannotOpen,
    DatabaseUnavailable,
    NeedsUpgrade,
    SecretsError,
    UnknownMasterKey,
    VersionConflict,
    say,
)
from ..events import via
from . import present
from .request import Refused, Visit, read

if TYPE_CHECKING:
    from datasette.app import Datasette

    View = Callable[[Datasette, Request], Awaitable[Response]]
    Show = Callable[[Visit], Awaitable[Response]]
    Perform = Callable[[Visit], Awaitable["Done"]]


_CONFLICTS = (VersionConflict, NeedsUpgrade, UnknownMasterKey, CannotOpen)

_HEADINGS = {404: "Not found", 500: "Something went wrong", 503: "Not available"}


class Done(NamedTuple):
    """What a change did. A browser gets `message` at `url`, a program `content`.

    `warnings`: sentences without a full stop. Empty ones are left out.
    """

    message: str
    url: str
    content: dict[str, Any]
    warnings: Sequence[str | None] = ()


async def is_allowed(datasette: Datasette, actor: dict[str, Any] | None) -> bool:
    """Whether this actor may manage secrets."""
    return bool(await datasette.allowed(action="manage-secrets", actor=actor))


def view(show: Show, *methods: str) -> View:
    """A view for these methods that checks the permission and lets no exception out."""

    async def guarded(datasette: Datasette, request: Request) -> Response:
        visit = Visit(datasette, request)
        try:
            if not await is_allowed(datasette, request.actor):
                response = await _forbidden(visit)
            elif visit.method not in methods:
                raise not_allowed(*methods)
            else:
                response = await show(visit)
        except Exception as error:  # see the top of this module
            response = await _error(visit, error)
        for name in list(response.headers):
            if name.lower() == "cache-control":
                del response.headers[name]
        response.headers |= {"Cache-Control": "no-store", "X-Frame-Options": "DENY"}
        return response

    return guarded


def form(
    show: Show,
    perform: Perform,
    *fields: str,
    methods: Sequence[str] = ("GET", "POST"),
    of_secret: bool = False,
    only_asks: bool = False,
) -> View:
    """A view that shows a form on `GET`, and makes the change of `perform` on `POST`.

    If the change is refused, a browser gets the form again. `fields`: what a JSON object
    can have. `of_secret`: the secret must exist. `only_asks`: a program that gets the form
    is told to post instead.
    """

    async def change(visit: Visit) -> Done:
        token = via.set("api" if visit.wants_json else "page")
        try:
            return await perform(visit)
        finally:
            via.reset(token)

    async def respond(visit: Visit) -> Response:
        if visit.method == "GET":
            if visit.wants_json and only_asks:
                raise not_allowed("POST")
            return await show(visit)
        if of_secret:
            await visit.secret()
        try:
            visit.sent = await read(visit, *fields)
            done = await change(visit)
        except (SecretsError, Refused) as error:
            if visit.wants_json:
                raise
            visit.status, visit.error = await _explain(visit, error)
            try:
                return await show(visit)
            except Refused:  # the secret whose page would show it does not exist
                raise error from None
        if visit.wants_json:
            return json_response(done.content)
        visit.datasette.add_message(visit.request, done.message)
        for warning in map(as_sentence, filter(None, done.warnings)):
            visit.datasette.add_message(visit.request, warning, visit.datasette.WARNING)
        return Response.redirect(done.url)  # type: ignore[no-any-return]

    return view(respond, *methods)


async def _forbidden(visit: Visit) -> Response:
    """A refusal. A browser gets that of plugins, which may show a page to sign in."""
    from datasette.plugins import pm

    message = "Permission denied: this needs manage-secrets"
    if not visit.wants_json:
        if not visit.request.actor:
            message += (
                ". You are not signed in. Sign in as an actor who has this "
                "permission, or start Datasette with --root and open the link that it "
                "prints"
            )
        for answer in pm.hook.forbidden(
            datasette=visit.datasette, request=visit.request, message=message
        ):
            response: Response | None = await await_me_maybe(answer)
            if response is not None:
                return response
    return Response.error(message, 403)  # type: ignore[no-any-return]


async def _error(visit: Visit, error: Exception) -> Response:
    visit.status, visit.error = await _explain(visit, error)
    headers = getattr(error, "headers", None) or {}
    if visit.wants_json:
        error_json = Response.error(visit.error, visit.status, headers=headers)
        return error_json  # type: ignore[no-any-return]
    heading = _HEADINGS.get(visit.status, "Not done")
    try:
        response = await page(visit, "error", heading=heading)
    except Exception as second:  # see the top of this module
        _report(second)
        response = Response.text(visit.error, status=visit.status)
    response.headers.update(headers)
    return response


async def _explain(visit: Visit, error: Exception) -> tuple[int, str]:
    """The status and the sentence for an error. An unexpected one is not shown."""
    if isinstance(error, Refused):
        return error.status, str(error)
    if isinstance(error, VersionConflict) and error.updated_at:
        return 409, await _explain_conflict(visit, error)
    if isinstance(error, DatabaseUnavailable):
        return 503, str(error)
    if isinstance(error, SecretsError):
        return 409 if isinstance(error, _CONFLICTS) else 400, str(error)
    _report(error)
    return 500, "Something went wrong. See the server's log"


async def _explain_conflict(visit: Visit, error: VersionConflict) -> str:
    """Who was first, and when."""
    by = error.updated_by
    who = await present.actor_names(visit.datasette, {by} if by else set())
    done, edited = f"saved version {error.actual}", f"version {error.expected}"
    if error.expected == error.actual:
        done, edited = "changed the note or the date", "it"
    elif not error.expected:
        edited = "a new secret"
    then = "then try again"
    if visit.sent.is_form and visit.sent.has_value:  # the form comes back without it
        then = "enter the value again, and save"
    return (
        f"Nothing was changed: {who.get(by or '', by or 'somebody')} {done} of {error.name} at "
        f"{error.updated_at} UTC while you were editing {edited}. Review it, {then}"
    )


def _report(error: Exception) -> None:
    say(f"unexpected {type(error).__name__} while answering a request")


async def page(
    visit: Visit, template: str, people: Iterable[object] = (), **context: Any
) -> Response:
    """A page. `?_context=1` can show its context, so that never has a value.

    `people`: versions, last uses and rows of the log that name people.
    """
    instance = visit.instance
    html = await visit.datasette.render_template(
        f"datasette_secrets/{template}.html",
        {
            "list_url": visit.list_url,
            "show": await present.presenter(visit, people),
            "error": visit.error,
            "missing_configuration": instance.settings.missing,
            "is_temporary": database.is_temporary(instance.db),
            "read_only": health.why_read_only(instance),
            "name_max": service.NAME_MAX_CHARACTERS,
            "note_max": service.NOTE_MAX_CHARACTERS,
            **context,
        },
        request=visit.request,
    )
    return Response.html(html, status=visit.status)  # type: ignore[no-any-return]


def json_response(content: dict[str, Any]) -> Response:
    """A JSON object that says that all went well."""
    return Response.json({"ok": True, **content})  # type: ignore[no-any-return]


def not_allowed(*methods: str) -> Refused:
    """The refusal of other methods than these."""
    allow = ", ".join(methods)
    return Refused(405, f"This address accepts {allow} only", {"Allow": allow})


def as_sentence(text: str) -> str:
    """The text with a capital and a full stop."""
    return f"{text[0].upper()}{text[1:].rstrip('.')}."
