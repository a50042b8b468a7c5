"""Arguments of the commands, and errors that do not repeat what was typed.

What was typed may be a value, by mistake, and errors end up in logs.
"""

from __future__ import annotations

import datetime
import getpass
import os
from typing import Any

import click

from ..errors import SecretsError, printable

#: Where a context keeps the options that were given and lead to the database.
GIVEN = "datasette-secrets.given"


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


def discreet(
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
            raise discreet(error, "There are too many arguments", ctx) from None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SecretsError as error:
            raise click.ClickException(printable(error)) from None


class Misuse(click.ClickException):
    """A command line that cannot be meant: exit code 2, one sentence."""

    exit_code = 2


class SecretName(click.ParamType):  # type: ignore[type-arg]  # since click 8.5
    name = "name"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str:
        if not value or any("\ud800" <= character <= "\udfff" for character in value):
            raise Refused.value("it is not text in UTF-8", param, ctx)
        return str(value)


class VersionNumber(click.ParamType):  # type: ignore[type-arg]  # since click 8.5
    name = "N"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        text = str(value)
        if not (text.isascii() and text.isdigit() and 0 < int(text[:20]) < 2**63):
            raise Refused.value("a version is a number: 1, 2, 3 …", param, ctx)
        return int(text)


class RenewDate(click.ParamType):  # type: ignore[type-arg]  # since click 8.5
    """A day; `never`, where that makes sense, is an empty text."""

    name = "date"

    def __init__(self, *, or_never: bool = False) -> None:
        self._or_never = or_never

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str:
        if self._or_never and value in ("never", ""):
            return ""
        try:
            if datetime.date.fromisoformat(value).isoformat() == value:
                return str(value)
        except ValueError:
            pass
        also = ", or 'never'" if self._or_never else ""
        raise Refused.value(f"a date that exists, as YYYY-MM-DD{also}", param, ctx)


def _shell_user() -> str:
    """Who is recorded for what a command does: `cli:` and the login name."""
    try:
        return f"cli:{getpass.getuser()}"
    except (KeyError, OSError):  # a container may know no name for its user
        return f"cli:{os.getuid()}" if hasattr(os, "getuid") else "cli:unknown"


actor = click.option(
    "--actor",
    metavar="ID",
    callback=lambda ctx, param, value: value or _shell_user(),
    help="Record this as who did it, instead of cli:<login name>",
)
json = click.option("--json", "as_json", is_flag=True, help="Print JSON")
yes = click.option("-y", "--yes", is_flag=True, help="Do not ask")
vacuum = click.option(
    "--vacuum",
    is_flag=True,
    help="Rewrite the file at the end, even if it is large or not the internal database",
)
name = click.argument("name", type=SecretName())
