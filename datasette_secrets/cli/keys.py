"""The commands about master keys, and about everything that is stored."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .. import config, health, inspection, keyfiles, rotation, serialize, store
from .. import upgrade as upgrading
from ..database import journal_mode
from ..envelope import generate_master_key
from ..errors import printable
from ..instance import get_instance
from . import arguments, output, prompt
from .arguments import Command, Misuse
from .serve import DatabaseCommand

if TYPE_CHECKING:
    from datasette.app import Datasette


_KEYS_MAX_BYTES = 65_536


_batch_size = click.option(
    "--batch-size",
    type=click.IntRange(1, 100_000),
    metavar="N",
    help="Change this many versions in one transaction",
)


@click.command(cls=Command)
def generate_encryption_key() -> None:
    """Print a new master key

    \b
        (umask 077; set -C; datasette secrets generate-encryption-key > master.key)
    """

    problem = output.print_value(generate_master_key())
    if problem:
        raise click.ClickException(f"No key: {problem}")


class _NewKeyCommand(DatabaseCommand):
    async def check(self, datasette: Datasette) -> None:
        """Make the second file if it is missing, without which no key ring can be read."""
        keyfiles.make_second(config.key_files(datasette))
        await super().check(datasette)


@click.command(cls=_NewKeyCommand)
@click.option(
    "--second", is_flag=True, help="Put the new key into the second file (step 1 of 2)"
)
@click.option(
    "--swap", is_flag=True, help="Exchange the keys of the two files (step 2 of 2)"
)
async def new_key(datasette: Datasette, second: bool, swap: bool) -> None:
    """Put a new master key into the key files

    The first two entries of encryption-key must be files. The current key moves to the
    second file, and a new key goes into the first. With several servers, take two steps
    and restart every server after each: --second, then --swap. No key is ever deleted.

    \b
        datasette secrets new-key -c datasette.yaml --internal internal.db
    """

    if second and swap:
        raise Misuse("--second and --swap are two steps: restart every server between")
    how = "second" if second else "swap" if swap else "new"
    census = await rotation.census(datasette)
    if census.legacy:
        raise click.ClickException(
            f"Nothing was changed: datasette-secrets 0.x stored "
            f"{output.count(census.legacy, 'version')}. Run 'datasette secrets upgrade' "
            "first"
        )
    done = keyfiles.replace(config.key_files(datasette), how, set(census.counts))
    output.print_new_key(done, how)


@click.command(cls=Command)
@click.argument("file", metavar="FILE")
def key_id(file: str) -> None:
    """Print the key ID of each master key in FILE

    FILE may be - for stdin. The keys themselves are never printed.

    \b
        datasette secrets key-id master.key
    """

    found = keyfiles.key_ids(prompt.read_text(file, _KEYS_MAX_BYTES))
    if not found:
        raise click.ClickException("There is no key in it")
    for each in found:
        click.echo(each)


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
@arguments.vacuum
@arguments.actor
@arguments.json
async def rotate_key(
    datasette: Datasette,
    dry_run: bool,
    new_data_keys: bool,
    skip_unopenable: bool,
    batch_size: int | None,
    vacuum: bool,
    actor: str,
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
    await inspection.require_own(instance.db)
    held = await store.count_held(instance.db)
    if not as_json:
        click.echo(f"Database: {output.shown_database(instance)}")
        source = instance.settings.sources[ring.primary.id]
        click.echo(f"Primary master key: {ring.primary.id}, from {printable(source)}")
    if not held.values + held.destroyed:
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
            actor_id=actor,
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
@arguments.vacuum
@arguments.yes
@arguments.actor
@arguments.json
async def upgrade(
    datasette: Datasette,
    dry_run: bool,
    batch_size: int | None,
    vacuum: bool,
    yes: bool,
    actor: str,
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
                batch_size=batch_size or rotation.BATCH_SIZE,
                vacuum=vacuum,
                actor_id=actor,
                progress=advance,
            )
    if as_json:
        output.print_json(serialize.upgrade_json(instance, report))
    else:
        output.print_upgrade(report)
    output.say_what_remains(report.clean_up)
    raise click.exceptions.Exit(serialize.exit_code(report))


@click.command(cls=DatabaseCommand)
@click.option(
    "--due-within",
    type=click.IntRange(0, 36_500),
    metavar="DAYS",
    help="Exit 1 if a secret has to be renewed within so many days",
)
@arguments.json
async def status(datasette: Datasette, due_within: int | None, as_json: bool) -> None:
    """Check keys, database and dates, and say what to do

    Problems make it exit 1. Warnings do not, except for dates with --due-within. It
    decrypts nothing: that is what "verify" is for.

    \b
        datasette secrets status -c datasette.yaml --internal internal.db
    """

    instance = get_instance(datasette)
    findings = await inspection.inspect(instance.db)
    census = await rotation.census(datasette)
    held = await store.count_held(instance.db)
    mode = await journal_mode(instance.db)
    found = await health.examine(datasette, census, findings)
    due = await health.due(datasette, due_within)
    found.warnings.extend([*health.about_files(instance), *due])
    found.warnings.extend(health.about_slots(census))
    is_due = due_within is not None and bool(due)
    if as_json:
        content = serialize.status_json(instance, census, held.destroyed, mode, found)
        output.print_json({**content, "ok": content["ok"] and not is_due})
    else:
        click.echo(f"Database: {output.shown_database(instance)}, journal mode {mode}")
        destroyed = f"{held.destroyed:,} destroyed"
        click.echo(f"Stored: {output.count(census.versions, 'version')}, {destroyed}")
        output.print_keys(instance, census)
        for problem in found.problems:
            click.echo(output.styled(printable(problem.message), fg="red"))
        for warning in found.warnings:
            if warning.code == "old-key-unneeded":
                continue  # said beside the key
            click.echo(output.styled(printable(warning.message), fg="yellow"))
    raise click.exceptions.Exit(1 if found.problems or is_due else 0)


@click.command(cls=DatabaseCommand)
@arguments.json
async def verify(datasette: Datasette, as_json: bool) -> None:
    """Open every version, and name what does not open

    Exits 1 if any does not.

    \b
        datasette secrets verify -c datasette.yaml --internal internal.db
    """

    instance = get_instance(datasette)
    instance.settings.require_ring()
    findings = await inspection.inspect(instance.db)
    census = await rotation.census(datasette)
    with output.progress("Verifying", census.versions) as advance:
        found = await rotation.verify(datasette, progress=advance)
    table = [rotation.Problem.of_finding(each) for each in findings]
    if as_json:
        output.print_json(serialize.verification_json(instance, found, table))
    else:
        verb = "opens" if found.opened == 1 else "open"
        click.echo(
            f"{output.count(found.opened, 'version')} {verb}, "
            f"{len(found.problems):,} not, {found.destroyed:,} destroyed"
        )
        output.print_problems(table + found.problems)
    raise click.exceptions.Exit(1 if table or found.problems else 0)
