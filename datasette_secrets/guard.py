"""Checks at start, warns of what is unfortunate, and locks the table against everybody else."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from datasette.permissions import PermissionSQL
from datasette.resources import DatabaseResource, TableResource
from datasette.utils import StartupError

from . import config, envelope, service, store
from .errors import DatabaseUnavailable, SecretsError, plain

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
        for warning in _needs(place, await store.key_counts(place.db)):
            _warn(warning)
        for warning in await store.what_others_made(place.db):
            _warn(warning)
    except DatabaseUnavailable as error:
        _warn(str(error))
    for warning in await exposure(datasette):
        _warn(warning)


def _needs(place: service.Vault, counts: list[store.KeyCount]) -> list[str]:
    """What has to be done before all that is stored can be read."""
    ring = place.settings.ring
    needs = [
        f"{count.versions} stored versions need master key {count.key_id}, which is not "
        "configured: add it to encryption-key"
        for count in counts
        if not count.is_legacy
        and (ring is None or count.key_id not in ring)
        and envelope.is_key_id(count.key_id)
    ]
    damaged = sum(
        count.versions
        for count in counts
        if not (count.is_legacy or envelope.is_key_id(count.key_id))
    )
    if damaged:
        needs.append(
            f"{damaged} stored versions name no master key: run 'datasette secrets verify'"
        )
    legacy = sum(count.versions for count in counts if count.is_legacy)
    if legacy:
        needs.append(
            f"{legacy} versions were stored by datasette-secrets 0.x and do not open "
            "until they are brought in: run 'datasette secrets upgrade'"
        )
    return needs


def _warn(sentence: str) -> None:
    """One line, whatever a row or a trigger is called."""
    print(f"{config.PLUGIN}: {plain(sentence)}", file=sys.stderr)


def table_lock(datasette: Datasette, action: str) -> list[PermissionSQL]:
    """Rules that nobody, root included, may do `action` to the table of secrets.

    They cover every action on tables, of other plugins too, wherever the table can be
    browsed. The internal database has no table pages, unless its file is served as well.
    """
    known = datasette.actions.get(action)
    if (
        known is None
        or known.resource_class is None
        or not issubclass(known.resource_class, TableResource)
    ):
        return []
    # Datasette binds the parameters of all rules together, so each has a name of its own.
    parameters = {
        f"datasette_secrets_database{number or ''}": name
        for number, name in enumerate(config.exposed_names(datasette))
    }
    return [
        PermissionSQL(
            sql=(
                f"select :{parameter} as parent, 'datasette_secrets' as child, "
                "0 as allow, 'only datasette-secrets touches this table' as reason"
            ),
            params={parameter: name},
        )
        for parameter, name in parameters.items()
    ]


def write_lock(datasette: Datasette, database: str, request: object) -> Any:
    """A wrapper of Datasette's own writes that keeps them away from the table of secrets.

    `table_lock` forbids them already; but before Datasette 1.0a39 its API to create a
    table asks for permissions on the database alone, and then inserts into one that is
    there. The writes of this plugin come with no request.
    """
    if request is None or database not in config.exposed_names(datasette):
        return None

    def out_of_reach(conn: Any) -> Any:
        with store.table_out_of_reach(conn):
            yield

    return out_of_reach


async def exposure(datasette: Datasette) -> list[str]:
    """Warnings about who can read the rows by SQL, or download the file they are in."""
    place = service.vault(datasette)
    return [
        warning
        for name in config.exposed_names(datasette)
        for warning in await _exposure(datasette, place, name)
    ]


async def _exposure(datasette: Datasette, place: service.Vault, name: str) -> list[str]:
    doors = [("execute-sql", name, "run SQL in")]
    if datasette.crossdb:
        doors.append(("execute-sql", "_memory", "run SQL across databases, and so in"))
    # Datasette offers a file for download only while nothing can write to it.
    if not place.db.is_mutable and datasette.setting("allow_download"):
        doors.append(("view-database-download", name, "download"))
    warnings = []
    for action, database, can in doors:
        for who, actor in (
            ("anyone, without signing in,", None),
            ("anyone who is signed in", {"id": "datasette-secrets:nobody"}),
        ):
            if await datasette.allowed(
                action=action, resource=DatabaseResource(database), actor=actor
            ):
                warnings.append(
                    f"{who} can {can} the database '{name}', and so see names, notes, "
                    "times, actors and ciphertext of the secrets: keep them in the "
                    f"internal database alone, or restrict '{action}' on '{database}'"
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
