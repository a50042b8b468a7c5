"""The commands that change secrets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .. import serialize, service, store
from ..errors import SecretsError, printable
from ..instance import get_instance
from . import arguments, output, prompt
from .arguments import Misuse, RenewDate, VersionNumber
from .reads import require_history
from .serve import DatabaseCommand

if TYPE_CHECKING:
    from datasette.app import Datasette


class _StoreCommand(DatabaseCommand):
    creates = True


class _SetCommand(_StoreCommand):
    missing_file = (
        "a value is never taken from the command line, where others can see it: type it "
        "at the prompt, pipe it in, or use --value-file"
    )


@click.command("set", cls=_SetCommand)
@arguments.name
@click.option(
    "--value-file",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="Read the value from this file",
)
@click.option("--note", help="A note for people, up to 100 characters")
@click.option(
    "--renew-by",
    type=RenewDate(),
    metavar="DATE",
    help="Remind you to renew it by this day, YYYY-MM-DD",
)
@click.option(
    "--expected-version",
    type=click.IntRange(0, 2**63 - 1),
    metavar="N",
    help="Refuse if the newest version is another one; 0 for none",
)
@arguments.actor
async def set_(
    datasette: Datasette,
    name: str,
    value_file: str | None,
    note: str | None,
    renew_by: str | None,
    expected_version: int | None,
    actor: str,
) -> None:
    """Store a new version of a secret

    The value is typed at a hidden prompt, or piped in, or read from a file; of what is
    piped or read, one newline at the end is dropped. Without --note, the note of the
    version before is kept.

    \b
        datasette secrets set OPENAI_API_KEY -c datasette.yaml --internal internal.db
        pass show openai | datasette secrets set OPENAI_API_KEY -c datasette.yaml \\
            --internal internal.db
    """

    await service.check_settable(datasette, name, note)
    version = await service.set_secret(
        datasette,
        name,
        prompt.read_value(name, value_file),
        note=note,
        actor_id=actor,
        expected_version=expected_version,
        renew_by=renew_by,
    )
    click.echo(f"Stored {printable(name)} version {version}")


@click.command(cls=DatabaseCommand)
@arguments.name
@click.argument("text")
@arguments.actor
async def note(datasette: Datasette, name: str, text: str, actor: str) -> None:
    """Change the note of a secret, and nothing else

    The note belongs to the newest version, is visible to administrators and not
    encrypted. An empty TEXT clears it.

    \b
        datasette secrets note OPENAI_API_KEY "ask Anna" -c datasette.yaml \\
            --internal internal.db
    """

    version, _ = await service.set_details(
        datasette, name, {"note": text}, actor_id=actor
    )
    click.echo(f"Changed the note of {printable(name)} version {printable(version)}")


@click.command(cls=DatabaseCommand)
@arguments.name
@click.argument("date", type=RenewDate(or_never=True))
@arguments.actor
async def renew(datasette: Datasette, name: str, date: str, actor: str) -> None:
    """Set the date by which a secret has to be renewed

    DATE is YYYY-MM-DD, or "never" to clear it. Nothing happens on that day: "list",
    "status" and the pages remind you from 14 days before. A new value starts without a
    date.

    \b
        datasette secrets renew OPENAI_API_KEY 2031-05-31 -c datasette.yaml \\
            --internal internal.db
    """

    version, _ = await service.set_details(
        datasette, name, {"renew_by": date or None}, actor_id=actor
    )
    said = f"is to be renewed by {date}" if date else "has no date to renew it by"
    click.echo(f"{printable(name)} version {printable(version)} {said}")


@click.command("import", cls=_StoreCommand)
@click.argument("env_file", metavar="FILE")
@click.option("--dry-run", is_flag=True, help="Say what would be done, change nothing")
@click.option(
    "--skip-existing", is_flag=True, help="Leave out the names that are stored already"
)
@arguments.actor
async def import_(
    datasette: Datasette,
    env_file: str,
    dry_run: bool,
    skip_existing: bool,
    actor: str,
) -> None:
    """Store the variables of a .env file as secrets

    All of them or none. Nothing is interpolated, empty values are skipped, and of a name
    that is given twice the last value counts. DATASETTE_SECRETS_ in front of a name is
    dropped. FILE may be - for stdin; after it come the FILES of "datasette serve".

    \b
        datasette secrets import .env -c datasette.yaml --internal internal.db
    """

    ring = get_instance(datasette).settings.require_ring()
    found = prompt.read_env(env_file, ring.any_appears_in)
    if isinstance(found, str):
        raise click.ClickException(f"{found}: nothing was stored")
    for name, line in found.lines.items():
        try:
            await service.check_settable(datasette, name)
        except SecretsError as error:
            raise click.ClickException(
                f"Line {line}: {printable(error)}: nothing was stored"
            ) from None
    for name in found.repeated:
        output.warn(f"{name} is given more than once: the last value counts")
    for name in found.empty:
        output.warn(f"{name} is empty: skipped")
    stored = await service.set_secrets(
        datasette,
        {name: entry.value for name, entry in found.entries.items()},
        skip_existing=skip_existing,
        dry_run=dry_run,
        actor_id=actor,
    )
    for name, version in stored.items():
        if version is None:
            output.warn(f"{name} is stored already: skipped")
        else:
            verb = "Would store" if dry_run else "Stored"
            click.echo(f"{verb} {printable(name)} version {version}")
    if not any(stored.values()):
        click.echo("Nothing was imported")


@click.command(cls=DatabaseCommand)
@arguments.name
@arguments.yes
@arguments.actor
async def delete(datasette: Datasette, name: str, yes: bool, actor: str) -> None:
    """Delete a secret, so that plugins find none

    The value is kept: "restore" brings it back, "destroy" removes it for good.

    \b
        datasette secrets delete OPENAI_API_KEY -c datasette.yaml --internal internal.db
    """

    newest = (await require_history(datasette, name))[0]
    expected = _confirm(f"Delete {name}, now at version {newest.version}?", newest, yes)
    version = await service.delete_secret(
        datasette, name, actor_id=actor, expected_version=expected
    )
    click.echo(f"Deleted {printable(name)}, at version {printable(version)}")


@click.command(cls=DatabaseCommand)
@arguments.name
@arguments.yes
@arguments.actor
async def restore(datasette: Datasette, name: str, yes: bool, actor: str) -> None:
    """Restore a secret that was deleted

    \b
        datasette secrets restore OPENAI_API_KEY -c datasette.yaml --internal internal.db
    """

    newest = (await require_history(datasette, name))[0]
    if not newest.is_deleted and not newest.is_destroyed:
        click.echo(f"{printable(name)} is not deleted")
        return
    expected = _confirm(f"Restore {name} version {newest.version}?", newest, yes)
    version = await service.restore_secret(
        datasette, name, actor_id=actor, expected_version=expected
    )
    click.echo(f"Restored {printable(name)} version {printable(version)}")


@click.command(cls=DatabaseCommand)
@arguments.name
@click.argument("version", type=VersionNumber(), metavar="N")
@arguments.yes
@arguments.actor
async def rollback(
    datasette: Datasette, name: str, version: int, yes: bool, actor: str
) -> None:
    """Store the value of version N again, as a new version

    \b
        datasette secrets rollback OPENAI_API_KEY 2 -c datasette.yaml --internal internal.db
    """

    stored = await require_history(datasette, name)
    if version not in [each.version for each in stored]:
        raise _no_such_version(name, f"version {version}")
    newest = stored[0].version
    expected = _confirm(
        f"Roll {name} back from version {newest} to the value of version {version}?",
        stored[0],
        yes,
    )
    new = await service.roll_back(
        datasette,
        name,
        version,
        actor_id=actor,
        expected_version=expected,
    )
    click.echo(f"Stored {printable(name)} version {new}, with the value of {version}")


@click.command(cls=DatabaseCommand)
@arguments.name
@click.option(
    "--version", "versions", multiple=True, metavar="N", help="A version to destroy"
)
@click.option("--all-but-newest", is_flag=True, help="Destroy every version but one")
@arguments.vacuum
@arguments.yes
@arguments.actor
async def destroy(
    datasette: Datasette,
    name: str,
    versions: tuple[str, ...],
    all_but_newest: bool,
    vacuum: bool,
    yes: bool,
    actor: str,
) -> None:
    """Remove the values of versions for good

    The record stays, the value is gone from the files of the database. Give --version as
    often as needed, or --all-but-newest.

    \b
        datasette secrets destroy OPENAI_API_KEY --version 1 -c datasette.yaml \\
            --internal internal.db
        datasette secrets destroy OPENAI_API_KEY --all-but-newest -c datasette.yaml \\
            --internal internal.db
    """

    if bool(versions) == all_but_newest:
        raise Misuse("Say which versions: --version N, or --all-but-newest")
    stored = await require_history(datasette, name)
    newest = stored[0]
    if all_but_newest:
        versions = tuple(
            str(version.version) for version in stored[1:] if not version.is_destroyed
        )
    chosen = _require_versions(name, stored, versions)
    question = _destroy_question(name, versions, newest)
    destroyed, clean_up = await service.destroy_versions(
        datasette,
        name,
        chosen,
        actor_id=actor,
        expected_version=_confirm(question, newest, yes or not chosen),
        vacuum=vacuum,
    )
    click.echo(f"Destroyed {output.count(destroyed, 'version')} of {printable(name)}")
    output.say_what_remains(clean_up)
    raise click.exceptions.Exit(serialize.exit_code_of_clean_up(clean_up))


def _confirm(question: str, newest: store.Version, yes: bool) -> Any:
    """Ask, and return the version that the answer is about; None if nobody was asked."""
    prompt.confirm(question, yes=yes)
    return None if yes else newest.version


def _no_such_version(name: str, what: str = "such version") -> click.ClickException:
    return click.ClickException(
        f"{printable(name)} has no {what}: see what 'datasette secrets history' lists"
    )


def _require_versions(
    name: str, stored: list[store.Version], versions: tuple[str, ...]
) -> list[int]:
    """These versions as they are stored. A damaged row may have text for a number."""
    known = {str(version.version): version.version for version in stored}
    if not known.keys() >= set(versions):
        raise _no_such_version(name)
    return [known[each] for each in versions]


def _destroy_question(
    name: str, versions: tuple[str, ...], newest: store.Version
) -> str:
    in_use = not newest.is_deleted and str(newest.version) in versions
    return (
        f"Destroy {name} version{'s' if len(versions) > 1 else ''} "
        f"{', '.join(versions)} for good"
        f"{', of which plugins use ' + str(newest.version) if in_use else ''}?"
    )


@click.command(
    "destroy-row",
    cls=DatabaseCommand,
    # An id may be negative, which otherwise looks like an option.
    context_settings={"ignore_unknown_options": True},
)
@click.argument("row_id", type=click.IntRange(-(2**63), 2**63 - 1), metavar="ID")
@arguments.vacuum
@arguments.yes
@arguments.actor
async def destroy_row(
    datasette: Datasette, row_id: int, vacuum: bool, yes: bool, actor: str
) -> None:
    """Remove the value of one damaged row for good

    For a row that has no name or version by which "destroy" could find it. "verify"
    prints the ID.

    \b
        datasette secrets destroy-row 17 -c datasette.yaml --internal internal.db
    """

    prompt.confirm(f"Destroy row {row_id} for good?", yes=yes)
    clean_up = await service.destroy_row(
        datasette, row_id, actor_id=actor, vacuum=vacuum
    )
    click.echo(f"Destroyed row {row_id}")
    output.say_what_remains(clean_up)
    raise click.exceptions.Exit(serialize.exit_code_of_clean_up(clean_up))
