"""What is wrong with keys and database and what to do about it: at start, in status, on pages."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from datasette.resources import DatabaseResource
from datasette.utils import StartupError

from . import config, envelope, inspection, rotation, schema, store
from .errors import DatabaseUnavailable, SecretsError, printable
from .instance import Instance, get_instance

if TYPE_CHECKING:
    from datasette.app import Datasette


async def start(datasette: Datasette) -> None:
    """Check the settings and migrate the table.

    Raises Datasette's StartupError, with one sentence, for settings that cannot be used.
    What is merely unfortunate is said on stderr.
    """
    try:
        instance = get_instance(datasette)
    except SecretsError as error:
        raise StartupError(str(error)) from None
    if instance.settings.ring is None:
        _warn(instance.settings.missing)
    if not instance.db.is_mutable:
        _warn("the database of the secrets is immutable: they can be read, not changed")
    try:
        await inspection.require_own(instance.db)
        for warning in await _migrate(instance):
            _warn(warning)
    except DatabaseUnavailable as error:
        _warn(f"{error}; secrets can be read, and not changed")
    for warning in await exposure(datasette):
        _warn(warning)
    # A large table takes a while. Datasettes before 1.0a41 have no background to do it in.
    if hasattr(datasette, "add_background_task"):
        datasette.add_background_task(_inspect, name=f"{config.PLUGIN} check")
    else:
        await _inspect(datasette)


async def _migrate(instance: Instance) -> list[str]:
    """Migrate the table where that is possible; returns what has to be done then."""
    if instance.settings.ring is not None and instance.db.is_mutable:
        await schema.ensure_migrated(instance.db)
    return _needs(instance, await store.key_counts(instance.db))


async def _inspect(datasette: Datasette) -> None:
    """Say on stderr what the check of the whole table finds, what was said aside."""
    with suppress(DatabaseUnavailable):
        for finding in await inspection.inspect(get_instance(datasette).db):
            if finding.code != inspection.MADE_BY_OTHERS:
                _warn(finding.sentence)


def _needs(instance: Instance, counts: list[store.KeyCount]) -> list[str]:
    """What has to be done before all that is stored can be read."""
    ring = instance.settings.ring
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
    print(f"{config.PLUGIN}: {printable(sentence)}", file=sys.stderr)


async def exposure(datasette: Datasette) -> list[str]:
    """Warnings about who can read the rows by SQL, or download the file they are in."""
    instance = get_instance(datasette)
    return [
        warning
        for name in config.exposed_names(datasette)
        for warning in await _exposure(datasette, instance, name)
    ]


async def _exposure(datasette: Datasette, instance: Instance, name: str) -> list[str]:
    doors = [("execute-sql", name, "run SQL in")]
    if datasette.crossdb:
        doors.append(("execute-sql", "_memory", "run SQL across databases, and so in"))
    # Datasette offers a file for download only while nothing can write to it.
    if not instance.db.is_mutable and datasette.setting("allow_download"):
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


def why_read_only(instance: Instance) -> str:
    """Why the database cannot be changed, in one sentence; empty while it can."""
    path = instance.db.path
    if not instance.db.is_mutable:
        return (
            "The database of the secrets is immutable: they can be read, not changed."
        )
    if path and not os.access(path, os.W_OK):
        return (
            "The file of the database cannot be written by this server: secrets can be "
            "read, not changed. Correct the permissions of the file and its folder."
        )
    return ""


@dataclass(frozen=True)
class KeyRow:
    """A master key, and how many versions it wraps."""

    key_id: str
    source: str
    is_primary: bool
    is_configured: bool
    is_removable: bool
    versions: int


def key_rows(census: rotation.Census, sources: Mapping[str, str]) -> list[KeyRow]:
    """The keys of the ring, newest first, then those that rows need and it lacks."""
    return [
        KeyRow(
            key_id=key_id,
            source=sources.get(key_id, ""),
            is_primary=key_id == census.primary,
            is_configured=key_id in census.ring,
            is_removable=key_id in census.removable,
            versions=census.counts.get(key_id, 0),
        )
        for key_id in (*census.ring, *census.missing)
    ]


def what_is_wrong(
    instance: Instance,
    census: rotation.Census,
    findings: list[inspection.Finding],
) -> list[dict[str, str]]:
    problems = [(finding.code, finding.sentence) for finding in findings]
    if instance.settings.ring is None:
        problems.append(("not-configured", instance.settings.missing))
    for key_id in census.missing:
        versions = count_versions(census.counts[key_id])
        verb = "needs" if census.counts[key_id] == 1 else "need"
        problems.append(
            (
                "unknown-master-key",
                f"{versions} {verb} master key {key_id}, which is not configured: add "
                "it to encryption-key, or see what 'datasette secrets verify' says",
            )
        )
    if census.legacy:
        versions = count_versions(census.legacy)
        problems.append(
            (
                "needs-upgrade",
                f"datasette-secrets 0.x stored {versions}: run "
                "'datasette secrets upgrade'",
            )
        )
    return [{"code": code, "message": message} for code, message in problems]


def count_versions(number: int) -> str:
    """`1 version`, `2 versions`."""
    return f"{number:,} version{'' if number == 1 else 's'}"
