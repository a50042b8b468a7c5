"""The change log: who did what, when and from where."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlencode

from datasette.utils.asgi import Request, Response

from .. import changes, serialize
from ..instance import get_instance
from . import present
from .answer import LIST, json_response, page, view
from .request import Refused, wants_json

if TYPE_CHECKING:
    from datasette.app import Datasette


PAGE_SIZE = 100


@view("GET")
async def log_page(datasette: Datasette, request: Request) -> Response:
    """`/-/secrets/-/log` and `.json`, newest first; `?name=` for one secret."""
    name = request.args.get("name") or None
    entries = await changes.entries(
        get_instance(datasette).db,
        name=name,
        before=_before(request),
        limit=PAGE_SIZE + 1,
    )
    next_id = entries[PAGE_SIZE - 1].id if len(entries) > PAGE_SIZE else None
    del entries[PAGE_SIZE:]
    if wants_json(request):
        return json_response(
            {
                "ok": True,
                "log": [serialize.entry_json(entry) for entry in entries],
                "next": None if next_id is None else str(next_id),
            }
        )
    arguments = {"name": name} if name else {}
    url = f"{datasette.urls.path(LIST)}/-/log"
    return await page(
        datasette,
        request,
        "log",
        {
            "show": await present.presenter(datasette, (), entries),
            "entries": entries,
            "name": name or "",
            "log_url": url,
            "first_url": request.args.get("_next") and f"{url}?{urlencode(arguments)}",
            "next_url": next_id
            and f"{url}?{urlencode({**arguments, '_next': str(next_id)})}",
        },
    )


def _before(request: Request) -> int | None:
    before = request.args.get("_next") or ""
    if not before:
        return None
    if not (before.isascii() and before.isdigit() and len(before) < 19):
        raise Refused(400, "_next must be a whole number")
    return int(before)
