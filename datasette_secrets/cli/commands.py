"""The commands: `datasette secrets …`.

Results go to stdout, everything else to stderr. Exit code 0: all is well; 1: something is
wrong, said in one sentence; 2: bad usage. Neither a key nor a value comes from the command
line, which other users and the shell's history can see.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .. import health, listing, rotation, schema, serialize, service, store
from .. import upgrade as upgrading
from ..database import journal_mode
from ..envelope import generate_master_key
from ..errors import SecretsError, printable
from ..instance import get_instance, stop
from . import output, prompt
from .arguments import Command, Misuse, SecretName, VersionNumber
from .serve import DatabaseCommand, shell_user

if TYPE_CHECKING:
    from datasette.app import Datasette

_actor = click.option(
    "--actor",
    metavar="ID",
    help="Record this as who did it, instead of cli:<login name>",
)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON")
_yes = click.option("-y", "--yes", is_flag=True, help="Do not ask")
_vacuum = click.option(
    "--vacuum",
    is_flag=True,
    help="Rewrite the file at the end, even if it is large or not the internal database",
)
_name = click.argument("name", type=SecretName())
_batch_size = click.option(
    "--batch-size",
    type=click.IntRange(1, 100_000),
    metavar="N",
    help="Change this many versions in one transaction",
)


# Keys.


@click.command(cls=Command)
def generate_encryption_key() -> None:
    """Print a new master key

    \b
        (umask 077; set -C; datasette secrets generate-encryption-key > master.key)
    """

    problem = output.print_value(generate_master_key())
    if problem:
        raise click.ClickException(f"No key: {problem}")


@click.command(cls=DatabaseCommand)
@click.option("--dry-run", is_flag=True, help="Say what would be done, change nothing")
@click.option(
    "--new-data-keys",
    is_flag=True,
    help="Also seal every value afresh, under a new data key",
)
@click.option(
    "--skip-unopenable",
    is_flag=True,
    help="Leave what does not open, change the rest, and still exit 1",
)
@_batch_size
@_vacuum
@_actor
@_json
async def rotate_key(
    datasette: Datasette,
    dry_run: bool,
    new_data_keys: bool,
    skip_unopenable: bool,
    batch_size: int | None,
    vacuum: bool,
    actor: str | None,
    as_json: bool,
) -> None:
    """Wrap every version with the primary master key

    Put the new key first in encryption-key, keep the old one after it, restart the
    servers, and run this. When "status" agrees, remove the old key.

    \b
        datasette secrets rotate-key -c datasette.yaml --internal internal.db
    """

    instance = get_instance(datasette)
    ring = instance.settings.require_ring()
    stored = await store.count_versions(instance.db)
    if not as_json:
        click.echo(f"Database: {output.shown_database(instance)}")
        source = instance.settings.sources[ring.primary.id]
        click.echo(f"Primary master key: {ring.primary.id}, from {printable(source)}")
    if not stored:
        raise click.ClickException(
            f"There are no secrets in {output.shown_database(instance)}: is it the right database?"
        )
    census = await rotation.census(datasette)
    work = census.versions
    if not new_data_keys:
        work -= census.counts.get(ring.primary.id, 0)
    with output.progress("Rotating", work * (1 if dry_run else 2)) as advance:
        report = await rotation.rotate(
            datasette,
            dry_run=dry_run,
            new_data_keys=new_data_keys,
            skip_unopenable=skip_unopenable,
            batch_size=batch_size or rotation.BATCH_SIZE,
            vacuum=vacuum,
            actor_id=actor or shell_user(),
            progress=advance,
        )
    if as_json:
        output.print_json(serialize.rotation_json(instance, report))
    else:
        output.print_rotation(instance, report)
    output.say_why_incomplete(report)
    output.say_what_remains(report.clean_up)
    raise click.exceptions.Exit(serialize.exit_code(report))


@click.command(cls=DatabaseCommand)
@click.option("--dry-run", is_flag=True, help="Say what would be done, change nothing")
@_batch_size
@_vacuum
@_yes
@_actor
@_json
async def upgrade(
    datasette: Datasette,
    dry_run: bool,
    batch_size: int | None,
    vacuum: bool,
    yes: bool,
    actor: str | None,
    as_json: bool,
) -> None:
    """Bring in what datasette-secrets 0.x stored

    Every key of encryption-key is tried. Names, versions, notes, times and actors stay as
    they are. Make a backup first: 0.x cannot read what was brought in.

    \b
        datasette secrets upgrade -c datasette.yaml --internal internal.db
    """

    instance = get_instance(datasette)
    report = await upgrading.upgrade(
        datasette, dry_run=True, batch_size=batch_size or rotation.BATCH_SIZE
    )
    if report.found and not (as_json and (dry_run or yes)):
        stored = (
            f"Stored by datasette-secrets 0.x in {output.shown_database(instance)}:"
        )
        click.echo(stored, err=as_json)
        for name, version in report.found:
            click.echo(f"  {printable(name)} version {printable(version)}", err=as_json)
    if not dry_run:
        if report.found:
            versions = output.count(len(report.found), "version")
            prompt.confirm(f"Bring in {versions}?", yes=yes)
        with output.progress("Bringing in", len(report.found)) as advance:
            report = await upgrading.upgrade(
                datasette,
                # What was listed, and nothing that was planted since.
                only=report.offered,
                batch_size=batch_size or rotation.BATCH_SIZE,
                vacuum=vacuum,
                actor_id=actor or shell_user(),
                progress=advance,
            )
    if as_json:
        output.print_json(serialize.upgrade_json(instance, report))
    else:
        output.print_upgrade(report)
    output.say_what_remains(report.clean_up)
    raise click.exceptions.Exit(serialize.exit_code(report))


# Looking.


@click.command(cls=DatabaseCommand)
@_json
async def status(datasette: Datasette, as_json: bool) -> None:
    """Show which master keys the stored versions need

    Says which keys no row needs any more, and what is wrong; then it exits 1. It opens
    nothing: that is what "verify" is for.

    \b
        datasette secrets status -c datasette.yaml --internal internal.db
    """

    instance = get_instance(datasette)
    census = await rotation.census(datasette)
    stored = await store.count_versions(instance.db)
    mode = await journal_mode(instance.db)
    problems = health.what_is_wrong(
        instance, census, await schema.what_others_made(instance.db)
    )
    if as_json:
        output.print_json(
            {
                "ok": not problems,
                "database": serialize.database_path(instance),
                "database_name": instance.settings.database,
                "journal_mode": mode,
                "versions": census.versions,
                "destroyed": stored - census.versions,
                "needs_upgrade": census.legacy,
                "keys": serialize.keys_json(instance, census),
                "problems": problems,
            }
        )
    else:
        click.echo(f"Database: {output.shown_database(instance)}, journal mode {mode}")
        destroyed = f"{stored - census.versions:,} destroyed"
        click.echo(f"Stored: {output.count(census.versions, 'version')}, {destroyed}")
        output.print_keys(instance, census)
        for problem in problems:
            click.echo(output.styled(printable(problem["message"]), fg="red"))
    if problems:
        raise click.exceptions.Exit(1)


@click.command(cls=DatabaseCommand)
@_json
async def verify(datasette: Datasette, as_json: bool) -> None:
    """Open every version, and name what does not open

    Exits 1 if any does not.

    \b
        datasette secrets verify -c datasette.yaml --internal internal.db
    """

    instance = get_instance(datasette)
    instance.settings.require_ring()
    census = await rotation.census(datasette)
    with output.progress("Verifying", census.versions) as advance:
        found = await rotation.verify(datasette, progress=advance)
    if as_json:
        output.print_json(
            {
                "ok": not found.problems,
                "database": serialize.database_path(instance),
                "opened": found.opened,
                "destroyed": found.destroyed,
                "problems": [serialize.problem_json(each) for each in found.problems],
            }
        )
    else:
        verb = "opens" if found.opened == 1 else "open"
        click.echo(
            f"{output.count(found.opened, 'version')} {verb}, "
            f"{len(found.problems):,} not, {found.destroyed:,} destroyed"
        )
        output.print_problems(found.problems)
    if found.problems:
        raise click.exceptions.Exit(1)


@click.command("list", cls=DatabaseCommand)
@_json
async def list_(datasette: Datasette, as_json: bool) -> None:
    """List the secrets, never their values

    Those that are stored and those that plugins wait for. Environment variables are this
    shell's, not the server's.

    \b
        datasette secrets list -c datasette.yaml --internal internal.db
    """

    listed = await listing.list_secrets(datasette)
    if as_json:
        content = [serialize.secret_json(each) for each in listed]
        output.print_json({"ok": True, "secrets": content})
        return
    output.print_list(listed)


@click.command(cls=DatabaseCommand)
@_name
@_json
async def history(datasette: Datasette, name: str, as_json: bool) -> None:
    """List the versions of a secret, never their values

    \b
        datasette secrets history OPENAI_API_KEY -c datasette.yaml --internal internal.db
    """

    instance = get_instance(datasette)
    versions = await _require_history(datasette, name)
    states = [listing.version_state(instance, version) for version in versions]
    if as_json:
        rows = [
            serialize.version_json(version, state)
            for version, state in zip(versions, states, strict=True)
        ]
        output.print_json({"ok": True, "name": name, "versions": rows})
        return
    output.print_history(versions, states)


# Setting and getting.


class _SetCommand(DatabaseCommand):
    missing_file = (
        "a value is never taken from the command line, where others can see it: type it "
        "at the prompt, pipe it in, or use --value-file"
    )


@click.command("set", cls=_SetCommand)
@_name
@click.option(
    "--value-file",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="Read the value from this file",
)
@click.option("--note", help="A note for people, up to 100 characters")
@click.option(
    "--expected-version",
    type=click.IntRange(0, 2**63 - 1),
    metavar="N",
    help="Refuse if the newest version is another one; 0 for none",
)
@_actor
async def set_(
    datasette: Datasette,
    name: str,
    value_file: str | None,
    note: str | None,
    expected_version: int | None,
    actor: str | None,
) -> None:
    """Store a new version of a secret

    The value is typed at a hidden prompt, or piped in, or read from a file; of what is
    piped or read, one newline at the end is dropped. Without --note, the note of the
    version before is kept.

    \b
        datasette secrets set OPENAI_API_KEY -c datasette.yaml --internal internal.db
        pass show openai | datasette secrets set OPENAI_API_KEY -c datasette.yaml \
            --internal internal.db
    """

    await service.check_settable(datasette, name, note)
    version = await service.set_secret(
        datasette,
        name,
        prompt.read_value(name, value_file),
        note=note,
        actor_id=actor or shell_user(),
        expected_version=expected_version,
    )
    click.echo(f"Stored {printable(name)} version {version}")


@click.command(cls=DatabaseCommand)
@_name
@click.option(
    "--version",
    type=VersionNumber(),
    help="Print this stored version, even if it is deleted",
)
@_actor
async def get(
    datasette: Datasette, name: str, version: int | None, actor: str | None
) -> None:
    """Print the value of a secret, and a newline

    What a plugin would get, from this shell's environment variable or the newest version.
    It is recorded as a use.

    \b
        datasette secrets get OPENAI_API_KEY -c datasette.yaml --internal internal.db
    """

    user = actor or shell_user()
    if version is None:
        problem = output.print_value(await service.get_secret(datasette, name, user))
        listed = await listing.find_secret(datasette, name) if problem else None
        if problem and listed is not None and listed.state == "deleted":
            problem += f": it was deleted, and 'datasette secrets restore {printable(name)}' undoes that"
    else:
        problem = output.print_value(
            await service.get_version(datasette, name, version, actor_id=user)
        )
    await stop(datasette)
    if problem:
        raise click.ClickException(f"No value of {printable(name)}: {problem}")


@click.command("import", cls=DatabaseCommand)
@click.argument("env_file", metavar="FILE")
@click.option("--dry-run", is_flag=True, help="Say what would be done, change nothing")
@click.option(
    "--skip-existing", is_flag=True, help="Leave out the names that are stored already"
)
@_actor
async def import_(
    datasette: Datasette,
    env_file: str,
    dry_run: bool,
    skip_existing: bool,
    actor: str | None,
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
        actor_id=actor or shell_user(),
    )
    for name, version in stored.items():
        if version is None:
            output.warn(f"{name} is stored already: skipped")
        else:
            verb = "Would store" if dry_run else "Stored"
            click.echo(f"{verb} {printable(name)} version {version}")
    if not any(stored.values()):
        click.echo("Nothing was imported")


# Taking away and bringing back.


@click.command(cls=DatabaseCommand)
@_name
@_yes
@_actor
async def delete(datasette: Datasette, name: str, yes: bool, actor: str | None) -> None:
    """Delete a secret, so that plugins find none

    The value is kept: "restore" brings it back, "destroy" removes it for good.

    \b
        datasette secrets delete OPENAI_API_KEY -c datasette.yaml --internal internal.db
    """

    newest = (await _require_history(datasette, name))[0]
    prompt.confirm(f"Delete {name}, now at version {newest.version}?", yes=yes)
    version = await service.delete_secret(
        datasette,
        name,
        actor_id=actor or shell_user(),
        expected_version=None if yes else newest.version,
    )
    click.echo(f"Deleted {printable(name)}, at version {printable(version)}")


@click.command(cls=DatabaseCommand)
@_name
@_yes
@_actor
async def restore(
    datasette: Datasette, name: str, yes: bool, actor: str | None
) -> None:
    """Restore a secret that was deleted

    \b
        datasette secrets restore OPENAI_API_KEY -c datasette.yaml --internal internal.db
    """

    newest = (await _require_history(datasette, name))[0]
    if not newest.is_deleted and not newest.is_destroyed:
        click.echo(f"{printable(name)} is not deleted")
        return
    prompt.confirm(f"Restore {name} version {newest.version}?", yes=yes)
    version = await service.restore_secret(
        datasette,
        name,
        actor_id=actor or shell_user(),
        expected_version=None if yes else newest.version,
    )
    click.echo(f"Restored {printable(name)} version {printable(version)}")


@click.command(cls=DatabaseCommand)
@_name
@click.argument("version", type=VersionNumber(), metavar="N")
@_yes
@_actor
async def rollback(
    datasette: Datasette, name: str, version: int, yes: bool, actor: str | None
) -> None:
    """Store the value of version N again, as a new version

    \b
        datasette secrets rollback OPENAI_API_KEY 2 -c datasette.yaml --internal internal.db
    """

    newest = (await _require_history(datasette, name))[0]
    prompt.confirm(
        f"Roll {name} back from version {newest.version} to the value of version "
        f"{version}?",
        yes=yes,
    )
    new = await service.roll_back(
        datasette,
        name,
        version,
        actor_id=actor or shell_user(),
        expected_version=None if yes else newest.version,
    )
    click.echo(f"Stored {printable(name)} version {new}, with the value of {version}")


@click.command(cls=DatabaseCommand)
@_name
@click.option(
    "--version", "versions", multiple=True, metavar="N", help="A version to destroy"
)
@click.option("--all-but-newest", is_flag=True, help="Destroy every version but one")
@_vacuum
@_yes
@_actor
async def destroy(
    datasette: Datasette,
    name: str,
    versions: tuple[str, ...],
    all_but_newest: bool,
    vacuum: bool,
    yes: bool,
    actor: str | None,
) -> None:
    """Remove the values of versions for good

    The record stays, the value is gone from the files of the database. Give --version as
    often as needed, or --all-but-newest.

    \b
        datasette secrets destroy OPENAI_API_KEY --version 1 -c datasette.yaml \
            --internal internal.db
        datasette secrets destroy OPENAI_API_KEY --all-but-newest -c datasette.yaml \
            --internal internal.db
    """

    if bool(versions) == all_but_newest:
        raise Misuse("Say which versions: --version N, or --all-but-newest")
    stored = await _require_history(datasette, name)
    newest = stored[0]
    if all_but_newest:
        versions = tuple(
            str(version.version) for version in stored[1:] if not version.is_destroyed
        )
    known = {str(version.version): version.version for version in stored}
    if not known.keys() >= set(versions):
        raise click.ClickException(
            f"{printable(name)} has no such version: see what 'datasette secrets history' "
            "lists"
        )
    if versions:
        prompt.confirm(_destroy_question(name, versions, newest), yes=yes)
    destroyed, clean_up = await service.destroy_versions(
        datasette,
        name,
        [known[each] for each in versions],
        actor_id=actor or shell_user(),
        expected_version=None if yes else newest.version,
        vacuum=vacuum,
    )
    click.echo(f"Destroyed {output.count(destroyed, 'version')} of {printable(name)}")
    output.say_what_remains(clean_up)
    raise click.exceptions.Exit(serialize.exit_code_of_clean_up(clean_up))


def _destroy_question(
    name: str, versions: tuple[str, ...], newest: store.Version
) -> str:
    in_use = not newest.is_deleted and str(newest.version) in versions
    return (
        f"Destroy {name} version{'s' if len(versions) > 1 else ''} "
        f"{', '.join(versions)} for good"
        f"{', of which plugins use ' + str(newest.version) if in_use else ''}?"
    )


# What several commands say.


async def _require_history(datasette: Datasette, name: str) -> list[store.Version]:

    versions = await store.history(get_instance(datasette).db, name)
    if not versions:
        raise click.ClickException(f"Nothing is stored for {printable(name)}")
    return versions


COMMANDS = (
    generate_encryption_key,
    rotate_key,
    upgrade,
    status,
    verify,
    list_,
    history,
    set_,
    get,
    import_,
    delete,
    restore,
    rollback,
    destroy,
)
