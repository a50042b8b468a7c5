"""The addresses of the pages and the JSON API, and the links to them.

A value goes in here and never comes out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .actions import check_page, delete_page, destroy_page, restore_page, rollback_page
from .answer import is_allowed
from .encryption import rotate_page, upgrade_page
from .log import log_page
from .request import LIST
from .secrets import add_page, list_page, secret_json, secret_page, set_page

if TYPE_CHECKING:
    from datasette.app import Datasette


def menu_links(datasette: Datasette, actor: dict[str, Any] | None) -> Any:
    """The link in Datasette's menu, for those who may manage secrets."""

    async def links() -> list[dict[str, str]]:
        if not await is_allowed(datasette, actor):
            return []
        return [{"href": datasette.urls.path(LIST), "label": "Manage secrets"}]

    return links


def jump_items(datasette: Datasette, actor: dict[str, Any] | None) -> Any:
    """The entry in Datasette's jump menu, for those who may manage secrets."""
    from datasette.jump import JumpSQL

    async def items() -> list[JumpSQL]:
        if not await is_allowed(datasette, actor):
            return []
        return [
            JumpSQL.menu_item(
                label="Manage secrets",
                url=datasette.urls.path(LIST),
                description="API keys and other credentials that plugins use",
            )
        ]

    return items


_SECRET = r"^/-/secrets/(?P<name>[^/]+)/-"


# The last of these would take the others for names of secrets.
ROUTES = (
    (r"^/-/secrets(?:\.json)?$", list_page),
    (r"^/-/secrets/-/add$", add_page),
    (r"^/-/secrets/-/rotate$", rotate_page),
    (r"^/-/secrets/-/upgrade$", upgrade_page),
    (r"^/-/secrets/-/log(?:\.json)?$", log_page),
    (rf"{_SECRET}/set$", set_page),
    (rf"{_SECRET}/check$", check_page),
    (rf"{_SECRET}/delete$", delete_page),
    (rf"{_SECRET}/restore$", restore_page),
    (rf"{_SECRET}/rollback$", rollback_page),
    (rf"{_SECRET}/destroy$", destroy_page),
    (r"^/-/secrets/(?P<name>[^/]+?)\.json$", secret_json),
    (r"^/-/secrets/(?P<name>[^/]+)$", secret_page),
)
