"""The group `datasette secrets`, whose commands are loaded when one is asked for.

Every `datasette` command loads this module, so it imports nothing but Click.
"""

from __future__ import annotations

import click

from .arguments import Command, discreet


class _Group(Command, click.Group):
    command_class = Command

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

    def _load(self) -> None:
        from .commands import COMMANDS

        for command in COMMANDS:
            self.add_command(command)


@click.group(cls=_Group)
def secrets() -> None:
    """Manage the secrets that plugins use

    Every command but generate-encryption-key opens a database: give it the files and the
    options that the server is started with. For example, beside
    "datasette serve -c datasette.yaml --internal internal.db":

    \b
        datasette secrets status -c datasette.yaml --internal internal.db
    """
