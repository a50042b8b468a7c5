"""The commands on secrets: those that show them, and those that change them.

Results go to stdout, everything else to stderr. Neither a key nor a value comes from the
command line, which other users and the shell's history can see.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from .. import changes, checks, config, health, listing, serialize, service, store
from ..errors import DatabaseUnavailable, SecretsError, printable
from ..instance import get_instance
from . import arguments, output, prompt
from .arguments import flag, option
from .serve import changing_command, command, require_name, stored_versions

if TYPE_CHECKING:
    from datasette.app import Datasette

_USED = ("last_used_at", "last_used_by")


@command("list", params=[arguments.json])
async def list_(datasette: Datasette, as_json: bool) -> None:
    """List the secrets, not their values

    This includes secrets that plugins have declared. The state "environment" is about the
    variables of this shell, not of the server.
    """
    listed = await listing.list_secrets(datasette)
    rows = [serialize.secret_json(each) for each in listed]
    columns = ["name", "state", "version", "updated_at", "updated_by", *_USED, "note"]
    output.print_rows(rows, columns, {"secrets": rows} if as_json else None)


@command(params=[arguments.name, arguments.json])
async def history(datasette: Datasette, name: str, as_json: bool) -> None:
    """List the versions of a secret, not their values"""
    await stored_versions(datasette, name)
    kept = await listing.history(datasette, name)
    rows = [serialize.version_json(each) for each in kept]
    columns = ["version", "state", "created_at", "created_by", *_USED, "key_id", "note"]
    content = {"name": name, "versions": rows}
    output.print_rows(rows, columns, content if as_json else None)


_only = option("--name only NAME", "Only show this secret", arguments.secret_name)
_limit = option(
    "--limit N", "Show at most N", click.IntRange(1, 1_000_000), default=100
)


@command(params=[_only, _limit, arguments.json], example="--name OPENAI_API_KEY")
async def log(
    datasette: Datasette, only: str | None, limit: int, as_json: bool
) -> None:
    """Show who changed what, newest first

    Every change is one entry, and so is every stored value that "get" printed. Anyone who
    can write to the database can edit the log.
    """
    db = get_instance(datasette).db
    entries = await changes.entries(db, name=only, limit=limit)
    if only and not entries:
        await require_name(datasette, only)
    rows = [serialize.entry_json(each) for each in entries]
    columns = ["at", "action", "name", "version", "actor_id", "via", "detail"]
    output.print_rows(rows, columns, {"log": rows} if as_json else None)


_version = option(
    "--version N", "Print this version, even if deleted", arguments.version_number
)


@command(params=[arguments.name, _version, arguments.actor])
async def get(
    datasette: Datasette, name: str, version: int | None, actor_id: str
) -> None:
    """Print the value of a secret, and a newline

    You get what a plugin would get: the environment variable of this shell if it is set,
    or else the newest version. A stored value that is printed is recorded as a use and
    logged.
    """
    failure = f"No value of {printable(name)}"
    if version is None:
        state = await listing.secret_state(datasette, name)
        if state.state == "deleted":
            raise click.ClickException(
                f"{failure}: it was deleted. Restore it with 'datasette secrets restore "
                f"{shlex.quote(printable(name))}'"
            )
        if state.state == "destroyed":
            raise click.ClickException(f"{failure}: its newest version was destroyed")
        if state.source is None:
            raise click.ClickException(f"{failure}: it is not set")
        # The version is settled now, so that the one in the log is the one printed.
        version = state.version if state.source == "database" else None
    if version is None:  # from the environment
        reading = service.get_secret(datasette, name, actor_id)
        output.print_value(failure, await reading)
        return
    stored = service.get_version(datasette, name, version, actor_id=actor_id)
    output.print_value(failure, await stored)
    try:
        await service.log_read(datasette, name, version, actor_id=actor_id)
    except DatabaseUnavailable as error:
        output.warn(f"This read was not logged. {error}")


@command(params=[arguments.name, arguments.actor])
async def check(datasette: Datasette, name: str, actor_id: str) -> int:
    """Ask the provider whether a secret works

    This runs the check of the plugin that declared the secret, on the value that the
    plugin would get. The exit code is 0 if the value works, 1 if the provider rejected
    it, and 3 if that could not be found out.
    """
    result = await checks.check_stored(datasette, name, actor_id=actor_id)
    outcomes = {"works": (0, "works"), "rejected": (1, "was rejected")}
    exit_code, words = outcomes.get(result.outcome, (3, "could not be checked"))
    output.say(f"{name} {words}{f': {result.message}' if result.message else ''}")
    return exit_code


_existing_file = click.Path(exists=True, dir_okay=False)
_set_options = [
    option("--value-file FILE", "Read the value from this file", _existing_file),
    option("--note TEXT", "A note for administrators, up to 100 characters"),
    option("--renew-by DATE", "The day to renew it by, YYYY-MM-DD", arguments.date),
    option(
        "--expected-version N",
        "Refuse unless this is the newest version; 0 for a new secret",
        click.IntRange(0),
    ),
]


@changing_command(
    "set",
    creates=True,
    missing="a value is never taken from the command line, where others can see it. Type "
    "it at the prompt, pipe it in, or use --value-file",
    params=[arguments.name, *_set_options, arguments.actor],
)
async def set_(
    datasette: Datasette,
    name: str,
    value_file: str | None,
    actor_id: str,
    **details: Any,
) -> None:
    """Store a new version of a secret

    Type the value at a hidden prompt, pipe it in, or read it from a file. One newline at
    the end of a pipe or file is dropped. Without --note, the previous note is kept.

    \b
    pass show openai | datasette secrets set OPENAI_API_KEY \\
        -c datasette.yaml --internal internal.db
    """
    await service.check_settable(datasette, name, **details)
    version = await service.set_secret(
        datasette,
        name,
        prompt.read_value(name, value_file),
        actor_id=actor_id,
        **details,
    )
    output.say(f"Stored {name} version {version}")


@changing_command(
    params=[arguments.name, click.Argument(["text"]), arguments.actor],
    example='OPENAI_API_KEY "ask Anna"',
)
async def note(datasette: Datasette, name: str, text: str, actor_id: str) -> None:
    """Change the note of a secret, and nothing else

    The note belongs to the newest version. It is visible to administrators and not
    encrypted. An empty TEXT clears it.
    """
    details = {"note": text}
    version, _ = await service.set_details(datasette, name, details, actor_id=actor_id)
    output.say(f"Changed the note of {name} version {version}")


_date = click.Argument(["date"], type=arguments.date_or_never)


@changing_command(
    params=[arguments.name, _date, arguments.actor], example="OPENAI_API_KEY 2031-05-31"
)
async def renew(datasette: Datasette, name: str, date: str, actor_id: str) -> None:
    """Set the date by which a secret has to be renewed

    DATE is YYYY-MM-DD, or "never" to clear it. "status" and the pages start to remind you
    14 days earlier. Nothing else happens on that day. A new value starts without a date.
    """
    details = {"renew_by": date or None}
    version, _ = await service.set_details(datasette, name, details, actor_id=actor_id)
    due = f"has to be renewed by {date}" if date else "has no date to renew it by"
    output.say(f"{name} version {version} {due}")


_env_file = click.Argument(["env_file"], metavar="FILE")
_skip = flag("--skip-existing", "Skip names that are already stored")


@changing_command(
    "import",
    creates=True,
    params=[_env_file, arguments.dry_run, _skip, arguments.actor],
    example=".env",
)
async def import_(
    datasette: Datasette, env_file: str, dry_run: bool, **options: Any
) -> None:
    """Store the variables of a .env file as secrets

    Either all of them are stored or none. Variables are not expanded, empty values are
    skipped, the last of two values for a name is used, and a DATASETTE_SECRETS_ prefix is
    dropped. FILE may be - for stdin. It comes before the FILES of "datasette serve".
    """
    ring = get_instance(datasette).settings.require_ring()
    found = prompt.read_env(env_file, ring.any_appears_in)
    for name, entry in found.items():
        try:
            await service.check_settable(datasette, name)
        except SecretsError as error:
            raise click.ClickException(
                f"Line {entry.line}: {printable(error)}: nothing was stored"
            ) from None
        shown = config.NOT_SHOWN if prompt.is_key_line(name) else name
        if entry.is_repeated:
            output.warn(f"{shown} is given more than once: the last value is used")
        if entry.value is None:
            output.warn(f"{shown} is empty: skipped")
    stored = await service.set_secrets(
        datasette,
        {name: each.value for name, each in found.items() if each.value is not None},
        dry_run=dry_run,
        **options,
    )
    verb = "Would store" if dry_run else "Stored"
    for name, version in stored.items():
        if version is None:
            output.warn(f"{name} is already stored: skipped")
        else:
            output.say(f"{verb} {name} version {version}")
    if not any(stored.values()):
        output.say("Nothing was imported")


_confirmed = [arguments.name, arguments.yes, arguments.actor]


@changing_command(params=_confirmed)
async def delete(datasette: Datasette, name: str, yes: bool, **options: Any) -> None:
    """Delete a secret, so that plugins see it as unset

    The value is kept. "restore" undoes this, and "destroy" removes the value for good.
    """
    newest, *_ = await stored_versions(datasette, name)
    options |= _confirm(f"Delete {name}, now at version {newest.version}?", newest, yes)
    version = await service.delete_secret(datasette, name, **options)
    output.say(f"Deleted {name}, at version {version}")


@changing_command(params=_confirmed)
async def restore(datasette: Datasette, name: str, yes: bool, **options: Any) -> None:
    """Restore a secret that was deleted"""
    newest, *_ = await stored_versions(datasette, name)
    if not newest.is_deleted and not newest.is_destroyed:
        output.say(f"{name} is not deleted")
        return
    if newest.is_destroyed:  # refused below, so nothing to ask
        options["expected_version"] = newest.version
    else:
        options |= _confirm(f"Restore {name} version {newest.version}?", newest, yes)
    version = await service.restore_secret(datasette, name, **options)
    output.say(f"Restored {name} version {version}")


_number = click.Argument(["version"], type=arguments.version_number, metavar="N")


@changing_command(
    params=[arguments.name, _number, arguments.yes, arguments.actor],
    example="OPENAI_API_KEY 2",
)
async def rollback(
    datasette: Datasette, name: str, version: int, yes: bool, **options: Any
) -> None:
    """Store the value of version N as a new version"""
    newest, *_ = await stored_versions(datasette, name, [version])
    question = f"from version {newest.version} to the value of version {version}?"
    options |= _confirm(f"Roll {name} back {question}", newest, yes)
    new = await service.roll_back(datasette, name, version, **options)
    output.say(f"Stored {name} version {new}, with the value of version {version}")


_versions = option(
    "--version versions N",
    "A version to destroy; can be repeated",
    arguments.version_number,
    multiple=True,
)
_all_but_newest = flag("--all-but-newest", "Destroy every version but the newest")
_destroying = [arguments.vacuum, arguments.yes, arguments.actor]


@changing_command(
    params=[arguments.name, _versions, _all_but_newest, *_destroying],
    example="OPENAI_API_KEY --version 1",
)
async def destroy(
    datasette: Datasette,
    name: str,
    versions: tuple[int, ...],
    all_but_newest: bool,
    yes: bool,
    **options: Any,
) -> int:
    """Remove the values of versions for good

    The values are removed from the files of the database. A record of each version stays.
    """
    if bool(versions) == all_but_newest:
        raise click.UsageError("Use either --version N or --all-but-newest")
    newest, *_ = await stored_versions(datasette, name, versions)
    if all_but_newest:
        versions = tuple(await service.older_versions(datasette, name))
    is_used = not newest.is_deleted and newest.version in versions
    used = f" (plugins use version {newest.version})" if is_used else ""
    rows = await listing.history(datasette, name)
    copied = {each for row in rows if row.of.version in versions for each in row.copies}
    if copies := sorted(copied - {*versions}):
        has = "has" if len(copies) == 1 else "have"
        output.warn(f"{_numbered(copies).capitalize()} {has} the same value")
    question = f"Destroy {name} {_numbered(versions)} for good{used}?"
    options |= _confirm(question, newest, yes or not versions)
    destroyed, clean_up = await service.destroy_versions(
        datasette, name, versions, **options
    )
    output.say(f"Destroyed {health.count_versions(destroyed)} of {name}")
    return output.finish(clean_up)


def _numbered(versions: Sequence[int]) -> str:
    plural = "s" if len(versions) > 1 else ""
    return f"version{plural} {', '.join(map(str, versions))}"


def _confirm(question: str, newest: store.Version, yes: bool) -> dict[str, int]:
    """Ask, and return the version that the answer is about, as what a change expects."""
    prompt.confirm(question, yes=yes)
    return {} if yes else {"expected_version": newest.version}


_ids = click.IntRange(-(2**63), 2**63 - 1)
_row_id = click.Argument(["row_id"], type=_ids, metavar="ID")


@changing_command(
    params=[_row_id, *_destroying],
    example="17",
    # An id may be negative, which otherwise looks like an option.
    context_settings={"ignore_unknown_options": True},
)
async def destroy_row(
    datasette: Datasette, row_id: int, yes: bool, **options: Any
) -> int:
    """Remove the value of one damaged row for good

    Use this for a row without a usable name or version, which "destroy" cannot find.
    "verify" prints its ID.
    """
    row = await service.describe_row(datasette, row_id)
    prompt.confirm(f"Destroy {row} for good?", yes=yes)
    clean_up = await service.destroy_row(datasette, row_id, **options)
    output.say(f"Destroyed {row}")
    return output.finish(clean_up)
