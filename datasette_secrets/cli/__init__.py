"""The group `datasette secrets`, whose commands are loaded when one is asked for.

Every `datasette` command loads this module, so it imports little more than Click.
"""

from __future__ import annotations

import io
import sys
from typing import Any

import click

from ..errors import SecretsError, printable
from .arguments import Command, discreet, with_options


class _Group(Command, click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        self._load()
        return super().list_commands(ctx)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        self._load()
        return super().get_command(ctx, cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            raise discreet(error, "No such command", ctx) from None

    def invoke(self, ctx: click.Context) -> Any:
        # A terminal may lack characters of a note. `get` and `key-id` write bytes.
        if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            return super().invoke(ctx)
        except click.UsageError:
            raise
        except click.ClickException as error:
            message = error.format_message()
        except SecretsError as error:
            message = printable(error)
        raise click.ClickException(with_options(message))

    def _load(self) -> None:
        from . import commands, keys

        for each in (*vars(keys).values(), *vars(commands).values()):
            if isinstance(each, click.Command):
                self.add_command(each)


# Commands that open a database have -h for Datasette's own --host.
@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
def secrets() -> None:
    """Manage the secrets that plugins use

    Most commands open a database. Give them the same files and options as "datasette
    serve". For example, if the server is started with "datasette serve -c datasette.yaml
    --internal internal.db":

    \b
    datasette secrets status -c datasette.yaml --internal internal.db

    More: https://github.com/datasette/datasette-secrets/blob/main/.github/docs/shell.md
    """
