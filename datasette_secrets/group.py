"""The group `datasette secrets`, whose commands are loaded when one is asked for.

What was typed is not repeated when it cannot be understood: that may be a value, typed by
mistake, and errors end up in logs. Every `datasette` command loads this module, so it
imports nothing but Click.
"""

from __future__ import annotations

import click


class Refused(click.UsageError):
    """Says what is wrong with a command line, and nothing of what was typed."""

    @classmethod
    def value(
        cls, reason: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> Refused:
        hint = f" for {param.get_error_hint(ctx)}" if param else ""
        return cls(f"Invalid value{hint}: {reason}", ctx)


#: They name options and arguments of the command, and nothing else.
_DISCREET = (
    Refused,
    click.MissingParameter,
    click.BadOptionUsage,
    click.BadArgumentUsage,
    click.exceptions.NoArgsIsHelpError,
)


def _discreet(
    error: click.UsageError, otherwise: str, ctx: click.Context
) -> click.UsageError:
    """The error without what was typed; `otherwise` says what Click has no class for."""
    if isinstance(error, _DISCREET):
        return error
    if isinstance(error, click.BadParameter) and error.param is not None:
        if isinstance(error.param.type, (click.Path, click.File)):
            reason = "it does not exist, or cannot be read"
        else:
            reason = "what was given does not fit, and is not repeated here"
        return Refused.value(reason, error.param, ctx)
    if isinstance(error, click.NoSuchOption):
        otherwise = "No such option"
    known = " or ".join(getattr(error, "possibilities", None) or ())
    return Refused(f"{otherwise}: did you mean {known}?" if known else otherwise, ctx)


class Command(click.Command):
    """A command that repeats in no error what was typed."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            ctx.close()  # files that were opened for options, which Click leaves open here
            raise _discreet(error, "There are too many arguments", ctx) from None


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
            raise _discreet(error, "No such command", ctx) from None

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
