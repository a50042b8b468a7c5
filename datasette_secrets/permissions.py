"""Locks the tables in a database that can be browsed, against everybody, root included."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from datasette.permissions import PermissionSQL
from datasette.resources import TableResource

from . import config
from .database import authorizer_of_plugins, tables_out_of_reach
from .schema import TABLES

if TYPE_CHECKING:
    from datasette.app import Datasette


def table_lock(datasette: Datasette, action: str) -> list[PermissionSQL]:
    """Rules that nobody, root included, may do `action` to the tables of this plugin.

    They cover every action on tables, of other plugins too, wherever the table can be
    browsed. The internal database has no table pages, unless its file is served as well.
    """
    known = datasette.actions.get(action)
    kind = known.resource_class if known else None
    if kind is None or not issubclass(kind, TableResource):
        return []
    # Datasette binds the parameters of all rules together, so each has a name of its own.
    return [
        PermissionSQL(
            sql=(
                f"select :datasette_secrets_{number} as parent, '{table}' as child, "
                "0 as allow, 'only datasette-secrets touches this table' as reason"
            ),
            params={f"datasette_secrets_{number}": name},
        )
        for number, name in enumerate(config.exposed_names(datasette))
        for table in TABLES
    ]


def write_lock(datasette: Datasette, database: str, request: object) -> Any:
    """A wrapper that keeps Datasette's own writes away from the tables of this plugin.

    `table_lock` covers only what checks permissions on a table. Another plugin may write
    what a request says without one. The writes of this plugin come with no request.
    """
    if request is None or database not in config.exposed_names(datasette):
        return None

    def out_of_reach(conn: Any) -> Any:
        others = authorizer_of_plugins(datasette.databases[database])
        with tables_out_of_reach(conn, TABLES, others):
            yield

    return out_of_reach
