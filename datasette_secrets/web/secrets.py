"""The list, the page of a secret, and the forms that store a value.

What was sent stays inside a `Body`, whose `repr` shows nothing. A refused form is shown
again with the reason, and never with the value.
"""

from __future__ import annotations

from datasette.utils.asgi import Response

from .. import (
    changes,
    checks,
    config,
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
from ..registry import CheckResult
from . import present
from .answer import Done, as_sentence, form, json_response, page, view
from .request import Refused, Visit, whole_number

PAGE_SIZE = 100

#: How many rows of the log the page of a secret shows.
LOG_ROWS = 10

JSON_PAGE_SIZE_MAX = 1_000


async def _show_list(visit: Visit) -> Response:
    if visit.wants_json:
        return await _list_json(visit)
    query, state = visit.argument("q"), visit.argument("state")
    sections = await listing.list_sections(
        visit.datasette,
        contains=query,
        state=state if state in listing.STATES else "",
        after=visit.argument("_next"),
        size=PAGE_SIZE,
    )
    shown = sections.urgent + sections.waiting + sections.others + sections.removed
    census = await rotation.census(visit.datasette)
    return await page(
        visit,
        "list",
        [seen for each in shown for seen in (each.newest, each.used)],
        sections=sections,
        query=query,
        state=state,
        previous_url=visit.page_url(visit.list_url, sections.before),
        next_url=visit.page_url(visit.list_url, sections.after),
        notices=list(map(as_sentence, visit.instance.notices)),
        warnings=await _warnings(visit, census),
        census=census,
        keys=health.key_rows(visit.instance, census),
        to_rewrap=census.elsewhere - census.legacy,
        can_rewrap=any(census.counts.get(key_id) for key_id in census.ring[1:]),
    )


async def _warnings(visit: Visit, census: rotation.Census) -> list[str]:
    """What the page does not say in another place."""
    said = {"not-configured", "needs-upgrade", "temporary-database"}
    if visit.instance.settings.missing:
        said.add("unknown-master-key")
    found = await health.examine(visit.datasette, census)
    refuses = "Nothing can be changed. "
    return [
        refuses * (each.code in (inspection.MADE_BY_OTHERS, inspection.DAMAGED))
        + as_sentence(each.message)
        for each in (*found.problems, *found.warnings)
        if each.code not in said
    ]


async def _list_json(visit: Visit) -> Response:
    limit = None
    if (size := visit.request.args.get("_size")) is not None:
        limit = min(whole_number(size) or 0, JSON_PAGE_SIZE_MAX)
        if not limit:
            raise Refused(400, "_size must be a positive whole number")
    listed = await listing.list_secrets(
        visit.datasette,
        contains=visit.argument("q"),
        after=visit.argument("_next") or None,
        limit=limit and limit + 1,
    )
    census = await rotation.census(visit.datasette)
    keys = serialize.keys_json(visit.instance, census)
    for key in keys:
        del key["source"]  # how the server is configured
    return json_response(
        {
            "secrets": [serialize.secret_json(each) for each in listed[:limit]],
            "keys": keys,
            "next": listed[limit - 1].name if limit and len(listed) > limit else None,
        }
    )


async def show_secret(visit: Visit) -> Response:
    secret = await visit.secret()
    rows = await listing.history(visit.datasette, visit.name)
    if visit.wants_json:
        versions = list(map(serialize.version_json, rows))
        return json_response(
            {"secret": serialize.secret_json(secret), "versions": versions}
        )
    start = min(whole_number(visit.argument("_start")) or 0, max(0, len(rows) - 1))
    end = start + PAGE_SIZE
    shown = rows[start:end]
    log = await changes.entries(visit.instance.db, name=visit.name, limit=LOG_ROWS)
    return await page(
        visit,
        "secret",
        [
            secret.used,
            *log,
            *(each for row in shown for each in (row.of, row.destroyed)),
        ],
        secret=secret,
        rows=shown,
        newest_row=rows[0] if rows else None,
        stored=len(rows),
        newer=max(0, start - PAGE_SIZE) if start else None,
        older=end if end < len(rows) else None,
        typed=_typed(visit, secret.newest),
        expected=_expected(visit, secret.newest),
        log=log,
        can_check=bool(secret.registered and secret.registered.check),
        census=await rotation.census(visit.datasette),
        can_destroy=any(not row.of.is_destroyed for row in rows),
        can_roll_back=any(row.can_be_copied for row in rows),
    )


def _typed(visit: Visit, newest: store.Version | None = None) -> dict[str, str]:
    """What the form shows: what is stored, or what somebody typed. Never a value."""
    typed = {}
    for field in ("name", "note", "renew_by"):
        stored = str(getattr(newest, field, None) or "")
        is_shown = _is_same_form(visit) or not visit.sent.is_untouched(field)
        is_typed = visit.sent.is_form and visit.sent.has(field) and is_shown
        typed[field] = visit.sent.typed(field) if is_typed else stored
    # A value that was pasted into the wrong field is rarely a valid name, or so short.
    if not (typed["name"].isascii() and typed["name"].isidentifier()):
        typed["name"] = ""
    for field, text in typed.items():
        if visit.instance.settings.has_key_in(text):
            typed[field] = ""
    if len(typed["note"]) > service.NOTE_MAX_CHARACTERS:
        typed["note"] = ""
    return typed


def _expected(visit: Visit, newest: store.Version | None) -> dict[str, object]:
    """The version, note and date that somebody is editing."""
    expected: dict[str, object] = {"version": newest.version if newest else 0}
    expected |= {name: getattr(newest, name, None) for name in ("note", "renew_by")}
    if _is_same_form(visit):
        sent = {name: visit.sent.first(f"expected_{name}") for name in expected}
        if whole_number(str(sent["version"])) is None:
            del sent["version"]
        expected |= {name: each for name, each in sent.items() if each is not None}
    return expected


def _is_same_form(visit: Visit) -> bool:
    """Whether a refused form comes back as it was: not after a conflict, which is shown."""
    return visit.sent.is_form and visit.status != 409


async def _store(visit: Visit) -> Done:
    """Store a new value. Without one, change the note or the renewal date."""
    name, sent = visit.name, visit.sent
    if not sent.has_value:
        return await _set_details(visit)
    expected_version = sent.number("expected_version")
    checked = await _check(visit, expected_version) if sent.flag("check") else None
    done = await _save(visit, name, expected_version)
    if checked is None:
        return done
    version = done.content["version"]
    await checks.log(visit.datasette, name, version, checked, visit.actor_id)
    content = {"check": checked.outcome, "message": checked.message}
    message = f"{done.message}. {describe(checked)}"
    return done._replace(message=message, content=done.content | content)


async def _save(visit: Visit, name: str, expected_version: int | None) -> Done:
    version = await service.set_secret(
        visit.datasette,
        name,
        visit.sent.take_value(),
        actor_id=visit.actor_id,
        expected_version=expected_version,
        **visit.sent.details(),
    )
    message = f"Secret {name} {'stored' if version == 1 else 'updated'}"
    if visit.sent.first("expected_renew_by") and "renew_by" not in visit.sent.details():
        message += ", and its renewal date cleared"
    content = {"name": name, "version": version}
    warning = None
    if visit.instance.environment_value(name) is not None:
        variable = config.ENV_PREFIX + name
        warning = f"Stored, but plugins still read the environment variable {variable}"
    return Done(message, visit.list_url, content, [warning])


async def _set_details(visit: Visit) -> Done:
    name, sent, details = visit.name, visit.sent, visit.sent.details()
    if not (details or (sent.is_form and sent.has("note"))):
        raise InvalidSecret(f"{name} needs a value, a note or a renewal date")
    stored = (await listing.secret_state(visit.datasette, name)).version
    if stored is None:
        raise InvalidSecret(f"{name} needs a value, because none is stored yet")
    version, changed = await service.set_details(
        visit.datasette,
        name,
        details,
        actor_id=visit.actor_id,
        expected_version=sent.number("expected_version"),
        expected={
            each: sent.first(f"expected_{each}")
            for each in details
            if sent.has(f"expected_{each}")
        },
    )
    message = "Nothing to save: enter a value, or change the note or the date"
    if changed:
        what = " and ".join(
            each.replace("renew_by", "renewal date") for each in changed
        )
        message = f"{what.capitalize()} of {name} updated"
    return Done(message, visit.list_url, {"name": name, "version": version})


async def _check(visit: Visit, expected_version: int | None) -> CheckResult:
    """The result of the plugin's check of the value. Raises Refused for a rejected one."""
    name = visit.name
    try:
        value = Plaintext.parse(visit.sent.take_value())
    except InvalidSecret as error:
        raise visit.instance.value_error(name, error) from None
    result = await checks.check_new(
        visit.datasette,
        name,
        value,
        actor_id=visit.actor_id,
        expected_version=expected_version,
        **visit.sent.details(),
    )
    if result.outcome == "rejected":
        said = f": {result.message}" if result.message else ""
        raise Refused(
            400,
            f"Not saved, because the value was rejected{said}. Enter another one, or enter it "
            "again and choose “Save without testing”",
        )
    return result


def describe(result: CheckResult) -> str:
    """The outcome of a check in a message."""
    said = f": {result.message}" if result.message else ""
    return present.Presenter.outcomes[result.outcome] + said


async def _add(visit: Visit) -> Done:
    name = str(visit.sent.first("name") or "").strip()
    if not visit.sent.has_value:
        raise InvalidSecret("A new secret needs a value")
    if visit.sent.is_form and not visit.sent.first("allow_twin"):
        twin = await listing.case_twin(visit.datasette, name)
        if twin is not None:
            raise Refused(
                409,
                f"Not added: {twin} already exists, and the names differ only in case. "
                "Plugins read a secret by its exact name. To add it anyway, tick the box "
                "below the name and enter the value again",
            )
    try:
        done = await _save(visit, name, 0)
    except VersionConflict:
        sentence = f"{name} is already stored. Change it on its own page"
        raise Refused(409, sentence) from None
    return done._replace(message=f"Secret {name} added")


async def _show_add(visit: Visit) -> Response:
    typed = _typed(visit)
    return await page(
        visit,
        "add",
        typed=typed,
        twin=typed["name"] and await listing.case_twin(visit.datasette, typed["name"]),
        census=await rotation.census(visit.datasette),
    )


list_page = view(_show_list, "GET")
secret_json = view(show_secret, "GET")
_FIELDS = ("value", "note", "renew_by", "check", "expected_version")
secret_page = form(show_secret, _store, *_FIELDS, of_secret=True)
set_page = form(show_secret, _store, *_FIELDS, methods=["POST"])
add_page = form(_show_add, _add, "name", "secret", "note", "renew_by")
