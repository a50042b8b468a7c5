"""The group `datasette secrets`, whose commands are loaded when one is asked for.

Every `datasette` command loads this, so it imports nothing but Click.
"""

from __future__ import annotations

import click


class _Group(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        self._load()
        return super().list_commands(ctx)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        self._load()
        return super().get_command(ctx, cmd_name)

    def _load(self) -> None:
        from importlib import import_module

        # By name, as this module lies below it: `cli` puts its commands in here.
        import_module("datasette_secrets.cli")


@click.group(cls=_Group)
def secrets() -> None:
    """Manage the secrets that plugins use

    Every command but generate-encryption-key opens a database: give it the files and the
    options that the server is started with. For example, beside
    "datasette serve -c datasette.yaml --internal internal.db":

    \b
        datasette secrets status -c datasette.yaml --internal internal.db
    """
