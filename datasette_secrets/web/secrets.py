"""The list, the page of a secret, and the forms that store a value.

What was sent stays inside a `Body`, whose `repr` shows nothing. A change that is refused
shows the same page again with the reason, and never sends a value back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from datasette.utils.asgi import Request, Response

from .. import (
    changes,
    checks,
    config,
    database,
    health,
    inspection,
    listing,
    rotation,
    serialize,
    service,
    store,
)
from ..envelope import Plaintext
from ..errors import InvalidSecret, VersionConflict
from ..instance import Instance, get_instance
from . import present
from .answer import (
    LIST,
    Done,
    as_sentence,
    change,
    json_response,
    not_allowed,
    page,
    view,
)
from .encryption import to_rewrap
from .request import (
    Body,
    Refused,
    actor_id,
    flag,
    is_number,
    method,
    number,
    renew_by,
    secret_name,
    wants_json,
)

if TYPE_CHECKING:
    from datasette.app import Datasette

    from ..registry import CheckResult


PAGE_SIZE = 100


#: How many rows of the log the page of a secret shows.
LOG_ROWS = 10


JSON_PAGE_SIZE_MAX = 1_000


@view("GET")
async def list_page(datasette: Datasette, request: Request) -> Response:
    """`GET /-/secrets` and `/-/secrets.json`."""
    if wants_json(request):
        return await _list_json(datasette, request)
    instance = get_instance(datasette)
    query = request.args.get("q") or ""
    state = request.args.get("state") or ""
    sections = await listing.list_sections(
        datasette,
        contains=query,
        state=state if state in listing.STATES else "",
        after=request.args.get("_next") or "",
        size=PAGE_SIZE,
    )
    shown = (*sections.urgent, *sections.others, *sections.removed)
    census = await rotation.census(datasette)
    return await page(
        datasette,
        request,
        "list",
        {
            "show": await present.presenter(
                datasette, [each.newest for each in (*shown, *sections.waiting)]
            ),
            "sections": sections,
            "query": query,
            "state": state,
            "previous_url": None
            if sections.before is None
            else _with(datasette, q=query, state=state, _next=sections.before),
            "next_url": sections.after
            and _with(datasette, q=query, state=state, _next=sections.after),
            "missing_configuration": instance.settings.missing,
            "is_temporary": database.is_temporary(instance.db),
            "notices": list(map(as_sentence, instance.notices)),
            "warnings": await _warnings(datasette, instance, census),
            "census": census,
            "keys": health.key_rows(census, instance.settings.sources),
            "to_rewrap": to_rewrap(census),
            "can_rewrap": any(census.counts.get(key_id) for key_id in census.ring[1:]),
            "add_url": datasette.urls.path(f"{LIST}/-/add"),
            "log_url": datasette.urls.path(f"{LIST}/-/log"),
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
    found = await health.examine(datasette, census)
    warnings = []
    warnings += [
        f"Nothing can be changed. {each.message}"
        for each in found.problems
        if each.code in (inspection.MADE_BY_OTHERS, inspection.DAMAGED)
    ]
    if instance.settings.ring is not None:
        for key_id in census.missing:
            count = census.counts[key_id]
            needs = "needs" if count == 1 else "need"
            warnings.append(
                f"{health.count_versions(count)} {needs} master key {key_id}, which is "
                "not configured. Add it to encryption-key after the first key, and "
                "restart. If it is lost, enter those secrets again."
            )
    # The page has its own words for the rest of the problems.
    return warnings + [
        as_sentence(each.message.rstrip("."))
        for each in found.warnings
        if each.code != "temporary-database"
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
    """`GET /-/secrets/NAME` and `.json`; `POST` stores what its form holds."""
    name = secret_name(request)
    if method(request) == "GET":
        if wants_json(request):
            return await _secret_json(datasette, name)
        return await show_secret(datasette, request, name)
    if request.url_vars.get("format"):
        raise not_allowed("GET")
    await require(datasette, name)
    return await _set(datasette, request, name)


@view("POST")
async def set_page(datasette: Datasette, request: Request) -> Response:
    """`POST /-/secrets/NAME/-/set`: a value, a note or both, under any name."""
    return await _set(datasette, request, secret_name(request))


async def require(datasette: Datasette, name: str) -> listing.Listed:
    """The secret of this name. Raises Refused if there is none."""
    listed = await listing.find_secret(datasette, name)
    if listed is None:
        raise Refused(
            404, "No plugin registered a secret of this name, and none is stored"
        )
    return listed


async def _secret_json(datasette: Datasette, name: str) -> Response:
    listed = await require(datasette, name)
    instance = get_instance(datasette)
    past = await changes.past(instance.db, name)
    return json_response(
        {
            "ok": True,
            "secret": serialize.secret_json(listed),
            "versions": [
                serialize.version_json(
                    version, listing.version_state(instance, version), past
                )
                for version in await store.history(instance.db, name)
            ],
        }
    )


async def show_secret(
    datasette: Datasette,
    request: Request,
    name: str,
    *,
    sent: Body | None = None,
    error: str = "",
    status: int = 200,
) -> Response:
    """The page of a secret. `sent`, `error`: what was refused, and why."""
    listed = await require(datasette, name)
    instance = get_instance(datasette)
    history = await store.history(instance.db, name)
    start = _start_of_page(request, len(history))
    past = await changes.past(instance.db, name)
    rows = history_rows(instance, history, past)[start : start + PAGE_SIZE]
    log = await changes.entries(instance.db, name=name, limit=LOG_ROWS)
    url = present.secret_url(datasette, name)
    return await page(
        datasette,
        request,
        "secret",
        {
            "show": await present.presenter(
                datasette,
                [listed.newest, *(row.of for row in rows)],
                [*log, *past.destroyed.values()],
            ),
            "secret": listed,
            "rows": rows,
            "stored": len(history),
            "newer_url": f"{url}?_start={max(0, start - PAGE_SIZE)}" if start else None,
            "older_url": f"{url}?_start={start + PAGE_SIZE}"
            if start + PAGE_SIZE < len(history)
            else None,
            "stored_state": listing.version_state(instance, history[0])
            if history
            else "not-set",
            "expected_version": expected(history),
            "typed": _typed(
                sent,
                note=history[0].note if history else "",
                renew_by=history[0].renew_by if history else "",
            ),
            "rolled_back_from": history
            and past.rolled_back_from.get(history[0].version),
            "log": log,
            "log_url": f"{datasette.urls.path(LIST)}/-/log?{urlencode({'name': name})}",
            "can_check": bool(listed.registered and listed.registered.check),
            "is_temporary": database.is_temporary(instance.db),
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


def _typed(sent: Body | None, **stored: object) -> dict[str, str]:
    """What the form holds: what is stored, or what was sent in vain. Never a value."""
    if sent is None:
        return {field: str(text or "") for field, text in stored.items()}
    typed = {field: sent.typed(field) for field in stored}
    # A value that was pasted into the wrong field is seldom a good name, or this short.
    name = typed.get("name", "")
    if name and not (name.isascii() and name.isidentifier()):
        typed["name"] = ""
    if len(typed.get("note", "")) > service.NOTE_MAX_CHARACTERS:
        typed["note"] = ""
    return typed


def _start_of_page(request: Request, stored: int) -> int:
    start = request.args.get("_start") or ""
    if start.isascii() and start.isdigit() and len(start) < 17:
        return min(int(start), max(0, stored - 1))
    return 0


def expected(history: list[store.Version]) -> object:
    """The newest version for the form to carry; nothing where its row is damaged."""
    newest = history[0].version if history else 0
    return newest if is_number(newest) else ""


def history_rows(
    instance: Instance, history: list[store.Version], past: changes.Past
) -> list[present.HistoryRow]:
    """The rows of these versions. A note is left out between two that have the same."""
    same = {
        each.id
        for newer, each, older in zip(history, history[1:], history[2:], strict=False)
        if newer.note == each.note == older.note
    }
    readable = {each.version for each in history if not each.is_destroyed}
    return [
        present.HistoryRow(
            version,
            listing.version_state(instance, version),
            is_newest=version.id == history[0].id,
            note="" if version.id in same else str(version.note or ""),
            rolled_back_from=past.rolled_back_from.get(version.version),
            destroyed=past.destroyed.get(version.version),
            copies=[each for each in past.copies(version.version) if each in readable],
        )
        for version in history
    ]


@view("GET", "POST")
async def add_page(datasette: Datasette, request: Request) -> Response:
    """`/-/secrets/-/add`: a secret that no plugin registered."""

    async def show_form(**what: Any) -> Response:
        return await _add_page(datasette, request, **what)

    async def perform(sent: Body) -> Done:
        return await _add(datasette, request, sent)

    if method(request) == "GET":
        return await show_form()
    return await change(
        datasette, request, ("name", "secret", "note", "renew_by"), perform, show_form
    )


async def _add(datasette: Datasette, request: Request, sent: Body) -> Done:
    name = str(sent.first("name") or "").strip()
    if not sent.has_value("secret"):
        raise InvalidSecret("A new secret needs a value")
    if sent.is_form and not sent.first("allow_twin"):
        await _check_twin(datasette, name)
    try:
        version = await service.set_secret(
            datasette,
            name,
            sent.take_value("secret"),
            note=_note(sent),
            renew_by=renew_by(sent),
            actor_id=actor_id(request),
            expected_version=0,
        )
    except VersionConflict:
        sentence = f"{name} is stored already: change it on its own page"
        raise Refused(409, sentence) from None
    return Done(
        {"name": name, "version": version},
        f"Secret {name} added",
        datasette.urls.path(LIST),
        _overridden(datasette, name),
    )


async def _check_twin(datasette: Datasette, name: str) -> None:
    twin = await listing.case_twin(datasette, name)
    if twin is not None:
        raise Refused(
            409,
            f"Not added: {twin} already exists, and differs only in upper and lower "
            "case. Plugins read a secret by its exact name. If you want both, say so "
            "below the name and enter the value again",
        )


def _overridden(datasette: Datasette, name: str) -> list[str]:
    """The warning after a value was stored that the environment overrides."""
    if get_instance(datasette).environment_value(name) is None:
        return []
    variable = config.ENV_PREFIX + name
    return [f"Stored, but plugins still read the environment variable {variable}."]


async def _add_page(
    datasette: Datasette,
    request: Request,
    *,
    sent: Body | None = None,
    error: str = "",
    status: int = 200,
) -> Response:
    instance = get_instance(datasette)
    return await page(
        datasette,
        request,
        "add",
        {
            "typed": _typed(sent, name="", note="", renew_by=""),
            "twin": sent and await listing.case_twin(datasette, sent.typed("name")),
            "is_temporary": database.is_temporary(instance.db),
            "name_max": service.NAME_MAX_CHARACTERS,
            "note_max": service.NOTE_MAX_CHARACTERS,
            "missing_configuration": instance.settings.missing,
            "census": await rotation.census(datasette),
            "read_only": health.why_read_only(instance),
            "error": error,
        },
        status=status,
    )


async def _set(datasette: Datasette, request: Request, name: str) -> Response:
    async def show_form(**what: Any) -> Response:
        return await show_secret(datasette, request, name, **what)

    async def perform(sent: Body) -> Done:
        return await _store(datasette, request, name, sent)

    return await change(
        datasette,
        request,
        ("value", "note", "renew_by", "check", "expected_version"),
        perform,
        show_form,
    )


async def _store(datasette: Datasette, request: Request, name: str, sent: Body) -> Done:
    """Store a new value; or with none, change the note and the date to renew by."""
    field = "secret" if sent.is_form and sent.has("secret") else "value"
    expected_version = number(sent, "expected_version")
    content: dict[str, Any] = {"name": name}
    warnings = []
    if sent.is_form and sent.has("expected_note"):
        await _check_note_unchanged(datasette, name, sent)
    if sent.has_value(field):
        checked = None
        if flag(sent, "check"):
            checked = await _check(datasette, request, name, sent, field)
            content |= {"check": checked.outcome, "message": checked.message}
        version = await service.set_secret(
            datasette,
            name,
            sent.take_value(field),
            note=_note(sent),
            renew_by=await _new_renew_by(datasette, name, sent),
            actor_id=actor_id(request),
            expected_version=expected_version,
        )
        message = f"Secret {name} {'stored' if version == 1 else 'updated'}"
        if checked:
            await checks.log(datasette, name, version, checked, actor_id(request))
            message += f". {describe(checked)}"
        warnings = _overridden(datasette, name)
    else:
        version, message = await _describe(
            datasette, request, name, sent, expected_version
        )
    content["version"] = version
    return Done(content, message, datasette.urls.path(LIST), warnings)


async def _new_renew_by(datasette: Datasette, name: str, sent: Body) -> Any:
    """The date for a new value. That of the value before, which the form shows, is not."""
    date = renew_by(sent)
    state = await listing.secret_state(datasette, name)
    return None if sent.is_form and date == state.renew_by else date


async def _check(
    datasette: Datasette, request: Request, name: str, sent: Body, field: str
) -> CheckResult:
    """What the plugin's check says of the value. Raises Refused if it is rejected."""
    try:
        value = Plaintext.parse(sent.take_value(field))
    except InvalidSecret as error:
        raise InvalidSecret(f"The value of {name} cannot be stored: {error}") from None
    result = await checks.check_new(datasette, name, value, actor_id=actor_id(request))
    if result.outcome == "rejected":
        said = f": {result.message}" if result.message else ""
        raise Refused(
            400,
            f"Not saved, because the value was rejected{said}. Enter it again, or choose "
            "“Save without testing”",
        )
    return result


def describe(result: CheckResult) -> str:
    """The outcome of a check in a message."""
    said = f": {result.message}" if result.message else ""
    return present.Presenter.outcomes[result.outcome] + said


async def _check_note_unchanged(datasette: Datasette, name: str, sent: Body) -> None:
    """Two tabs that change a note: the version is the same in both."""
    listed = await listing.find_secret(datasette, name)
    note = str(listed.newest.note or "") if listed and listed.newest else ""
    # Browsers send other line ends than they were given.
    if note.split() not in (
        str(sent.first("expected_note")).split(),
        str(sent.first("note") or "").split(),
    ):
        raise Refused(
            409,
            f"Not saved: the note of {name} was changed to “{note}” while you were "
            "editing it. Review it, then save again",
        )


async def _describe(
    datasette: Datasette,
    request: Request,
    name: str,
    sent: Body,
    expected_version: int | None,
) -> tuple[int, str]:
    """Change the note, the date to renew by, or both: the version, and what was done."""
    note, date = _note(sent), renew_by(sent)
    dated = (sent.is_form and sent.has("renew_by")) or date is not None
    if note is None and not dated:
        raise InvalidSecret(f"{name} needs a value, a note, or both")
    listed = await listing.find_secret(datasette, name)
    if listed is None or listed.newest is None:
        raise InvalidSecret(f"{name} needs a value: none is stored yet")
    details = {} if note is None else {"note": note}
    if dated:
        details["renew_by"] = date
    version, changed = await service.set_details(
        datasette,
        name,
        details,
        actor_id=actor_id(request),
        expected_version=expected_version,
    )
    if not changed:
        return version, "Nothing to save: enter a value or change the note"
    return version, f"{'Note' if 'note' in changed else 'Date'} updated: {name}"


def _note(sent: Body) -> Any:
    """The note that was sent, for the service to judge; None without one."""
    note = sent.first("note")
    return note.strip() if isinstance(note, str) and sent.is_form else note
