"""Starts the plugin, and finds problems of keys and database for start, status and pages."""

from __future__ import annotations

import os
import shlex
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from datasette.resources import DatabaseResource
from datasette.utils import StartupError

from . import config, envelope, fernet, inspection, listing, rotation, schema, store
from . import upgrade as upgrading
from .database import is_temporary, read
from .errors import (
    DatabaseUnavailable,
    MissingExtra,
    NeedsUpgrade,
    SecretsError,
    say,
    say_once,
)
from .instance import Instance, get_instance

if TYPE_CHECKING:
    from datasette.app import Datasette

#: How many versions or dates one sentence names.
_NAMED_MAX = 10
_NOT_CHANGED = "; secrets can be read but not changed"


class Remark(NamedTuple):
    """A problem or a warning. `code` is stable. `message` says what to do about it."""

    code: str
    message: str


class Health(NamedTuple):
    """The remarks of `status`, the pages and the start of a server.

    `problems`: what keeps secrets from being read or changed, or the table from being
    trusted. `warnings`: risky configuration.
    """

    problems: list[Remark]
    warnings: list[Remark]


async def start(datasette: Datasette) -> None:
    """Check the settings, migrate the table, and print problems and warnings on stderr.

    Raises Datasette's StartupError, with one sentence, for settings that cannot be used.
    """
    try:
        instance = get_instance(datasette)
    except SecretsError as error:
        raise StartupError(str(error)) from None
    try:
        await inspection.require_own(instance.db)
    except DatabaseUnavailable as error:  # nothing else is read from such a table
        say(f"{error}{_NOT_CHANGED}")
        remarks = await _warnings(datasette, instance)
    else:
        await _prepare(datasette, instance)
        found, dates = None, []
        try:
            found = await examine(datasette)
            dates = [remark.message for remark in await due(datasette)]
        except DatabaseUnavailable as error:
            say(str(error))
        if found is None:
            warnings = await _warnings(datasette, instance)
            found = Health(_not_configured(instance), warnings)
        if dates:
            more = f", and {len(dates) - _NAMED_MAX:,} more" * (len(dates) > _NAMED_MAX)
            say("; ".join(dates[:_NAMED_MAX]) + more)
        remarks = found.problems + found.warnings
    for remark in remarks:
        say_once(datasette, remark.message)
    # A large table takes a while. Datasette before 1.0a41 has no background tasks.
    if hasattr(datasette, "add_background_task"):
        datasette.add_background_task(_inspect, name=f"{config.PLUGIN} check")
    else:
        await _inspect(datasette)


async def _inspect(datasette: Datasette) -> None:
    """Print what the check of the tables finds, unless `start` has printed it."""
    with suppress(DatabaseUnavailable):
        for finding in await inspection.inspect(get_instance(datasette).db):
            if finding.code != inspection.MADE_BY_OTHERS:
                say_once(datasette, finding.sentence)


async def _prepare(datasette: Datasette, instance: Instance) -> None:
    """Upgrade and migrate the table, and print what was done or why it failed."""
    if instance.settings.ring is None or not instance.db.is_mutable:
        return
    try:
        done = await upgrading.upgrade_at_start(datasette)
        await schema.ensure_migrated(instance.db)
    except DatabaseUnavailable as error:
        say(f"{error}{_NOT_CHANGED}")
        return
    except (MissingExtra, NeedsUpgrade):
        return  # `examine` reports what is missing
    if done and done.changed:
        was = "was" if done.changed == 1 else "were"
        instance.notices = [
            f"{count_versions(done.changed)} that datasette-secrets 0.x had stored {was} "
            "upgraded at this start"
        ]
        if done.clean_up and done.clean_up.remains:
            instance.notices.append(done.clean_up.remains)
        for notice in instance.notices:
            say(notice)


async def examine(
    datasette: Datasette,
    census: rotation.Census | None = None,
    findings: list[inspection.Finding] | None = None,
) -> Health:
    """The problems and warnings that are known without the whole check. Decrypts nothing.

    `census`, `findings`: those that the caller already has. Raises DatabaseUnavailable.
    """
    instance = get_instance(datasette)
    if findings is None:
        findings = await inspection.current_findings(instance.db)
    if census is None:
        census = await rotation.census(datasette)
    problems = [Remark(each.code, each.sentence) for each in findings]
    problems += _not_configured(instance) + _missing_keys(census)
    if census.legacy:
        problems += await _needs_upgrade(instance, census)
    warnings = await _warnings(datasette, instance) + await _overridden(instance)
    return Health(problems, warnings)


def _not_configured(instance: Instance) -> list[Remark]:
    missing = instance.settings.missing
    return [Remark("not-configured", missing)] if missing else []


async def _warnings(datasette: Datasette, instance: Instance) -> list[Remark]:
    """Risky configuration, known without the table."""
    warnings = [Remark(*each) for each in instance.settings.warnings]
    if instance.settings.ring is not None and is_temporary(instance.db):
        message = (
            "the internal database is temporary, so secrets are lost when the server "
            "stops: start Datasette with --internal and a file"
        )
        warnings.append(Remark("temporary-database", message))
    if reason := why_read_only(instance):
        warnings.append(Remark("read-only", reason))
    if hasattr(datasette, "event_classes"):  # a server, which knows its permissions
        warnings += [Remark("exposed", each) for each in await exposure(datasette)]
    return warnings


def _missing_keys(census: rotation.Census) -> list[Remark]:
    damaged = 0
    messages = []
    for key_id in census.missing:
        if envelope.is_key_id(key_id):
            messages.append(
                f"{_needing(census.counts[key_id])} master key {key_id}, which is not "
                "configured: add it to encryption-key, or restart the server if it is "
                'already there. If the key is lost, see "A key is lost" in '
                ".github/docs/operations.md"
            )
        else:
            damaged += census.counts[key_id]
    if damaged:
        verb = "has" if damaged == 1 else "have"
        messages.append(
            f"{count_versions(damaged)} {verb} no valid key ID: run 'datasette secrets "
            "verify'"
        )
    return [Remark("unknown-master-key", message) for message in messages]


async def _needs_upgrade(instance: Instance, census: rotation.Census) -> list[Remark]:
    def first_secrets(conn: Any) -> list[store.Row]:
        return store.rows_from(conn, -(2**63), _NAMED_MAX, legacy_only=True)

    named: list[str] = []
    too_large: list[str] = []
    for row in await read(instance.db, first_secrets):
        names = too_large if row.is_too_large else named
        names.append(f"{row.name} version {row.version}")
    remarks = []
    if too_large:
        message = (
            "datasette-secrets 0.x stored values that are too large to be upgraded "
            f"({', '.join(too_large)}): set shorter ones, and destroy these versions"
        )
        remarks.append(Remark("needs-upgrade", message))
    count = census.legacy - len(too_large)
    if count <= 0:
        return remarks
    if (more := count - len(named)) > 0:
        named.append(f"{more:,} more")
    if await read(instance.db, schema.legacy_value):
        way_out = fernet.way_out(is_configured=instance.settings.ring is not None)
    else:
        way_out = (
            "add the key that they were stored with to encryption-key, and run "
            "'datasette secrets upgrade'"
        )
    was = "was" if count == 1 else "were"
    message = (
        f"{count_versions(count)} {was} stored by datasette-secrets 0.x and cannot be "
        f"read until upgraded ({', '.join(named)}): {way_out}"
    )
    return [*remarks, Remark("needs-upgrade", message)]


async def _overridden(instance: Instance) -> list[Remark]:
    """The stored secrets that an environment variable overrides."""
    names = sorted(instance.overridden_names())
    return [
        Remark(
            "overridden",
            f"the environment variable {config.ENV_PREFIX}{each.name} overrides the "
            f"stored value of {each.name}",
        )
        for each in await store.newest_versions(instance.db, names)
    ]


async def due(datasette: Datasette, days: int | None = None) -> list[Remark]:
    """The secrets that have to be renewed within so many days, 14 unless told otherwise."""
    days = listing.DUE_DAYS if days is None else days
    return [
        Remark("due", f"{each.name} has to be renewed by {each.newest.renew_by}")
        for each in await listing.list_due(datasette, days)
        if each.newest
    ]


def about_files(instance: Instance) -> list[Remark]:
    """A warning if other users of the machine can read the database."""
    if not instance.db.path or not config.is_readable_by_others(instance.db.path):
        return []
    path = os.path.abspath(instance.db.path)
    message = (
        f"every user of this machine can read {path}: run chmod o= {shlex.quote(path)}"
    )
    return [Remark("database-mode", message)]


def about_slots(census: rotation.Census) -> list[Remark]:
    """What to do with the keys after the first one."""
    remarks = []
    for key_id in census.ring[1:]:
        if count := census.counts.get(key_id, 0):
            message = (
                f"{_needing(count, 'still ')} the old master key {key_id}: restart "
                "every server, then run 'datasette secrets rotate-key'"
            )
            remarks.append(Remark("old-key-needed", message))
    return remarks + unneeded_keys(census)


def unneeded_keys(census: rotation.Census) -> list[Remark]:
    """What to do with the keys that no version needs."""
    return [
        Remark(
            "old-key-unneeded",
            f"no version needs master key {key_id}. If it is a new key, leave it. If it is "
            "the old one: once every server has restarted with the new key listed first, "
            "keep a copy for backups and empty its file or entry",
        )
        for key_id in census.removable
    ]


async def exposure(datasette: Datasette) -> list[str]:
    """Warnings about who can read the rows by SQL, or download the file they are in."""
    doors = []
    for name in config.exposed_names(datasette):
        doors.append(("execute-sql", name, f"run SQL in the database '{name}'"))
        if datasette.crossdb:
            can = f"run SQL across databases, and so in the database '{name}'"
            doors.append(("execute-sql", "_memory", can))
        # Datasette offers a file for download if it is attached as immutable.
        if not datasette.databases[name].is_mutable and datasette.setting(
            "allow_download"
        ):
            can = f"download the database '{name}'"
            doors.append(("view-database-download", name, can))
    warnings = []
    for action, database, can in doors:
        for who, actor in (
            ("anyone, without signing in,", None),
            ("anyone who is signed in", {"id": "datasette-secrets:nobody"}),
        ):
            resource = DatabaseResource(database)
            try:
                allowed = await datasette.allowed(
                    action=action, resource=resource, actor=actor
                )
            except Exception as error:  # of a plugin, which may not have started yet
                warnings.append(
                    f"a permission rule failed ({type(error).__name__}), so it is "
                    f"unknown whether {who} can {can}"
                )
                break
            if allowed:
                warnings.append(
                    f"{who} can {can}, and so see names, notes, times, actors and "
                    "ciphertext of the secrets: keep them in the internal database only, "
                    f"or restrict '{action}' on '{database}'"
                )
                break
    return warnings


def why_read_only(instance: Instance) -> str:
    """Why the database cannot be changed, in one sentence; empty while it can."""
    path = instance.db.path
    if not instance.db.is_mutable:
        return "The database of the secrets is immutable: they can be read but not changed."
    if path and not os.access(path, os.W_OK):
        return (
            "The file of the database cannot be written by this server: secrets can be "
            "read but not changed. Correct the permissions of the file and its folder."
        )
    return ""


class KeyRow(NamedTuple):
    """A master key, and how many versions it wraps. The names are those in JSON."""

    id: str
    primary: bool
    configured: bool
    removable: bool
    versions: int
    source: str | None


def key_rows(instance: Instance, census: rotation.Census) -> list[KeyRow]:
    """The keys of the ring, newest first, then the missing ones."""
    return [
        KeyRow(
            key_id,
            primary=key_id == census.primary,
            configured=key_id in census.ring,
            removable=key_id in census.removable,
            versions=census.counts.get(key_id, 0),
            source=instance.settings.sources.get(key_id),
        )
        for key_id in (*census.ring, *census.missing)
    ]


def count_versions(number: int) -> str:
    """`1 version`, `2 versions`."""
    return f"{number:,} version{'' if number == 1 else 's'}"


def _needing(number: int, adverb: str = "") -> str:
    return f"{count_versions(number)} {adverb}need{'s' if number == 1 else ''}"
