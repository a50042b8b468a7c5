"""The change log, newest first: who did what, when and from where."""

from __future__ import annotations

from datasette.utils.asgi import Response

from .. import changes, serialize
from .answer import json_response, page, view
from .request import Refused, Visit, whole_number

PAGE_SIZE = 100


async def _show_log(visit: Visit) -> Response:
    name, start = visit.argument("name"), visit.argument("_next")
    before = whole_number(start)
    if start and before is None:
        raise Refused(400, "_next must be a whole number")
    entries = await changes.entries(
        visit.instance.db, name=name or None, before=before, limit=PAGE_SIZE + 1
    )
    next_id = str(entries[PAGE_SIZE - 1].id) if len(entries) > PAGE_SIZE else None
    entries = entries[:PAGE_SIZE]
    if visit.wants_json:
        log = [serialize.entry_json(entry) for entry in entries]
        return json_response({"log": log, "next": next_id})
    url = f"{visit.list_url}/-/log"
    return await page(
        visit,
        "log",
        entries,
        entries=entries,
        name=name,
        newest_url=visit.page_url(url, "" if start else None),
        older_url=visit.page_url(url, next_id),
    )


log_page = view(_show_log, "GET")
