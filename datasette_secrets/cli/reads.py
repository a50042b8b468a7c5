"""The commands that show secrets and change none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .. import changes, checks, listing, serialize, service, store
from ..errors import DatabaseUnavailable, printable
from ..instance import get_instance, stop
from . import arguments, output
from .arguments import VersionNumber
from .serve import DatabaseCommand

if TYPE_CHECKING:
    from datasette.app import Datasette


@click.command("list", cls=DatabaseCommand)
@arguments.json
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
@arguments.name
@arguments.json
async def history(datasette: Datasette, name: str, as_json: bool) -> None:
    """List the versions of a secret, never their values

    \b
        datasette secrets history OPENAI_API_KEY -c datasette.yaml --internal internal.db
    """

    instance = get_instance(datasette)
    versions = await require_history(datasette, name)
    states = [listing.version_state(instance, version) for version in versions]
    if as_json:
        past = await changes.past(instance.db, name)
        rows = [
            serialize.version_json(version, state, past)
            for version, state in zip(versions, states, strict=True)
        ]
        output.print_json({"ok": True, "name": name, "versions": rows})
        return
    output.print_history(versions, states)


@click.command(cls=DatabaseCommand)
@arguments.name
@click.option(
    "--version",
    type=VersionNumber(),
    help="Print this stored version, even if it is deleted",
)
@arguments.actor
async def get(datasette: Datasette, name: str, version: int | None, actor: str) -> None:
    """Print the value of a secret, and a newline

    What a plugin would get, from this shell's environment variable or the newest version.
    It is recorded as a use.

    \b
        datasette secrets get OPENAI_API_KEY -c datasette.yaml --internal internal.db
    """

    user = actor
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
    try:
        await service.log_read(datasette, name, version, actor_id=actor)
    except DatabaseUnavailable as error:
        output.warn(f"This read was not logged. {error}")


@click.command(cls=DatabaseCommand)
@arguments.name
@arguments.actor
async def check(datasette: Datasette, name: str, actor: str) -> None:
    """Ask the provider whether the value of a secret works

    The plugin that registered the check is given what it would get itself, from this
    shell's environment variable or the newest version, and asks the provider. Exit 0: the
    value works. 1: it was rejected. 3: it could not be found out.

    \b
        datasette secrets check OPENAI_API_KEY -c datasette.yaml --internal internal.db
    """

    result = await checks.check_stored(datasette, name, actor_id=actor)
    await stop(datasette)
    words, code = _OUTCOMES[result.outcome]
    message = f": {printable(result.message)}" if result.message else ""
    click.echo(f"{printable(name)} {words}{message}")
    raise click.exceptions.Exit(code)


_OUTCOMES = {
    "works": ("works", 0),
    "rejected": ("was rejected", 1),
    "unknown": ("could not be checked", 3),
}


@click.command(cls=DatabaseCommand)
@click.option(
    "--name", type=arguments.SecretName(), metavar="NAME", help="Only this secret"
)
@click.option(
    "--limit",
    type=click.IntRange(1, 1_000_000),
    default=100,
    metavar="N",
    help="So many entries at most, 100 unless told otherwise",
)
@arguments.json
async def log(
    datasette: Datasette, name: str | None, limit: int, as_json: bool
) -> None:
    """Show who changed what, the newest first

    Every change is one entry, and so is every value that "get" printed. It is a record,
    not evidence: whoever can write to the database can edit it.

    \b
        datasette secrets log --name OPENAI_API_KEY -c datasette.yaml \\
            --internal internal.db
    """

    db = get_instance(datasette).db
    entries = await changes.entries(db, name=name, limit=limit)
    if as_json:
        rows = [serialize.entry_json(each) for each in entries]
        output.print_json({"ok": True, "log": rows})
    else:
        output.print_log(entries)


async def require_history(datasette: Datasette, name: str) -> list[store.Version]:
    """The versions of a secret, newest first. Refuses a name of which there are none."""
    versions = await store.history(get_instance(datasette).db, name)
    if not versions:
        raise click.ClickException(f"Nothing is stored for {printable(name)}")
    return versions
