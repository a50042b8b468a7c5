"""Checks at start, warns of what is unfortunate, and locks the table against everybody else."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from datasette.permissions import PermissionSQL
from datasette.resources import DatabaseResource, TableResource
from datasette.utils import StartupError

from . import config, service, store
from .errors import DatabaseUnavailable, SecretsError

if TYPE_CHECKING:
    from datasette.app import Datasette


async def start(datasette: Datasette) -> None:
    """Check the settings and migrate the table.

    Raises Datasette's StartupError, with one sentence, for settings that cannot be used.
    What is merely unfortunate is said on stderr.
    """
    try:
        place = service.vault(datasette)
    except SecretsError as error:
        raise StartupError(str(error)) from None
    if place.settings.ring is None:
        _warn(place.settings.missing)
    elif place.db.is_mutable:
        try:
            await store.ensure_migrated(place.db)
        except DatabaseUnavailable as error:
            _warn(f"{error}; secrets can be read, and not changed")
    else:
        _warn("the database of the secrets is immutable: they can be read, not changed")
    try:
        counts = await store.key_counts(place.db)
    except DatabaseUnavailable as error:
        _warn(str(error))
        counts = []
    legacy = sum(count.versions for count in counts if count.is_legacy)
    if legacy:
        _warn(
            f"{legacy} versions were stored by datasette-secrets 0.x and do not open "
            "until they are brought in: run 'datasette secrets upgrade'"
        )
    for warning in await exposure(datasette):
        _warn(warning)


def _warn(sentence: str) -> None:
    print(f"{config.PLUGIN}: {sentence}", file=sys.stderr)


def table_lock(datasette: Datasette, action: str) -> PermissionSQL | None:
    """A rule that nobody, root included, may do `action` to the table of secrets.

    It covers every action on tables, of other plugins too, in the database that the
    configuration names. The internal database needs none: it has no table pages.
    """
    name = config.database_name(datasette)
    known = datasette.actions.get(action)
    if (
        name is None
        or known is None
        or known.resource_class is None
        or not issubclass(known.resource_class, TableResource)
    ):
        return None
    return PermissionSQL(
        sql=(
            "select :datasette_secrets_database as parent, 'datasette_secrets' as child, "
            "0 as allow, 'only datasette-secrets touches this table' as reason"
        ),
        params={"datasette_secrets_database": name},
    )


def write_lock(datasette: Datasette, database: str, request: object) -> Any:
    """A wrapper of Datasette's own writes that keeps them away from the table of secrets.

    `table_lock` forbids them already; but before Datasette 1.0a39 its API to create a
    table asks for permissions on the database alone, and then inserts into one that is
    there. The writes of this plugin come with no request.
    """
    if request is None or database != config.database_name(datasette):
        return None

    def out_of_reach(conn: Any) -> Any:
        with store.table_out_of_reach(conn):
            yield

    return out_of_reach


async def exposure(datasette: Datasette) -> list[str]:
    """Warnings about who can read the rows of a named database by SQL, or download it."""
    place = service.vault(datasette)
    name = place.settings.database
    if name is None:
        return []
    resource = DatabaseResource(name)
    warnings = []
    actions = [("execute-sql", "run SQL in")]
    # Datasette offers a file for download only while nothing can write to it.
    if not place.db.is_mutable and datasette.setting("allow_download"):
        actions.append(("view-database-download", "download"))
    for action, can in actions:
        for who, actor in (
            ("anyone, without signing in,", None),
            ("anyone who is signed in", {"id": "datasette-secrets:nobody"}),
        ):
            if await datasette.allowed(action=action, resource=resource, actor=actor):
                warnings.append(
                    f"{who} can {can} the database '{name}', and so see names, notes, "
                    "times, actors and ciphertext of the secrets: leave 'database' out, "
                    f"or restrict '{action}' there"
                )
                break
    return warnings


def why_read_only(place: service.Vault) -> str:
    """Why the database cannot be changed, in one sentence; empty while it can."""
    path = place.db.path
    if not place.db.is_mutable:
        return (
            "The database of the secrets is immutable: they can be read, not changed."
        )
    if path and not os.access(path, os.W_OK):
        return (
            "The file of the database cannot be written by this server: secrets can be "
            "read, not changed. Correct the permissions of the file and its folder."
        )
    return ""
