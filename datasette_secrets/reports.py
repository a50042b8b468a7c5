"""What the commands say: of rotations, keys, problems and clean-ups, as text and JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from . import display, shell
from .errors import plain

if TYPE_CHECKING:
    from . import rotation, service, store


def print_rotation(place: service.Vault, report: rotation.Rotation) -> None:
    versions = shell.count(report.to_change, "version")
    current = f"{report.current:,} {'is' if report.current == 1 else 'are'} current"
    if report.dry_run:
        click.echo(f"Would re-wrap {versions}; {current}")
    elif report.clean_up is None:
        click.echo(f"Nothing was changed; {versions} to re-wrap, {current}")
    else:
        click.echo(
            f"Re-wrapped {shell.count(report.changed, 'version')}; "
            f"{report.current:,} had nothing to change"
        )
    if not report.to_change and not report.problems:
        click.echo("To replace the master key, put a new one first in encryption-key")
    print_problems(report.problems)
    if report.problems and report.clean_up is None:
        click.echo("Deal with these first, or rotate the rest with --skip-unopenable")
    if report.census is not None:
        print_keys(place, report.census)


def rotation_json(place: service.Vault, report: rotation.Rotation) -> dict[str, Any]:
    return {
        "ok": is_well(report),
        "database": database_path(place),
        "dry_run": report.dry_run,
        "to_change": report.to_change,
        "changed": report.changed,
        "current": report.current,
        "problems": [problem_json(each) for each in report.problems],
        "keys": keys_json(place, report.census) if report.census else [],
        "clean_up": clean_up_json(report.clean_up),
    }


def print_upgrade(report: rotation.Upgrade) -> None:
    found = shell.count(len(report.found), "version")
    if not report.found:
        click.echo("Nothing that datasette-secrets 0.x stored is left")
    elif report.dry_run:
        opens = len(report.found) - len(report.problems)
        click.echo(f"Would bring in {opens:,} of {found}")
    else:
        click.echo(f"Brought in {report.changed:,} of {found}")
    print_problems(report.problems)


def upgrade_json(place: service.Vault, report: rotation.Upgrade) -> dict[str, Any]:
    return {
        "ok": is_well(report),
        "database": database_path(place),
        "dry_run": report.dry_run,
        "found": [{"name": name, "version": version} for name, version in report.found],
        "changed": report.changed,
        "problems": [problem_json(each) for each in report.problems],
        "clean_up": clean_up_json(report.clean_up),
    }


def print_list(listed: list[service.Listed]) -> None:
    shell.print_table(
        ("NAME", "STATE", "VERSION", "UPDATED", "BY", "LAST USED", "BY", "NOTE"),
        [(each.name, each.state, *_newest_cells(each)) for each in listed],
    )


def _newest_cells(listed: service.Listed) -> tuple[object, ...]:
    newest, used = listed.newest, listed.used
    if newest is None:
        return (None,) * 6
    return (
        newest.version,
        newest.updated_at,
        newest.updated_by,
        used.at,
        used.by,
        newest.note,
    )


def print_history(versions: list[store.Version], states: list[str]) -> None:
    shell.print_table(
        ("VERSION", "STATE", "CREATED", "BY", "LAST USED", "BY", "KEY", "NOTE"),
        [
            (
                version.version,
                state,
                version.created_at,
                version.created_by,
                version.last_used_at,
                version.last_used_by,
                None if version.is_destroyed else version.key_id,
                version.note,
            )
            for version, state in zip(versions, states, strict=True)
        ],
    )


def what_is_wrong(
    place: service.Vault, census: rotation.Census, made_by_others: list[str]
) -> list[dict[str, str]]:
    problems = [("made-by-others", sentence) for sentence in made_by_others]
    if place.settings.ring is None:
        problems.append(("not-configured", place.settings.missing))
    for key_id in census.missing:
        versions = shell.count(census.counts[key_id], "version")
        verb = "needs" if census.counts[key_id] == 1 else "need"
        problems.append(
            (
                "unknown-master-key",
                f"{versions} {verb} master key {key_id}, which is not configured: add "
                "it to encryption-key, or see what 'datasette secrets verify' says",
            )
        )
    if census.legacy:
        versions = shell.count(census.legacy, "version")
        problems.append(
            (
                "needs-upgrade",
                f"datasette-secrets 0.x stored {versions}: run "
                "'datasette secrets upgrade'",
            )
        )
    return [{"code": code, "message": message} for code, message in problems]


def database_path(place: service.Vault) -> str:
    return str(place.db.path or place.db.name)


def database(place: service.Vault) -> str:
    return plain(database_path(place))


def print_problems(problems: list[rotation.Problem]) -> None:
    for problem in problems:
        click.echo(shell.styled(plain(problem.message), fg="red"))
        click.echo(f"  {plain(problem.remedy)}")


def problem_json(problem: rotation.Problem) -> dict[str, Any]:
    return {
        "name": problem.name,
        "version": problem.version,
        "code": problem.code,
        "message": problem.message,
        "remedy": problem.remedy,
    }


def print_keys(place: service.Vault, census: rotation.Census) -> None:
    for key in display.key_rows(census, place.settings.sources):
        role = (
            "primary"
            if key.is_primary
            else "in the ring"
            if key.is_configured
            else "not configured"
        )
        source = f", {plain(key.source)}" if key.source else ""
        versions = f"wraps {shell.count(key.versions, 'version')}"
        click.echo(f"  {plain(key.key_id)}  {role}{source}: {versions}")
        if key.is_removable:
            click.echo(
                "    No row here needs it now. Keep it for backups, and run status "
                "again once every server has restarted with the new key first."
            )


def keys_json(place: service.Vault, census: rotation.Census) -> list[dict[str, Any]]:
    return [
        {**display.key_json(key), "source": key.source or None}
        for key in display.key_rows(census, place.settings.sources)
    ]


def is_well(report: rotation.Rotation | rotation.Upgrade) -> bool:
    """Whether nothing is left to do or to mend."""
    if report.dry_run:
        return not report.problems
    return report.complete and is_clean(report.clean_up)


def is_clean(clean_up: store.CleanUp | None) -> bool:
    """Whether a clean-up, if there was one, did all that it was to do."""
    return clean_up is None or (clean_up.log_emptied and not clean_up.failed)


def say_what_remains(clean_up: store.CleanUp | None) -> None:
    if clean_up is not None and clean_up.remains:
        shell.warn(f"{clean_up.remains[0].upper()}{clean_up.remains[1:]}")


def say_why_incomplete(report: rotation.Rotation) -> None:
    """Why versions are left under another key, where no version is to blame."""
    if not (report.dry_run or report.complete or report.problems):
        shell.warn(
            "Versions are left under another master key: a server whose first key is "
            "another one goes on writing, or the database undoes the changes. Restart "
            "the servers with the new key first, and run this again"
        )


def clean_up_json(clean_up: store.CleanUp | None) -> dict[str, Any] | None:
    if clean_up is None:
        return None
    return {
        "vacuumed": clean_up.vacuumed,
        "log_emptied": clean_up.log_emptied,
        "remains": clean_up.remains,
    }
