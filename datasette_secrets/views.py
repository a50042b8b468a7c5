"""The pages, and the same through JSON. A value goes in here and never comes out.

Only actors with the permission `manage-secrets` get further than `_view`, which lets no
exception out: with `rich` installed, Datasette prints the locals of every frame of one.
What was sent stays inside a `Body`, whose `repr` shows nothing. A change that is refused
shows the same page again with the reason, and sends back nothing that was typed.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlencode

from datasette.utils import await_me_maybe, tilde_decode
from datasette.utils.asgi import Request, Response

from . import body, config, display, guard, rotation, service, store
from .body import Body
from .errors import (
    CannotOpen,
    DatabaseUnavailable,
    InvalidSecret,
    MissingExtra,
    NeedsUpgrade,
    SecretsError,
    UnknownMasterKey,
    VersionConflict,
)

if TYPE_CHECKING:
    from datasette.app import Datasette

    View = Callable[[Datasette, Request], Awaitable[Response]]

PAGE_SIZE = 100
JSON_PAGE_SIZE_MAX = 1_000
#: What a page re-wraps or upgrades while somebody waits for it; more is for the shell.
VERSIONS_MAX = 10_000
#: How many at a time, so that the event loop goes on turning for everybody else.
_BATCH_SIZE = 100
#: How many versions a message names; of more it says how many.
_NUMBERS_MAX = 10
_LIST = "/-/secrets"
_TEMPLATES = "datasette_secrets"
_STATUSES: tuple[tuple[type[SecretsError], int], ...] = (
    (VersionConflict, 409),
    (NeedsUpgrade, 409),
    (UnknownMasterKey, 409),
    (CannotOpen, 409),
    (DatabaseUnavailable, 503),
)
_HEADINGS = {404: "Not found", 500: "Something went wrong", 503: "Not available"}
_FIELDS = {
    "set": ("value", "note", "expected_version"),
    "delete": ("expected_version",),
    "restore": ("expected_version",),
    "rollback": ("version", "expected_version"),
    "destroy": ("version", "versions"),
    "rotate": ("skip_unopenable",),
    "upgrade": ("digest",),
}


class _Refused(Exception):
    """A request that is answered with this status and this sentence."""

    def __init__(
        self, status: int, sentence: str, headers: dict[str, str] | None = None
    ) -> None:
        self.status = status
        self.headers = headers
        super().__init__(sentence)


def menu_links(datasette: Datasette, actor: dict[str, Any] | None) -> Any:
    """The link in Datasette's menu, for those who may manage secrets."""

    async def links() -> list[dict[str, str]]:
        if not await _is_allowed(datasette, actor):
            return []
        return [{"href": datasette.urls.path(_LIST), "label": "Manage secrets"}]

    return links


def jump_items(datasette: Datasette, actor: dict[str, Any] | None) -> Any:
    """The entry in Datasette's jump menu, for those who may manage secrets."""
    from datasette.jump import JumpSQL

    async def items() -> list[JumpSQL]:
        if not await _is_allowed(datasette, actor):
            return []
        return [
            JumpSQL.menu_item(
                label="Manage secrets",
                url=datasette.urls.path(_LIST),
                description="API keys and other credentials that plugins use",
            )
        ]

    return items


async def _is_allowed(datasette: Datasette, actor: dict[str, Any] | None) -> bool:
    return bool(await datasette.allowed(action="manage-secrets", actor=actor))


# What every view goes through.


def _view(*methods: str) -> Callable[[View], View]:
    """A view for these methods that checks the permission and lets no exception out."""

    def decorate(view: View) -> View:
        @functools.wraps(view)
        async def guarded(datasette: Datasette, request: Request) -> Response:
            try:
                response = await _answer(view, methods, datasette, request)
            except Exception as error:  # see the top of this module
                response = await _error(datasette, request, error)
            return _uncached(response)

        return guarded

    return decorate


async def _answer(
    view: View, methods: tuple[str, ...], datasette: Datasette, request: Request
) -> Response:
    if not await _is_allowed(datasette, request.actor):
        return await _forbidden(datasette, request)
    if _method(request) not in methods:
        raise _not_allowed(*methods)
    return await view(datasette, request)


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
    if not _wants_json(request):
        for answer in pm.hook.forbidden(
            datasette=datasette, request=request, message=message
        ):
            response: Response | None = await await_me_maybe(answer)
            if response is not None:
                return response
    return _json_error(message, 403)


async def _error(datasette: Datasette, request: Request, error: Exception) -> Response:
    status, sentence = await _explain(datasette, error)
    headers = getattr(error, "headers", None)
    if _wants_json(request):
        return _json_error(sentence, status, headers=headers)
    try:
        response = await _page(
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


async def _explain(datasette: Datasette, error: Exception) -> tuple[int, str]:
    """The status and the sentence for an error. Nothing of an unexpected one is shown."""
    if isinstance(error, _Refused):
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
    names = await display.actor_names(datasette, ids)
    who = names.get(error.updated_by or "", error.updated_by or "somebody unknown")
    return (
        f"Nothing was changed: {error.name} is at version {error.actual}, changed by "
        f"{who} at {error.updated_at} UTC, and no longer at version {error.expected} as "
        "it was for you. Look at what is there now before you try again"
    )


def _report(error: Exception) -> None:
    print(f"{config.PLUGIN}: {type(error).__name__} in a page", file=sys.stderr)


async def _page(
    datasette: Datasette,
    request: Request,
    template: str,
    context: dict[str, Any],
    *,
    status: int = 200,
) -> Response:
    """A page. Its context can be looked at with `?_context=1`, so it never has a value."""
    known = {"list_url": datasette.urls.path(_LIST), "plugin": config.PLUGIN}
    html = await datasette.render_template(
        f"{_TEMPLATES}/{template}.html", {**known, **context}, request=request
    )
    response: Response = Response.html(html, status=status)
    return response


def _json(content: dict[str, Any]) -> Response:
    response: Response = Response.json(content)
    return response


def _json_error(
    sentence: str, status: int, headers: dict[str, str] | None = None
) -> Response:
    response: Response = Response.error(sentence, status, headers=headers)
    return response


def _redirect(url: str) -> Response:
    response: Response = Response.redirect(url)
    return response


def _method(request: Request) -> str:
    return "GET" if request.method == "HEAD" else str(request.method)


def _not_allowed(*methods: str) -> _Refused:
    allow = ", ".join(methods)
    return _Refused(405, f"This address takes {allow} only", {"Allow": allow})


def _wants_json(request: Request) -> bool:
    return (
        request.path.endswith(".json")
        or body.media_type(request) == "application/json"
        or "application/json" in (request.headers.get("accept") or "")
        or (request.headers.get("authorization") or "").lower().startswith("bearer ")
    )


def _actor_id(request: Request) -> str | None:
    actor_id = (request.actor or {}).get("id")
    return str(actor_id) if actor_id else None


def _name(request: Request) -> str:
    """The secret's name: tilde-encoded as Datasette's links are, or percent-encoded."""
    return str(tilde_decode(unquote(request.url_vars["name"])))


async def _read(request: Request, action: str) -> Body:
    """What was sent for this action, or a refusal."""
    sent = await body.read(request)
    if sent.problem:
        raise _Refused(sent.status, sent.problem)
    if not sent.is_form and sent.unknown(*_FIELDS[action]):
        known = ", ".join(_FIELDS[action]) or "none"
        raise _Refused(400, f"The object has an unknown key; known: {known}")
    return sent


def _number(sent: Body, field: str) -> int | None:
    """A version number that was sent, None without one. Raises InvalidSecret."""
    number = sent.first(field)
    if number is None or number == "":
        return None
    if sent.is_form and number.isascii() and number.isdigit() and len(number) < 17:
        number = int(number)
    if not _is_number(number):
        raise InvalidSecret(f"{field} must be a whole number")
    return int(number)


def _flag(sent: Body, field: str) -> bool:
    """Whether this was asked for: a box that is ticked, or true. Raises InvalidSecret."""
    flag = sent.first(field)
    if sent.is_form:
        return bool(flag)
    if flag is not None and not isinstance(flag, bool):
        raise InvalidSecret(f"{field} must be true or false")
    return bool(flag)


# The list.


@_view("GET")
async def list_page(datasette: Datasette, request: Request) -> Response:
    if _wants_json(request):
        return await _list_json(datasette, request)
    place = service.vault(datasette)
    query = request.args.get("q") or ""
    after = request.args.get("_next") or None
    listed = await service.list_secrets(
        datasette, contains=query, after=after, limit=PAGE_SIZE + 1, waiting=False
    )
    waiting = [] if after else await service.waiting_secrets(datasette, contains=query)
    more = len(listed) > PAGE_SIZE
    del listed[PAGE_SIZE:]
    shown = await display.Display.of(datasette, [each.newest for each in listed])
    census = await rotation.census(datasette)
    return await _page(
        datasette,
        request,
        "list",
        {
            "rows": [shown.row(each) for each in listed],
            "waiting": [shown.row(each) for each in waiting],
            "total": await service.count_secrets(datasette, contains=query),
            "query": query,
            "is_first": after is None,
            "next_url": _with(datasette, q=query, _next=listed[-1].name)
            if more
            else None,
            "first_url": _with(datasette, q=query),
            "missing_configuration": place.settings.missing,
            "warnings": await _warnings(datasette, place, census),
            "census": census,
            "keys": display.key_rows(census, place.settings.sources),
            "to_rewrap": _to_rewrap(census),
            "can_rewrap": any(census.counts.get(key_id) for key_id in census.ring[1:]),
            "add_url": datasette.urls.path(f"{_LIST}/-/add"),
            "rotate_url": datasette.urls.path(f"{_LIST}/-/rotate"),
            "upgrade_url": datasette.urls.path(f"{_LIST}/-/upgrade"),
        },
    )


def _with(datasette: Datasette, **arguments: str) -> str:
    """The list with these arguments, the empty ones left out."""
    given = {key: value for key, value in arguments.items() if value}
    suffix = f"?{urlencode(given)}" if given else ""
    return str(datasette.urls.path(_LIST)) + suffix


def _to_rewrap(census: rotation.Census) -> int:
    return sum(
        versions
        for key_id, versions in census.counts.items()
        if key_id != census.primary
    )


async def _warnings(
    datasette: Datasette, place: service.Vault, census: rotation.Census
) -> list[str]:
    warnings = []
    if store.is_temporary(place.db):
        warnings.append(
            "The database of the secrets is temporary: they are lost when this server "
            "stops. Start Datasette with --internal and the path of a file, such as "
            "--internal internal.db."
        )
    if reason := guard.why_read_only(place):
        warnings.append(reason)
    if place.settings.ring is not None:
        for key_id in census.missing:
            versions = census.counts[key_id]
            warnings.append(
                f"{_versions(versions)} cannot be read: master key {key_id} is needed "
                "and not configured. Add it to encryption-key, after the first one, and "
                "restart; if it is lost, set those secrets anew."
            )
    return warnings + [
        f"{warning[0].upper()}{warning[1:]}."
        for warning in await guard.exposure(datasette)
    ]


def _versions(count: int) -> str:
    return f"{count:,} version{'' if count == 1 else 's'}"


async def _list_json(datasette: Datasette, request: Request) -> Response:
    size = request.args.get("_size")
    limit = None
    if size is not None:
        if not (size.isascii() and size.isdigit() and len(size) < 9 and int(size)):
            raise _Refused(400, "_size must be a positive whole number")
        limit = min(int(size), JSON_PAGE_SIZE_MAX)
    query = request.args.get("q") or ""
    listed = await service.list_secrets(
        datasette,
        contains=query,
        after=request.args.get("_next") or None,
        limit=None if limit is None else limit + 1,
    )
    after = listed[limit - 1].name if limit and len(listed) > limit else None
    place = service.vault(datasette)
    keys = display.key_rows(await rotation.census(datasette), place.settings.sources)
    return _json(
        {
            "ok": True,
            "secrets": [display.secret_json(each) for each in listed[:limit]],
            "keys": [display.key_json(key) for key in keys],
            "next": after,
        }
    )


# One secret.


@_view("GET", "POST")
async def secret_page(datasette: Datasette, request: Request) -> Response:
    name = _name(request)
    if _method(request) == "GET":
        if _wants_json(request):
            return await _secret_json(datasette, name)
        return await _secret_page(datasette, request, name)
    if request.url_vars.get("format"):
        raise _not_allowed("GET")
    await _require(datasette, name)
    return await _set(datasette, request, name)


async def _require(datasette: Datasette, name: str) -> service.Listed:
    listed = await service.find_secret(datasette, name)
    if listed is None:
        raise _Refused(
            404, "No plugin registered a secret of this name, and none is stored"
        )
    return listed


async def _secret_json(datasette: Datasette, name: str) -> Response:
    listed = await _require(datasette, name)
    place = service.vault(datasette)
    return _json(
        {
            "ok": True,
            "secret": display.secret_json(listed),
            "versions": [
                display.version_json(version, service.version_state(place, version))
                for version in await store.history(place.db, name)
            ],
        }
    )


async def _secret_page(
    datasette: Datasette,
    request: Request,
    name: str,
    *,
    error: str = "",
    status: int = 200,
) -> Response:
    listed = await _require(datasette, name)
    place = service.vault(datasette)
    history = await store.history(place.db, name)
    start = _start_of_page(request, len(history))
    versions = history[start : start + PAGE_SIZE]
    shown = await display.Display.of(datasette, [listed.newest, *versions])
    url = display.secret_url(datasette, name)
    return await _page(
        datasette,
        request,
        "secret",
        {
            "secret": shown.row(listed),
            "versions": _version_rows(shown, place, history, versions),
            "stored": len(history),
            "newer_url": f"{url}?_start={max(0, start - PAGE_SIZE)}" if start else None,
            "older_url": f"{url}?_start={start + PAGE_SIZE}"
            if start + PAGE_SIZE < len(history)
            else None,
            "stored_state": service.version_state(place, history[0])
            if history
            else "not-set",
            "expected_version": _expected(history),
            "note_max": service.NOTE_MAX_CHARACTERS,
            "missing_configuration": place.settings.missing,
            "census": await rotation.census(datasette),
            "read_only": guard.why_read_only(place),
            "can_destroy": any(not version.is_destroyed for version in history),
            "can_roll_back": any(
                service.version_state(place, version) == "stored"
                for version in history[1:]
            ),
            "upgrade_url": datasette.urls.path(f"{_LIST}/-/upgrade"),
            "error": error,
        },
        status=status,
    )


def _start_of_page(request: Request, stored: int) -> int:
    start = request.args.get("_start") or ""
    if start.isascii() and start.isdigit() and len(start) < 17:
        return min(int(start), max(0, stored - 1))
    return 0


def _expected(history: list[store.Version]) -> object:
    """The newest version for the form to carry; nothing where its row is damaged."""
    newest = history[0].version if history else 0
    return newest if _is_number(newest) else ""


def _is_number(number: object) -> bool:
    return type(number) is int and 0 <= number <= store.VERSION_MAX


def _version_rows(
    shown: display.Display,
    place: service.Vault,
    history: list[store.Version],
    versions: list[store.Version],
) -> list[display.VersionRow]:
    """The rows of these versions. A note is left out between two that have the same."""
    same = {
        each.id
        for newer, each, older in zip(history, history[1:], history[2:], strict=False)
        if newer.note == each.note == older.note
    }
    return [
        shown.version(
            version,
            service.version_state(place, version),
            is_newest=version.id == history[0].id,
            shows_note=version.id not in same,
        )
        for version in versions
    ]


@_view("GET", "POST")
async def add_page(datasette: Datasette, request: Request) -> Response:
    if _method(request) == "GET":
        return await _add_page(datasette, request)
    try:
        sent = await body.read(request)
        if sent.problem:
            raise _Refused(sent.status, sent.problem)
        name = str(sent.first("name") or "").strip()
        if not sent.has_value("secret"):
            raise InvalidSecret("A new secret needs a value")
        version = await service.set_secret(
            datasette,
            name,
            sent.take_value("secret"),
            note=_note(sent),
            actor_id=_actor_id(request),
            expected_version=0,
        )
    except (SecretsError, _Refused) as error:
        status, sentence = await _explain(datasette, error)
        if isinstance(error, VersionConflict):
            sentence = f"{error.name} is stored already: change it on its own page"
        if _wants_json(request):
            return _json_error(sentence, status)
        return await _add_page(datasette, request, error=sentence, status=status)
    if _wants_json(request):
        return _json({"ok": True, "name": name, "version": version})
    datasette.add_message(request, f"Secret {name} added")
    return _redirect(datasette.urls.path(_LIST))


async def _add_page(
    datasette: Datasette, request: Request, *, error: str = "", status: int = 200
) -> Response:
    place = service.vault(datasette)
    return await _page(
        datasette,
        request,
        "add",
        {
            "name_max": service.NAME_MAX_CHARACTERS,
            "note_max": service.NOTE_MAX_CHARACTERS,
            "missing_configuration": place.settings.missing,
            "census": await rotation.census(datasette),
            "read_only": guard.why_read_only(place),
            "error": error,
        },
        status=status,
    )


# Actions.


@_view("GET", "POST")
async def action_page(datasette: Datasette, request: Request) -> Response:
    name, action = _name(request), request.url_vars["action"]
    if _method(request) == "GET":
        if action == "set" or _wants_json(request):
            raise _not_allowed("POST")
        return await _confirmation(datasette, request, name, action)
    if action == "set":
        return await _set(datasette, request, name)
    await _require(datasette, name)
    return await _act(datasette, request, name, action)


async def _set(datasette: Datasette, request: Request, name: str) -> Response:
    """Store a new value; or with none, change the note."""
    try:
        sent = await _read(request, "set")
        version, message = await _store(datasette, request, name, sent)
    except (SecretsError, _Refused) as error:
        if _wants_json(request) or await service.find_secret(datasette, name) is None:
            raise
        status, sentence = await _explain(datasette, error)
        return await _secret_page(
            datasette, request, name, error=sentence, status=status
        )
    if _wants_json(request):
        return _json({"ok": True, "name": name, "version": version})
    datasette.add_message(request, message)
    return _redirect(datasette.urls.path(_LIST))


async def _store(
    datasette: Datasette, request: Request, name: str, sent: Body
) -> tuple[int, str]:
    field = "secret" if sent.is_form and sent.has("secret") else "value"
    expected_version = _number(sent, "expected_version")
    if sent.has_value(field):
        version = await service.set_secret(
            datasette,
            name,
            sent.take_value(field),
            note=_note(sent),
            actor_id=_actor_id(request),
            expected_version=expected_version,
        )
        return version, f"Secret {name} {'stored' if version == 1 else 'updated'}"
    note = _note(sent)
    if note is None:
        raise InvalidSecret(f"{name} needs a value, a note, or both")
    listed = await service.find_secret(datasette, name)
    if listed is None or listed.newest is None:
        raise InvalidSecret(f"{name} needs a value: none is stored yet")
    if sent.is_form and note == (listed.newest.note or ""):
        return listed.newest.version, f"Nothing changed: no value for {name} was typed"
    version = await service.set_note(
        datasette,
        name,
        note,
        actor_id=_actor_id(request),
        expected_version=expected_version,
    )
    return version, f"Note updated: {name}"


def _note(sent: Body) -> Any:
    """The note that was sent, for the service to judge; None without one."""
    note = sent.first("note")
    return note.strip() if isinstance(note, str) and sent.is_form else note


async def _act(
    datasette: Datasette, request: Request, name: str, action: str
) -> Response:
    try:
        sent = await _read(request, action)
        done, message = await _ACTIONS[action](datasette, request, name, sent)
    except (SecretsError, _Refused) as error:
        if _wants_json(request):
            raise
        status, sentence = await _explain(datasette, error)
        return await _confirmation(
            datasette, request, name, action, error=sentence, status=status
        )
    if _wants_json(request):
        return _json({"ok": True, "name": name, **done})
    datasette.add_message(request, message)
    if done.get("remains"):
        datasette.add_message(
            request, f"{_sentence(done['remains'])}", datasette.WARNING
        )
    return _redirect(display.secret_url(datasette, name))


_Done = tuple[dict[str, Any], str]


async def _delete(
    datasette: Datasette, request: Request, name: str, sent: Body
) -> _Done:
    version = await service.delete_secret(
        datasette,
        name,
        actor_id=_actor_id(request),
        expected_version=_number(sent, "expected_version"),
    )
    return {"version": version}, f"Secret {name} deleted"


async def _restore(
    datasette: Datasette, request: Request, name: str, sent: Body
) -> _Done:
    version = await service.restore_secret(
        datasette,
        name,
        actor_id=_actor_id(request),
        expected_version=_number(sent, "expected_version"),
    )
    return {"version": version}, f"Secret {name} restored"


async def _roll_back(
    datasette: Datasette, request: Request, name: str, sent: Body
) -> _Done:
    earlier = _number(sent, "version")
    if earlier is None:
        raise InvalidSecret("Say which version to roll back to")
    version = await service.roll_back(
        datasette,
        name,
        earlier,
        actor_id=_actor_id(request),
        expected_version=_number(sent, "expected_version"),
    )
    return (
        {"version": version},
        f"Secret {name} rolled back to version {earlier}, as version {version}",
    )


async def _destroy(
    datasette: Datasette, request: Request, name: str, sent: Body
) -> _Done:
    place = service.vault(datasette)
    stored = {
        str(each.version): each.version for each in await store.history(place.db, name)
    }
    asked = sent.all("versions") + sent.all("version")
    if not asked:
        raise InvalidSecret("Say which versions to destroy")
    if not all(type(each) in (int, str) and str(each) in stored for each in asked):
        raise InvalidSecret(f"{name} has no such version")
    versions = list(dict.fromkeys(stored[str(each)] for each in asked))
    destroyed, cleaned = await service.destroy_versions(
        datasette, name, versions, actor_id=_actor_id(request)
    )
    return (
        {"versions": versions, "destroyed": destroyed, "remains": cleaned.remains},
        f"{_enumerate(versions)} of {name} destroyed",
    )


def _enumerate(versions: list[Any]) -> str:
    """These versions in a message, which a cookie carries: browsers drop a large one."""
    if len(versions) > _NUMBERS_MAX:
        return _versions(len(versions))
    return f"Version{'s' * (len(versions) > 1)} {', '.join(map(str, versions))}"


_ACTIONS: dict[str, Callable[[Datasette, Request, str, Body], Awaitable[_Done]]] = {
    "delete": _delete,
    "restore": _restore,
    "rollback": _roll_back,
    "destroy": _destroy,
}


async def _confirmation(
    datasette: Datasette,
    request: Request,
    name: str,
    action: str,
    *,
    error: str = "",
    status: int = 200,
) -> Response:
    """The page that says what an action will do, and does it on a POST."""
    listed = await _require(datasette, name)
    place = service.vault(datasette)
    history = await store.history(place.db, name)
    if not history:
        raise InvalidSecret(f"Nothing is stored for {name}")
    shown = await display.Display.of(datasette, history)
    versions = _version_rows(shown, place, history, history)
    chosen = set(request.args.getlist("version"))
    if request.args.get("old"):
        chosen |= {str(row.version) for row in versions if not row.is_newest}
    earlier = next((row for row in versions if str(row.version) in chosen), None)
    if action == "rollback" and not error and (earlier is None or earlier.is_destroyed):
        raise _Refused(404, f"{name} has no such version to roll back to")
    return await _page(
        datasette,
        request,
        action,
        {
            "secret": shown.row(listed),
            "versions": [row for row in versions if not row.is_destroyed],
            "newest": versions[0],
            "earlier": earlier,
            "chosen": chosen,
            "next_version": (versions[0].number or 0) + 1,
            "action_url": display.secret_url(datasette, name, action),
            "expected_version": _expected(history),
            "missing_configuration": place.settings.missing,
            "read_only": guard.why_read_only(place),
            "error": error,
        },
        status=status,
    )


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


# Encryption.


@_view("GET", "POST")
async def rotate_page(datasette: Datasette, request: Request) -> Response:
    if _method(request) == "GET":
        if _wants_json(request):
            raise _not_allowed("POST")
        return await _rotate_page(datasette, request)
    try:
        sent = await _read(request, "rotate")
        skip_unopenable = _flag(sent, "skip_unopenable")
        if _to_rewrap(await rotation.census(datasette)) > VERSIONS_MAX:
            raise _too_many("rotate-key")
        done = await rotation.rotate(
            datasette,
            batch_size=_BATCH_SIZE,
            skip_unopenable=skip_unopenable,
            actor_id=_actor_id(request),
        )
        if done.problems and not done.clean_up:
            raise _Refused(
                409,
                "Nothing was changed, because not everything can be re-wrapped: "
                + _problems(done.problems),
            )
    except (SecretsError, _Refused) as error:
        if _wants_json(request):
            raise
        status, sentence = await _explain(datasette, error)
        return await _rotate_page(datasette, request, error=sentence, status=status)
    if _wants_json(request):
        return _json(
            {
                "ok": True,
                "primary": done.primary,
                "rewrapped": done.changed,
                **_outcome(done),
            }
        )
    message = f"{_versions(done.changed)} re-wrapped with master key {done.primary}"
    return _done(datasette, request, message, done)


@_view("GET", "POST")
async def upgrade_page(datasette: Datasette, request: Request) -> Response:
    if _method(request) == "GET":
        if _wants_json(request):
            raise _not_allowed("POST")
        return await _upgrade_page(datasette, request)
    try:
        sent = await _read(request, "upgrade")
        if (await rotation.census(datasette)).versions > VERSIONS_MAX:
            raise _too_many("upgrade")
        listed = await rotation.upgrade(datasette, dry_run=True, batch_size=_BATCH_SIZE)
        shown = sent.first("digest")
        if shown != listed.digest and not (shown is None and _wants_json(request)):
            raise _Refused(
                409,
                "Nothing was changed, because what 0.x stored here is no longer what the "
                "list showed you: look at it again",
            )
        done = await rotation.upgrade(
            datasette,
            only=listed.offered,
            batch_size=_BATCH_SIZE,
            actor_id=_actor_id(request),
        )
    except (SecretsError, _Refused) as error:
        if _wants_json(request):
            raise
        status, sentence = await _explain(datasette, error)
        return await _upgrade_page(datasette, request, error=sentence, status=status)
    if _wants_json(request):
        return _json({"ok": True, "upgraded": done.changed, **_outcome(done)})
    return _done(datasette, request, f"{_versions(done.changed)} upgraded", done)


def _too_many(command: str) -> _Refused:
    return _Refused(
        400,
        f"There are more than {VERSIONS_MAX:,} versions: run "
        f"'datasette secrets {command}' in a shell",
    )


def _problems(problems: list[rotation.Problem]) -> str:
    more = f", and {len(problems) - 3:,} more" if len(problems) > 3 else ""
    return "; ".join(problem.message for problem in problems[:3]) + more


def _outcome(done: rotation.Rotation | rotation.Upgrade) -> dict[str, Any]:
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
    done: rotation.Rotation | rotation.Upgrade,
) -> Response:
    datasette.add_message(request, message)
    remains = done.clean_up.remains if done.clean_up else None
    for warning in (
        f"{_versions(len(done.problems))} left: {_problems(done.problems)}"
        if done.problems
        else None,
        remains and _sentence(remains),
    ):
        if warning:
            datasette.add_message(request, warning, datasette.WARNING)
    return _redirect(datasette.urls.path(_LIST))


async def _rotate_page(
    datasette: Datasette, request: Request, *, error: str = "", status: int = 200
) -> Response:
    place = service.vault(datasette)
    primary = place.settings.require_ring().primary.id
    census = await rotation.census(datasette)
    to_rewrap = _to_rewrap(census)
    is_large = to_rewrap > VERSIONS_MAX
    touched: list[store.Version] = []
    problems: list[rotation.Problem] = []
    if to_rewrap and not is_large:
        if not guard.why_read_only(place):
            problems = (
                await rotation.rotate(datasette, dry_run=True, batch_size=_BATCH_SIZE)
            ).problems
        stuck = {(problem.name, problem.version) for problem in problems}
        touched = [
            version
            for version in await store.versions_elsewhere(place.db, primary)
            if (version.name, version.version) not in stuck
        ]
    return await _page(
        datasette,
        request,
        "rotate",
        {
            "primary": primary,
            "keys": display.key_rows(census, place.settings.sources),
            "legacy": census.legacy,
            "to_rewrap": to_rewrap,
            "touched": touched,
            "problems": problems,
            "is_large": is_large,
            "versions_max": VERSIONS_MAX,
            "read_only": guard.why_read_only(place),
            "action_url": datasette.urls.path(f"{_LIST}/-/rotate"),
            "upgrade_url": datasette.urls.path(f"{_LIST}/-/upgrade"),
            "error": error,
        },
        status=status,
    )


async def _upgrade_page(
    datasette: Datasette, request: Request, *, error: str = "", status: int = 200
) -> Response:
    place = service.vault(datasette)
    place.settings.require_ring()
    census = await rotation.census(datasette)
    is_large = census.versions > VERSIONS_MAX
    report = rotation.Upgrade(dry_run=True)
    lacking = ""
    if census.legacy and not is_large:
        try:
            report = await rotation.upgrade(
                datasette, dry_run=True, batch_size=_BATCH_SIZE
            )
        except MissingExtra as missing:
            lacking = str(missing)
    return await _page(
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
            "read_only": guard.why_read_only(place),
            "action_url": datasette.urls.path(f"{_LIST}/-/upgrade"),
            "error": error,
        },
        status=status,
    )


ROUTES = (
    (r"^/-/secrets(?P<format>\.json)?$", list_page),
    (r"^/-/secrets/-/add$", add_page),
    (r"^/-/secrets/-/rotate$", rotate_page),
    (r"^/-/secrets/-/upgrade$", upgrade_page),
    (
        r"^/-/secrets/(?P<name>[^/]+)/-/(?P<action>set|delete|restore|rollback|destroy)$",
        action_page,
    ),
    (r"^/-/secrets/(?P<name>[^/]+?)(?P<format>\.json)?$", secret_page),
)
