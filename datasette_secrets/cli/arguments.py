"""Arguments of the commands, and errors that do not repeat what was typed.

What was typed may be a value, by mistake, and errors end up in logs.
"""

from __future__ import annotations

import datetime
import getpass
import inspect
import os
import re
from contextlib import suppress
from typing import Any

import click

#: Where a context keeps the options that lead to the database, as they were given.
GIVEN = "datasette-secrets.given"

#: A command in a sentence, up to the quote that ends it or the end of the sentence. Its
#: arguments may be quoted as `shlex.quote` does. Two commands open no database.
_COMMAND = re.compile(
    r"datasette secrets (?!generate-|key-id)"
    r"""(?:(?<='datasette secrets )(?: (?:'[^']*'|"'")+|[^'])+|.*)"""
)


class Refused(click.BadParameter):
    """Says what is wrong with an argument, and repeats nothing of it."""


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
    """The error without what was typed. `otherwise` is for those without a class."""
    if isinstance(error, _DISCREET):
        return error
    if isinstance(error, click.BadParameter) and error.param is not None:
        is_file = isinstance(error.param.type, (click.Path, click.File))
        reason = "it does not exist or cannot be read" if is_file else "it is not valid"
        return Refused(reason, ctx, error.param)
    if isinstance(error, click.NoSuchOption):
        otherwise = "No such option"
    known = " or ".join(getattr(error, "possibilities", None) or ())
    text = f"{otherwise}. Did you mean {known}?" if known else otherwise
    return click.UsageError(text, ctx)


def with_options(sentence: str) -> str:
    """The sentence, in which each command has the options that this one was given."""
    context = click.get_current_context(silent=True)
    given = context.meta.get(GIVEN) if context else ""
    if not given:
        return sentence
    return _COMMAND.sub(lambda command: f"{command[0]} {given}", sentence)


class Command(click.Command):
    """A command that repeats in no error what was typed.

    `example`: its arguments in the example that its help ends with.
    """

    #: What leads to a database in that example.
    example_options = ""

    def __init__(self, *args: Any, example: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.help = inspect.cleandoc(self.help or "")
        if any(param.name == "name" for param in self.params):
            example = example or "OPENAI_API_KEY"
        line = " ".join(filter(None, ["datasette secrets", self.name, example]))
        # A line of a terminal, less the two columns by which Click indents it.
        is_short = len(line) + len(self.example_options) < 78
        if example or self.example_options:
            end = " " if is_short else " \\\n    "
            line += f"{end}{self.example_options}".rstrip()
            self.help = f"{self.help}\n\n\b\n{line}"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            ctx.close()  # files that were opened for options, which Click leaves open here
            raise discreet(error, "There are too many arguments", ctx) from None


def secret_name(text: str) -> str:
    if not text or any("\ud800" <= character <= "\udfff" for character in text):
        raise Refused("a name must be valid UTF-8 text")
    return text


def version_number(text: str) -> int:
    if text.isascii() and text.isdigit() and 0 < int(text[:20]) < 2**63:
        return int(text)
    raise Refused("a version is a number: 1, 2, 3 …")


def date(text: str) -> str:
    with suppress(ValueError):
        if datetime.date.fromisoformat(text).isoformat() == text:
            return text
    raise Refused("a date must be valid, and written as YYYY-MM-DD")


def date_or_never(text: str) -> str:
    return "" if text in ("never", "") else date(text)


def _login_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may know no name for its user
        return str(os.getuid()) if hasattr(os, "getuid") else "unknown"


def _as_text(actor_id: str) -> str:
    """With "?" for bytes that are not UTF-8, which SQLite cannot store."""
    return actor_id.encode("utf-8", "replace").decode("utf-8")


def option(spelling: str, help: str, type: Any = None, **more: Any) -> click.Option:
    """An option like `--limit N`: its names, and what stands for its value."""
    *names, metavar = spelling.split()
    return click.Option(names, metavar=metavar, help=help, type=type, **more)


def flag(names: str, help: str) -> click.Option:
    return click.Option(names.split(), is_flag=True, help=help)


actor = option(
    "--actor actor_id ID",
    "Record this actor ID instead of cli:<login name>",
    callback=lambda ctx, param, value: _as_text(value or f"cli:{_login_name()}"),
)
json = flag("--json as_json", "Print JSON")
dry_run = flag("--dry-run", "Show what would be done, and change nothing")
yes = flag("-y --yes", "Do not ask for confirmation")
vacuum = flag("--vacuum", "Rewrite the file, even if it is large or a named database")
name = click.Argument(["name"], type=secret_name)
