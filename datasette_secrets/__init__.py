"""Keeps the secrets that Datasette's other plugins need, such as API keys.

The package. A module imports only from those below it, and a folder is one level:

    cli/            the commands                   web/        the pages and the JSON API
    serialize       the objects of the JSON API and of --json
    health          the start of a server; problems and remedies for status and pages
    permissions     the lock on the tables
    upgrade         re-seal what 0.x stored
    rotation        re-wrap, verify and count all versions, in batches
    checks          run a plugin's check of a value
    listing         states, names, list, find      service     get, set, delete, destroy …
    instance        one Datasette's settings, database, reader and recorder
    last_used       who used what when, in few writes
    store           the statements on secrets
    changes         one path for every change, and the log
    inspection      the one check of the whole tables
    schema          the tables and migrations
    database        read, write, errors, Reader
    config          settings                       registry    Secret and its hook
    events          what plugins are told          containment pages survive errors of plugins
    keyfiles        reading key files, and new keys in those of a ring
    envelope        keys and the envelope: all cryptography but that of 0.x
    fernet          what datasette-secrets 0.x stored
    errors          the error classes
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from datasette.hookspecs import hookimpl

from . import registry
from .containment import contain
from .errors import (
    CannotOpen,
    DatabaseUnavailable,
    InvalidMasterKey,
    InvalidSecret,
    NeedsUpgrade,
    NotConfigured,
    SecretsError,
    UnknownMasterKey,
    VersionConflict,
)
from .registry import CheckResult, Secret, get_secrets

if TYPE_CHECKING:
    from datasette.app import Datasette

    from .listing import SecretState, secret_state
    from .service import delete_secret, get_secret, restore_secret, set_secret

__all__ = [
    "CannotOpen",
    "CheckResult",
    "DatabaseUnavailable",
    "InvalidMasterKey",
    "InvalidSecret",
    "NeedsUpgrade",
    "NotConfigured",
    "Secret",
    "SecretState",
    "SecretsError",
    "UnknownMasterKey",
    "VersionConflict",
    "delete_secret",
    "get_secret",
    "get_secrets",
    "restore_secret",
    "secret_state",
    "set_secret",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Import on first use what needs the database.

        Every `datasette` command imports this package, and few need the database.
        """
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from . import listing, service

        module = listing if hasattr(listing, name) else service
        return getattr(module, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


def get_config(datasette: Datasette) -> dict[str, str] | None:
    """`{"database": …}` if a master key is configured, else None. Kept from 0.x.

    Without the `encryption_key` of 0.x, since no plugin may have a master key.
    """
    from . import config

    settings = config.load(datasette)
    return {"database": settings.database or "_internal"} if settings.ring else None


@hookimpl
def startup(datasette: Datasette) -> Any:
    """Check the settings, and migrate the table."""
    from .health import start

    return start(datasette)


@hookimpl
def shutdown(datasette: Datasette) -> Any:
    """Write the uses that are still queued."""
    from .instance import stop

    return stop(datasette)


@hookimpl
def register_actions() -> Any:
    """`manage-secrets`: see and change everything on the pages of this plugin."""
    from datasette.permissions import Action

    return [Action(name="manage-secrets", description="Manage Datasette secrets")]


@hookimpl
def permission_resources_sql(datasette: Datasette, action: str) -> Any:
    """Lock the tables in a database that can be browsed."""
    from .permissions import table_lock

    return table_lock(datasette, action)


@hookimpl
def write_wrapper(datasette: Datasette, database: str, request: Any) -> Any:
    """Lock the tables against writes for which Datasette checks no table permission."""
    from .permissions import write_lock

    return write_lock(datasette, database, request)


@hookimpl
def register_events() -> Any:
    """Events for changes of values and keys."""
    from .events import EVENTS

    return EVENTS


@hookimpl(tryfirst=True)
def register_output_renderer(datasette: Datasette) -> None:
    """Registers no renderer. It is the first hook that Datasette calls in an instance."""
    from .database import create_private

    registry.register_late_hooks(pm)
    create_private(datasette.get_internal_database())


@hookimpl
def register_routes() -> Any:
    """The pages and the JSON API."""
    from .web import ROUTES

    return ROUTES


@hookimpl
def menu_links(datasette: Datasette, actor: dict[str, Any] | None) -> Any:
    """The link to the pages, for actors with the permission."""
    from .web import menu_links

    return menu_links(datasette, actor)


@hookimpl
def jump_items_sql(datasette: Datasette, actor: dict[str, Any] | None) -> Any:
    """The link in the jump menu, for the same actors."""
    from .web import jump_items

    return jump_items(datasette, actor)


@hookimpl
def register_commands(cli: Any) -> None:
    """`datasette secrets …`"""
    from .cli import secrets

    cli.add_command(secrets)


# If a plugin cannot read its secret, pages are shown without its links.
_homepage_actions = contain("homepage_actions")
_database_actions = contain("database_actions")
_table_actions = contain("table_actions")
_view_actions = contain("view_actions")
_query_actions = contain("query_actions")
_row_actions = contain("row_actions")
_menu_links = contain("menu_links")


# These lines come last: the import loads the other plugins, which import from here.
from datasette.plugins import pm  # noqa: E402

pm.add_hookspecs(registry)
