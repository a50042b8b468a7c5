"""The commands about master keys, and about everything that is stored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .. import config, health, inspection, keyfiles, rotation, serialize, store
from .. import upgrade as upgrading
from ..database import journal_mode
from ..envelope import generate_master_key
from ..instance import get_instance
from . import arguments, output, prompt
from .arguments import Command, flag, option
from .serve import DatabaseCommand, changing_command, command

if TYPE_CHECKING:
    from datasette.app import Datasette

_batch_size = option(
    "--batch-size N",
    "Change this many versions in one transaction",
    click.IntRange(1, 100_000),
    default=rotation.BATCH_SIZE,
)


@click.command(cls=Command)
def generate_encryption_key() -> None:
    """Print a new master key

    \b
    (umask 077; set -C; datasette secrets generate-encryption-key > master.key)
    """
    output.print_value("No key", generate_master_key())


class _NewKeyCommand(DatabaseCommand):
    async def check(self, datasette: Datasette) -> None:
        """Make the second file if it is missing, without which no key ring can be read."""
        paths = config.key_files(datasette)
        if len(paths) > 1 and None not in paths[:2]:
            keyfiles.make_second(paths)
        await super().check(datasette)


_second = flag("--second", "Put the new key into the second file (step 1 of 2)")
_swap = flag("--swap", "Exchange the keys of the two files (step 2 of 2)")


@command(cls=_NewKeyCommand, look="status", params=[_second, _swap])
async def new_key(datasette: Datasette, second: bool, swap: bool) -> None:
    """Put a new master key into the key files

    The first two entries of encryption-key must be files. The second may be empty. The
    current key moves to the second file, and a new key goes into the first. No key is
    ever deleted.

    If several servers share the files, a plain new-key would let one write what another
    cannot read. Start with --second instead, then use --swap, and restart every server
    after each.
    """
    if second and swap:
        raise click.UsageError(
            "--second and --swap are two steps: restart every server in between"
        )
    how = "second" if second else "swap" if swap else "new"
    census = await rotation.census(datasette)
    if census.legacy:
        raise click.ClickException(
            "Nothing was changed: datasette-secrets 0.x stored "
            f"{health.count_versions(census.legacy)}. Run 'datasette secrets upgrade' "
            "first"
        )
    done = keyfiles.replace(config.key_files(datasette), how, set(census.counts))
    output.print_new_key(done, how)


_file = click.Argument(["file"], metavar="FILE")


@click.command(cls=Command, params=[_file], example="master.key")
def key_id(file: str) -> None:
    """Print the key ID of each master key in FILE

    FILE may be - for stdin. The keys themselves are never printed.
    """
    found = keyfiles.key_ids(prompt.read_text(file, keyfiles.READ_MAX))
    if not found:
        raise click.ClickException("There is no key in this file")
    output.print_value("No key ID", "\n".join(found))


_new_data_keys = flag("--new-data-keys", "Also seal every value with a new data key")
_skip = flag(
    "--skip-unopenable", "Skip what cannot be decrypted, and exit 1 at the end"
)
_rewriting = [_batch_size, arguments.vacuum, arguments.actor, arguments.json]


@changing_command(params=[arguments.dry_run, _new_data_keys, _skip, *_rewriting])
async def rotate_key(datasette: Datasette, as_json: bool, **options: Any) -> int:
    """Re-wrap every version with the primary master key

    First put a new key into the configuration with "new-key", and restart the servers.
    When "status" says that no version needs the old key, keep a copy for backups and
    empty its file.
    """
    instance = get_instance(datasette)
    ring = instance.settings.require_ring()
    await inspection.require_own(instance.db)
    held = await store.count_held(instance.db)
    path = output.path_of(datasette)
    if not as_json:
        output.say(f"Database: {path}")
        source = instance.settings.sources[ring.primary.id]
        output.say(f"Primary master key: {ring.primary.id}, from {source}")
    if not held.values + held.destroyed:
        raise click.ClickException(
            f"There are no secrets in {path}: is it the right database?"
        )
    census = await rotation.census(datasette)
    steps = census.versions if options["new_data_keys"] else census.elsewhere
    steps *= 1 if options["dry_run"] else 2
    with output.progress("Rotating", steps) as bar:
        report = await rotation.rotate(datasette, progress=bar.update, **options)
    if as_json:
        output.print_json(serialize.rotation_json(instance, report))
    else:
        output.print_rotation(instance, report)
    if not (report.dry_run or report.complete or report.problems):
        output.warn(
            "Versions are left under another master key: a server whose first key is "
            "another one still writes, or something in the database undoes the changes. "
            "Restart every server with the new key first, and run this again"
        )
    output.finish(report.clean_up)
    return serialize.exit_code(report)


@changing_command(params=[arguments.dry_run, arguments.yes, *_rewriting])
async def upgrade(
    datasette: Datasette, dry_run: bool, yes: bool, as_json: bool, **options: Any
) -> int:
    """Upgrade what datasette-secrets 0.x stored

    Every key of encryption-key is tried. Names, versions, notes, times and actors stay as
    they are. Make a backup first, because 0.x cannot read what was upgraded.
    """
    report = await upgrading.upgrade(datasette, dry_run=True)
    if report.found and not (as_json and (dry_run or yes)):
        path = output.path_of(datasette)
        output.say(f"Stored by datasette-secrets 0.x in {path}:", err=as_json)
        for name, version in report.found:
            output.say(f"  {name} version {version}", err=as_json)
    if not dry_run:
        found = len(report.found)
        prompt.confirm(f"Upgrade {health.count_versions(found)}?", yes=yes or not found)
        with output.progress("Upgrading", found) as bar:
            report = await upgrading.upgrade(datasette, progress=bar.update, **options)
    if as_json:
        output.print_json(serialize.upgrade_json(get_instance(datasette), report))
    else:
        output.print_upgrade(report)
    output.finish(report.clean_up)
    return serialize.exit_code(report)


_due_within = option(
    "--due-within DAYS",
    "Exit 1 if a secret has to be renewed within this many days",
    click.IntRange(0, 36_500),
)


@command(params=[_due_within, arguments.json])
async def status(datasette: Datasette, due_within: int | None, as_json: bool) -> int:
    """Report problems, and what to do about them

    This checks keys, database and dates. The exit code is 1 if there is a problem.
    Warnings do not change it, except for dates with --due-within. Nothing is decrypted:
    use "verify" for that.
    """
    instance = get_instance(datasette)
    findings = await inspection.inspect(instance.db)
    census = await rotation.census(datasette)
    held = await store.count_held(instance.db)
    mode = await journal_mode(instance.db)
    found = await health.examine(datasette, census, findings)
    due = await health.due(datasette, due_within)
    about = [*health.about_files(instance), *due, *health.about_slots(census)]
    found.warnings.extend(about)
    is_due = due_within is not None and bool(due)
    if as_json:
        content = serialize.status_json(instance, census, held.destroyed, mode, found)
        output.print_json({**content, "ok": content["ok"] and not is_due})
    else:
        output.say(f"Database: {output.path_of(datasette)}, journal mode {mode}")
        versions = health.count_versions(census.versions)
        output.say(f"Stored: {versions}, {held.destroyed:,} destroyed")
        output.print_keys(instance, census)
        for problem in found.problems:
            output.say(problem.message, fg="red")
        for warning in found.warnings:
            output.say(warning.message, fg="yellow")
    return 1 if found.problems or is_due else 0


@command(params=[arguments.json])
async def verify(datasette: Datasette, as_json: bool) -> int:
    """Check that every version can be decrypted

    The exit code is 1 if one cannot. Each of those is named, with what to do about it.
    """
    instance = get_instance(datasette)
    instance.settings.require_ring()
    findings = await inspection.inspect(instance.db)
    census = await rotation.census(datasette)
    with output.progress("Verifying", census.versions) as bar:
        found = await rotation.verify(datasette, progress=bar.update)
    table = [rotation.Problem(None, None, *each) for each in findings]
    if as_json:
        output.print_json(serialize.verification_json(instance, found, table))
    else:
        output.print_verification(found, table)
    return 1 if table or found.problems else 0
