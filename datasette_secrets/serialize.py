"""The objects of the JSON API and of `--json`. Times are UTC as stored, actors are IDs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from . import health, store

if TYPE_CHECKING:
    from . import changes, database, listing, registry, rotation, upgrade
    from .instance import Instance


def obtain_url(registered: registry.Secret | None) -> str | None:
    """Where to get the secret, if that is a web address."""
    url = registered.obtain_url if registered else None
    try:
        return url if url and urlsplit(url).scheme in ("http", "https") else None
    except ValueError:
        return None


def secret_json(listed: listing.Listed) -> dict[str, Any]:
    registered, newest = listed.registered, listed.newest
    return {
        "name": listed.name,
        "state": listed.state,
        "registered": registered is not None,
        "registered_by": list(registered.registered_by) if registered else [],
        "description": registered.description if registered else None,
        "obtain_url": obtain_url(registered),
        "obtain_label": registered.obtain_label if registered else None,
        **(_version_json(newest) if newest else dict.fromkeys(_VERSION_KEYS)),
        "last_used_at": jsonable(listed.used.at),
        "last_used_by": jsonable(listed.used.by),
        "checked_at": listed.checked.at if listed.checked else None,
        "check": listed.checked.outcome if listed.checked else None,
    }


def version_json(row: listing.HistoryRow) -> dict[str, Any]:
    known = _version_json(row.of)
    return {
        "version": known.pop("version"),
        "state": row.state,
        **known,
        "rolled_back_from": row.rolled_back_from,
        "destroyed_at": row.destroyed.at if row.destroyed else None,
        "destroyed_by": row.destroyed.actor_id if row.destroyed else None,
    }


def entry_json(entry: changes.Entry) -> dict[str, Any]:
    """A row of the change log."""
    known = {key: jsonable(each) for key, each in entry._asdict().items()}
    return {**known, "detail": entry.detail}


# All but the id of the row, the name and the two flags.
_VERSION_KEYS = store.Version._fields[2:-2]


def _version_json(version: store.Version) -> dict[str, Any]:
    known = {key: jsonable(getattr(version, key)) for key in _VERSION_KEYS}
    return {**known, "key_id": None} if version.is_destroyed else known


def jsonable(known: object) -> object:
    """`known`, or its text if it is of another type in a damaged row."""
    return known if known is None or isinstance(known, (str, int)) else str(known)


def rotation_json(instance: Instance, report: rotation.Rotation) -> dict[str, Any]:
    return {
        **_report_json(instance, report),
        "to_change": report.to_change,
        "current": report.current,
        "keys": keys_json(instance, report.census),
    }


def upgrade_json(instance: Instance, report: upgrade.Upgrade) -> dict[str, Any]:
    found = [{"name": name, "version": version} for name, version in report.found]
    return {**_report_json(instance, report), "found": found}


def _report_json(
    instance: Instance, report: rotation.Rotation | upgrade.Upgrade
) -> dict[str, Any]:
    clean_up = report.clean_up
    return {
        "ok": exit_code(report) == 0,
        "database": database_path(instance),
        "dry_run": report.dry_run,
        "changed": report.changed,
        "problems": list(map(asdict, report.problems)),
        "clean_up": clean_up
        and {
            "vacuumed": clean_up.vacuumed,
            "log_emptied": clean_up.log_emptied,
            "remains": clean_up.remains,
        },
    }


def outcome_json(report: rotation.Rotation | upgrade.Upgrade) -> dict[str, Any]:
    """The outcome of a rotation or an upgrade, for the JSON API."""
    problems = list(map(asdict, report.problems))
    for problem in problems:
        del problem["remedy"]  # a command
    remains = report.clean_up.remains if report.clean_up else None
    return {"complete": report.complete, "problems": problems, "remains": remains}


def status_json(
    instance: Instance,
    census: rotation.Census,
    destroyed: int,
    journal_mode: str,
    found: health.Health,
) -> dict[str, Any]:
    return {
        "ok": not found.problems,
        "database": database_path(instance),
        "database_name": instance.settings.database,
        "journal_mode": journal_mode,
        "versions": census.versions,
        "destroyed": destroyed,
        "needs_upgrade": census.legacy,
        "keys": keys_json(instance, census),
        "problems": [each._asdict() for each in found.problems],
        "warnings": [each._asdict() for each in found.warnings],
    }


def verification_json(
    instance: Instance, found: rotation.Verification, table: list[rotation.Problem]
) -> dict[str, Any]:
    problems = table + found.problems
    return {
        "ok": not problems,
        "database": database_path(instance),
        "opened": found.opened,
        "destroyed": found.destroyed,
        "problems": list(map(asdict, problems)),
    }


def database_path(instance: Instance) -> str:
    return str(instance.db.path or instance.db.name)


def keys_json(instance: Instance, census: rotation.Census) -> list[dict[str, Any]]:
    return [key._asdict() for key in health.key_rows(instance, census)]


def exit_code(report: rotation.Rotation | upgrade.Upgrade) -> int:
    """0: done. 1: something is wrong. 3: done, but old copies remain."""
    if report.dry_run:
        return 1 if report.problems else 0
    return exit_code_of_clean_up(report.clean_up) if report.complete else 1


def exit_code_of_clean_up(clean_up: database.CleanUp | None) -> int:
    """3 if a step of the clean-up failed, otherwise 0."""
    is_clean = clean_up is None or (clean_up.log_emptied and not clean_up.failed)
    return 0 if is_clean else 3
