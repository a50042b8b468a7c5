"""The list, the page of a secret, and what can be done on them.

What was sent stays inside a `Body`, whose `repr` shows nothing. A change that is refused
shows the same page again with the reason, and sends back nothing that was typed.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from datasette.utils.asgi import Request, Response

from .. import database, health, listing, rotation, serialize, service, store
from ..errors import InvalidSecret, SecretsError, VersionConflict
from ..instance import Instance, get_instance
from . import present
from .answer import (
    LIST,
    as_sentence,
    explain,
    json_error,
    json_response,
    not_allowed,
    page,
    redirect,
    view,
)
from .encryption import to_rewrap
from .request import (
    Body,
    Refused,
    actor_id,
    is_number,
    method,
    number,
    read,
    read_action,
    secret_name,
    wants_json,
)

if TYPE_CHECKING:
    from datasette.app import Datasette


PAGE_SIZE = 100


JSON_PAGE_SIZE_MAX = 1_000


#: How many versions a message names; of more it says how many.
_NUMBERS_MAX = 10


@view("GET")
async def list_page(datasette: Datasette, request: Request) -> Response:
    if wants_json(request):
        return await _list_json(datasette, request)
    instance = get_instance(datasette)
    query = request.args.get("q") or ""
    after = request.args.get("_next") or None
    listed = await listing.list_secrets(
        datasette, contains=query, after=after, limit=PAGE_SIZE + 1, waiting=False
    )
    waiting = [] if after else await listing.waiting_secrets(datasette, contains=query)
    more = len(listed) > PAGE_SIZE
    del listed[PAGE_SIZE:]
    shown = await present.Display.of(datasette, [each.newest for each in listed])
    census = await rotation.census(datasette)
    return await page(
        datasette,
        request,
        "list",
        {
            "rows": [shown.row(each) for each in listed],
            "waiting": [shown.row(each) for each in waiting],
            "total": await listing.count_secrets(datasette, contains=query),
            "query": query,
            "is_first": after is None,
            "next_url": _with(datasette, q=query, _next=listed[-1].name)
            if more
            else None,
            "first_url": _with(datasette, q=query),
            "missing_configuration": instance.settings.missing,
            "warnings": await _warnings(datasette, instance, census),
            "census": census,
            "keys": health.key_rows(census, instance.settings.sources),
            "to_rewrap": to_rewrap(census),
            "can_rewrap": any(census.counts.get(key_id) for key_id in census.ring[1:]),
            "add_url": datasette.urls.path(f"{LIST}/-/add"),
            "rotate_url": datasette.urls.path(f"{LIST}/-/rotate"),
            "upgrade_url": datasette.urls.path(f"{LIST}/-/upgrade"),
        },
    )


def _with(datasette: Datasette, **arguments: str) -> str:
    """The list with these arguments, the empty ones left out."""
    given = {key: value for key, value in arguments.items() if value}
    suffix = f"?{urlencode(given)}" if given else ""
    return str(datasette.urls.path(LIST)) + suffix


async def _warnings(
    datasette: Datasette, instance: Instance, census: rotation.Census
) -> list[str]:
    warnings = []
    if database.is_temporary(instance.db):
        warnings.append(
            "The database of the secrets is temporary: they are lost when this server "
            "stops. Start Datasette with --internal and the path of a file, such as "
            "--internal internal.db."
        )
    if reason := health.why_read_only(instance):
        warnings.append(reason)
    if instance.settings.ring is not None:
        for key_id in census.missing:
            versions = census.counts[key_id]
            warnings.append(
                f"{health.count_versions(versions)} cannot be read: master key {key_id} is needed "
                "and not configured. Add it to encryption-key, after the first one, and "
                "restart; if it is lost, set those secrets anew."
            )
    return warnings + [
        f"{warning[0].upper()}{warning[1:]}."
        for warning in await health.exposure(datasette)
    ]


async def _list_json(datasette: Datasette, request: Request) -> Response:
    size = request.args.get("_size")
    limit = None
    if size is not None:
        if not (size.isascii() and size.isdigit() and len(size) < 9 and int(size)):
            raise Refused(400, "_size must be a positive whole number")
        limit = min(int(size), JSON_PAGE_SIZE_MAX)
    query = request.args.get("q") or ""
    listed = await listing.list_secrets(
        datasette,
        contains=query,
        after=request.args.get("_next") or None,
        limit=None if limit is None else limit + 1,
    )
    after = listed[limit - 1].name if limit and len(listed) > limit else None
    instance = get_instance(datasette)
    keys = health.key_rows(await rotation.census(datasette), instance.settings.sources)
    return json_response(
        {
            "ok": True,
            "secrets": [serialize.secret_json(each) for each in listed[:limit]],
            "keys": [serialize.key_json(key) for key in keys],
            "next": after,
        }
    )


@view("GET", "POST")
async def secret_page(datasette: Datasette, request: Request) -> Response:
    name = secret_name(request)
    if method(request) == "GET":
        if wants_json(request):
            return await _secret_json(datasette, name)
        return await _secret_page(datasette, request, name)
    if request.url_vars.get("format"):
        raise not_allowed("GET")
    await _require(datasette, name)
    return await _set(datasette, request, name)


async def _require(datasette: Datasette, name: str) -> listing.Listed:
    listed = await listing.find_secret(datasette, name)
    if listed is None:
        raise Refused(
            404, "No plugin registered a secret of this name, and none is stored"
        )
    return listed


async def _secret_json(datasette: Datasette, name: str) -> Response:
    listed = await _require(datasette, name)
    instance = get_instance(datasette)
    return json_response(
        {
            "ok": True,
            "secret": serialize.secret_json(listed),
            "versions": [
                serialize.version_json(
                    version, listing.version_state(instance, version)
                )
                for version in await store.history(instance.db, name)
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
    instance = get_instance(datasette)
    history = await store.history(instance.db, name)
    start = _start_of_page(request, len(history))
    versions = history[start : start + PAGE_SIZE]
    shown = await present.Display.of(datasette, [listed.newest, *versions])
    url = present.secret_url(datasette, name)
    return await page(
        datasette,
        request,
        "secret",
        {
            "secret": shown.row(listed),
            "versions": _version_rows(shown, instance, history, versions),
            "stored": len(history),
            "newer_url": f"{url}?_start={max(0, start - PAGE_SIZE)}" if start else None,
            "older_url": f"{url}?_start={start + PAGE_SIZE}"
            if start + PAGE_SIZE < len(history)
            else None,
            "stored_state": listing.version_state(instance, history[0])
            if history
            else "not-set",
            "expected_version": _expected(history),
            "note_max": service.NOTE_MAX_CHARACTERS,
            "missing_configuration": instance.settings.missing,
            "census": await rotation.census(datasette),
            "read_only": health.why_read_only(instance),
            "can_destroy": any(not version.is_destroyed for version in history),
            "can_roll_back": any(
                listing.version_state(instance, version) == "stored"
                for version in history[1:]
            ),
            "upgrade_url": datasette.urls.path(f"{LIST}/-/upgrade"),
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
    return newest if is_number(newest) else ""


def _version_rows(
    shown: present.Display,
    instance: Instance,
    history: list[store.Version],
    versions: list[store.Version],
) -> list[present.VersionRow]:
    """The rows of these versions. A note is left out between two that have the same."""
    same = {
        each.id
        for newer, each, older in zip(history, history[1:], history[2:], strict=False)
        if newer.note == each.note == older.note
    }
    return [
        shown.version(
            version,
            listing.version_state(instance, version),
            is_newest=version.id == history[0].id,
            shows_note=version.id not in same,
        )
        for version in versions
    ]


@view("GET", "POST")
async def add_page(datasette: Datasette, request: Request) -> Response:
    if method(request) == "GET":
        return await _add_page(datasette, request)
    try:
        sent = await read(request)
        if sent.problem:
            raise Refused(sent.status, sent.problem)
        name = str(sent.first("name") or "").strip()
        if not sent.has_value("secret"):
            raise InvalidSecret("A new secret needs a value")
        version = await service.set_secret(
            datasette,
            name,
            sent.take_value("secret"),
            note=_note(sent),
            actor_id=actor_id(request),
            expected_version=0,
        )
    except (SecretsError, Refused) as error:
        status, sentence = await explain(datasette, error)
        if isinstance(error, VersionConflict):
            sentence = f"{error.name} is stored already: change it on its own page"
        if wants_json(request):
            return json_error(sentence, status)
        return await _add_page(datasette, request, error=sentence, status=status)
    if wants_json(request):
        return json_response({"ok": True, "name": name, "version": version})
    datasette.add_message(request, f"Secret {name} added")
    return redirect(datasette.urls.path(LIST))


async def _add_page(
    datasette: Datasette, request: Request, *, error: str = "", status: int = 200
) -> Response:
    instance = get_instance(datasette)
    return await page(
        datasette,
        request,
        "add",
        {
            "name_max": service.NAME_MAX_CHARACTERS,
            "note_max": service.NOTE_MAX_CHARACTERS,
            "missing_configuration": instance.settings.missing,
            "census": await rotation.census(datasette),
            "read_only": health.why_read_only(instance),
            "error": error,
        },
        status=status,
    )


@view("GET", "POST")
async def action_page(datasette: Datasette, request: Request) -> Response:
    name, action = secret_name(request), request.url_vars["action"]
    if method(request) == "GET":
        if action == "set" or wants_json(request):
            raise not_allowed("POST")
        return await _confirmation(datasette, request, name, action)
    if action == "set":
        return await _set(datasette, request, name)
    await _require(datasette, name)
    return await _act(datasette, request, name, action)


async def _set(datasette: Datasette, request: Request, name: str) -> Response:
    """Store a new value; or with none, change the note."""
    try:
        sent = await read_action(request, "set")
        version, message = await _store(datasette, request, name, sent)
    except (SecretsError, Refused) as error:
        if wants_json(request) or await listing.find_secret(datasette, name) is None:
            raise
        status, sentence = await explain(datasette, error)
        return await _secret_page(
            datasette, request, name, error=sentence, status=status
        )
    if wants_json(request):
        return json_response({"ok": True, "name": name, "version": version})
    datasette.add_message(request, message)
    return redirect(datasette.urls.path(LIST))


async def _store(
    datasette: Datasette, request: Request, name: str, sent: Body
) -> tuple[int, str]:
    field = "secret" if sent.is_form and sent.has("secret") else "value"
    expected_version = number(sent, "expected_version")
    if sent.has_value(field):
        version = await service.set_secret(
            datasette,
            name,
            sent.take_value(field),
            note=_note(sent),
            actor_id=actor_id(request),
            expected_version=expected_version,
        )
        return version, f"Secret {name} {'stored' if version == 1 else 'updated'}"
    note = _note(sent)
    if note is None:
        raise InvalidSecret(f"{name} needs a value, a note, or both")
    listed = await listing.find_secret(datasette, name)
    if listed is None or listed.newest is None:
        raise InvalidSecret(f"{name} needs a value: none is stored yet")
    if sent.is_form and note == (listed.newest.note or ""):
        return listed.newest.version, f"Nothing changed: no value for {name} was typed"
    version = await service.set_note(
        datasette,
        name,
        note,
        actor_id=actor_id(request),
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
        sent = await read_action(request, action)
        done, message = await _ACTIONS[action](datasette, request, name, sent)
    except (SecretsError, Refused) as error:
        if wants_json(request):
            raise
        status, sentence = await explain(datasette, error)
        return await _confirmation(
            datasette, request, name, action, error=sentence, status=status
        )
    if wants_json(request):
        return json_response({"ok": True, "name": name, **done})
    datasette.add_message(request, message)
    if done.get("remains"):
        datasette.add_message(request, as_sentence(done["remains"]), datasette.WARNING)
    return redirect(present.secret_url(datasette, name))


_Done = tuple[dict[str, Any], str]


async def _delete(
    datasette: Datasette, request: Request, name: str, sent: Body
) -> _Done:
    version = await service.delete_secret(
        datasette,
        name,
        actor_id=actor_id(request),
        expected_version=number(sent, "expected_version"),
    )
    return {"version": version}, f"Secret {name} deleted"


async def _restore(
    datasette: Datasette, request: Request, name: str, sent: Body
) -> _Done:
    version = await service.restore_secret(
        datasette,
        name,
        actor_id=actor_id(request),
        expected_version=number(sent, "expected_version"),
    )
    return {"version": version}, f"Secret {name} restored"


async def _roll_back(
    datasette: Datasette, request: Request, name: str, sent: Body
) -> _Done:
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
    return (
        {"version": version},
        f"Secret {name} rolled back to version {earlier}, as version {version}",
    )


async def _destroy(
    datasette: Datasette, request: Request, name: str, sent: Body
) -> _Done:
    instance = get_instance(datasette)
    stored = {
        str(each.version): each.version
        for each in await store.history(instance.db, name)
    }
    asked = sent.all("versions") + sent.all("version")
    if not asked:
        raise InvalidSecret("Say which versions to destroy")
    if not all(type(each) in (int, str) and str(each) in stored for each in asked):
        raise InvalidSecret(f"{name} has no such version")
    versions = list(dict.fromkeys(stored[str(each)] for each in asked))
    destroyed, cleaned = await service.destroy_versions(
        datasette, name, versions, actor_id=actor_id(request)
    )
    return (
        {"versions": versions, "destroyed": destroyed, "remains": cleaned.remains},
        f"{_enumerate(versions)} of {name} destroyed",
    )


def _enumerate(versions: list[Any]) -> str:
    """These versions in a message, which a cookie carries: browsers drop a large one."""
    if len(versions) > _NUMBERS_MAX:
        return health.count_versions(len(versions))
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
    instance = get_instance(datasette)
    history = await store.history(instance.db, name)
    if not history:
        raise InvalidSecret(f"Nothing is stored for {name}")
    shown = await present.Display.of(datasette, history)
    versions = _version_rows(shown, instance, history, history)
    chosen = set(request.args.getlist("version"))
    if request.args.get("old"):
        chosen |= {str(row.version) for row in versions if not row.is_newest}
    earlier = next((row for row in versions if str(row.version) in chosen), None)
    if action == "rollback" and not error and (earlier is None or earlier.is_destroyed):
        raise Refused(404, f"{name} has no such version to roll back to")
    return await page(
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
            "action_url": present.secret_url(datasette, name, action),
            "expected_version": _expected(history),
            "missing_configuration": instance.settings.missing,
            "read_only": health.why_read_only(instance),
            "error": error,
        },
        status=status,
    )
