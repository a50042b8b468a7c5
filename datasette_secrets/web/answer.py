"""What every page goes through: permission, errors, headers, HTML or JSON.

Only actors with the permission `manage-secrets` get further than `view`, which lets no
exception out: with `rich` installed, Datasette prints the locals of every frame of one.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from datasette.utils import await_me_maybe
from datasette.utils.asgi import Request, Response

from .. import config
from ..errors import (
    CannotOpen,
    DatabaseUnavailable,
    NeedsUpgrade,
    SecretsError,
    UnknownMasterKey,
    VersionConflict,
)
from ..events import via
from . import present
from .request import Body, Refused, method, read_fields, wants_json

if TYPE_CHECKING:
    from datasette.app import Datasette

    View = Callable[[Datasette, Request], Awaitable[Response]]
    Perform = Callable[[Body], Awaitable["Done"]]
    ShowForm = Callable[..., Awaitable[Response]]


LIST = "/-/secrets"


_TEMPLATES = "datasette_secrets"


_STATUSES: tuple[tuple[type[SecretsError], int], ...] = (
    (VersionConflict, 409),
    (NeedsUpgrade, 409),
    (UnknownMasterKey, 409),
    (CannotOpen, 409),
    (DatabaseUnavailable, 503),
)


_HEADINGS = {404: "Not found", 500: "Something went wrong", 503: "Not available"}


class Done(NamedTuple):
    """What a change did: an object for a program; a message and a page for a browser."""

    content: dict[str, Any]
    message: str
    url: str
    warnings: list[str]


async def is_allowed(datasette: Datasette, actor: dict[str, Any] | None) -> bool:
    """Whether this actor may manage secrets."""
    return bool(await datasette.allowed(action="manage-secrets", actor=actor))


def view(*methods: str) -> Callable[[View], View]:
    """A view for these methods that checks the permission and lets no exception out."""

    def decorate(view: View) -> View:
        @functools.wraps(view)
        async def guarded(datasette: Datasette, request: Request) -> Response:
            token = via.set("api" if wants_json(request) else "page")
            try:
                response = await _answer(view, methods, datasette, request)
            except Exception as error:  # see the top of this module
                response = await _error(datasette, request, error)
            finally:
                via.reset(token)
            return _uncached(response)

        return guarded

    return decorate


async def _answer(
    view: View, methods: tuple[str, ...], datasette: Datasette, request: Request
) -> Response:
    if not await is_allowed(datasette, request.actor):
        return await _forbidden(datasette, request)
    if method(request) not in methods:
        raise not_allowed(*methods)
    return await view(datasette, request)


async def change(
    datasette: Datasette,
    request: Request,
    fields: tuple[str, ...],
    perform: Perform,
    show_form: ShowForm,
) -> Response:
    """Answer a form or a JSON object that asks for a change.

    `fields`: those that an object may have. `perform` makes the change and says what it
    did. `show_form(sent=…, error=…, status=…)`: where a browser's change is refused, the
    page of the form with the reason.
    """
    sent = None
    try:
        sent = await read_fields(request, *fields)
        done = await perform(sent)
    except (SecretsError, Refused) as error:
        if wants_json(request):
            raise
        status, sentence = await explain(datasette, error)
        return await show_form(sent=sent, error=sentence, status=status)
    if wants_json(request):
        return json_response({"ok": True, **done.content})
    datasette.add_message(request, done.message)
    for warning in done.warnings:
        datasette.add_message(request, warning, datasette.WARNING)
    response: Response = Response.redirect(done.url)
    return response


def _uncached(response: Response) -> Response:
    for name in [name for name in response.headers if name.lower() == "cache-control"]:
        del response.headers[name]
    response.headers["Cache-Control"] = "no-store"
    response.headers["X-Frame-Options"] = "DENY"
    return response


async def _forbidden(datasette: Datasette, request: Request) -> Response:
    """A refusal. To a browser it is the one of `forbidden` plugins, a sign-in page say."""
    from datasette.plugins import pm

    message = "Permission denied: this needs manage-secrets"
    if not wants_json(request):
        if not request.actor:
            message += (
                ". You are not signed in. Sign in as an actor who has it, or start "
                "Datasette with --root and open the link that it prints"
            )
        for answer in pm.hook.forbidden(
            datasette=datasette, request=request, message=message
        ):
            response: Response | None = await await_me_maybe(answer)
            if response is not None:
                return response
    return json_error(message, 403)


async def _error(datasette: Datasette, request: Request, error: Exception) -> Response:
    status, sentence = await explain(datasette, error)
    headers = getattr(error, "headers", None)
    if wants_json(request):
        return json_error(sentence, status, headers=headers)
    try:
        response = await page(
            datasette,
            request,
            "error",
            {"sentence": sentence, "heading": _HEADINGS.get(status, "Not done")},
            status=status,
        )
    except Exception as second:  # see the top of this module
        _report(second)
        response = Response.text(sentence, status=status)
    response.headers.update(headers or {})
    return response


async def explain(datasette: Datasette, error: Exception) -> tuple[int, str]:
    """The status and the sentence for an error. Nothing of an unexpected one is shown."""
    if isinstance(error, Refused):
        return error.status, str(error)
    if isinstance(error, VersionConflict):
        return 409, await _explain_conflict(datasette, error)
    if isinstance(error, SecretsError):
        status = next(
            (code for kind, code in _STATUSES if isinstance(error, kind)), 400
        )
        return status, str(error)
    _report(error)
    return 500, "Something went wrong; the server's log names what"


async def _explain_conflict(datasette: Datasette, error: VersionConflict) -> str:
    """Who was first, and when. Nothing of what was sent in vain."""
    if not error.updated_at:
        return str(error)
    ids = {error.updated_by} if error.updated_by else set()
    names = await present.actor_names(datasette, ids)
    who = names.get(error.updated_by or "", error.updated_by or "somebody unknown")
    return (
        f"Nothing was changed: {who} saved version {error.actual} of {error.name} at "
        f"{error.updated_at} UTC while you were editing "
        f"{f'version {error.expected}' if error.expected else 'a new secret'}. Review "
        "it, then try again"
    )


def _report(error: Exception) -> None:
    print(f"{config.PLUGIN}: {type(error).__name__} in a page", file=sys.stderr)


async def page(
    datasette: Datasette,
    request: Request,
    template: str,
    context: dict[str, Any],
    *,
    status: int = 200,
) -> Response:
    """A page. Its context can be looked at with `?_context=1`, so it never has a value."""
    known = {"list_url": datasette.urls.path(LIST), "plugin": config.PLUGIN}
    html = await datasette.render_template(
        f"{_TEMPLATES}/{template}.html", {**known, **context}, request=request
    )
    response: Response = Response.html(html, status=status)
    return response


def json_response(content: dict[str, Any]) -> Response:
    """A JSON object."""
    response: Response = Response.json(content)
    return response


def json_error(
    sentence: str, status: int, headers: dict[str, str] | None = None
) -> Response:
    """A refusal in the form of Datasette's JSON API."""
    response: Response = Response.error(sentence, status, headers=headers)
    return response


def not_allowed(*methods: str) -> Refused:
    """The refusal of another method than these."""
    allow = ", ".join(methods)
    return Refused(405, f"This address takes {allow} only", {"Allow": allow})


def as_sentence(text: str) -> str:
    """The text with a capital and a full stop."""
    return f"{text[0].upper()}{text[1:]}."
