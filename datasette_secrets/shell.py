"""What the commands stand on: Datasette's own options, an instance, and what is printed.

A database command takes what `datasette serve` takes, so that an operator changes two
words in the line that starts the server. It builds the instance, runs, and closes: no
plugin is started and no catalog is written. It creates no database file unless `--create`
says so, keeps nothing in a temporary one, and echoes no argument that is no file: that
may be a value, typed by mistake.
"""

from __future__ import annotations

import asyncio
import copy
import errno
import getpass
import json
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, cast

import click

from . import group
from .errors import plain

if TYPE_CHECKING:
    from datasette.app import Datasette

#: Options of `datasette serve` that make no sense for a command.
LEFT_OUT = frozenset(
    {"get", "headers", "token", "actor", "pdb", "open_browser", "help_settings"}
)
#: Options of `datasette serve` that only concern serving: accepted and ignored.
IGNORED = frozenset(
    {
        "host",
        "port",
        "uds",
        "reload",
        "cors",
        "root",
        "ssl_keyfile",
        "ssl_certfile",
        "inspect_file",
        "template_dir",
        "static",
        "secret",
        "default_deny",
        "version_note",
    }
)
#: Options of `datasette serve` that say where the secrets are. The others are hidden.
SHOWN = frozenset({"files", "internal", "config", "settings", "plugins_dir", "create"})
_NEW_DATABASES = (".db", ".sqlite", ".sqlite3")
_LONG_WORK = 5_000
# A pasted text has come to its end when nothing has followed for so long.
_QUIET_SECONDS = 1.0


class Misuse(click.ClickException):
    """A command line that cannot be meant: exit code 2, one sentence."""

    exit_code = 2


class DatabaseCommand(group.Command):
    """A command on an instance. Its callback is `async def (datasette, **own_options)`.

    The options of `datasette serve` are added when they are first asked for: importing
    Datasette's commands for them would otherwise make `import datasette_secrets` slow.
    """

    #: Said when a FILE does not exist, after "One of the FILES does not exist: ".
    missing_file = "check the paths, which are not repeated here"
    _serve_options: frozenset[str] | None = None

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        if self._serve_options is None:
            own = {param.name for param in self.params}
            copied = [param for param in _serve_params() if param.name not in own]
            self.params += copied
            self._serve_options = frozenset(str(param.name) for param in copied)
        return super().get_params(ctx)

    def invoke(self, ctx: click.Context) -> None:
        options = {
            name: ctx.params.pop(name)
            for name in self._serve_options or ()
            if name in ctx.params
        }
        run = cast(Callable[..., Coroutine[Any, Any, None]], self.callback)
        try:
            datasette = self._build(ctx, options)
            with _closing(datasette) as loop:
                loop.run_until_complete(_require_place(datasette))
                loop.run_until_complete(run(datasette, **ctx.params))
        except KeyboardInterrupt:
            if is_terminal(sys.stderr):
                click.echo(err=True)
            raise click.ClickException(
                "Interrupted: nothing is half done, and the command can be run again"
            ) from None
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # Click ends without a word, as is the custom in a pipe.
            give_up_stdout()
            raise click.ClickException(
                "Something could not be read or printed: "
                f"{error.strerror or 'it is unknown why'}"
            ) from None

    def _build(self, ctx: click.Context, options: dict[str, Any]) -> Datasette:
        from datasette.cli import cli
        from datasette.utils import BadMetadataError

        create = bool(options.get("create"))
        # An empty one, from a variable that is set to nothing, is none.
        options["internal"] = options.get("internal") or None
        self._check_files(options.get("files") or (), create)
        _check_internal(options["internal"], create)
        try:
            datasette: Datasette = ctx.invoke(
                cli.commands["serve"], return_instance=True, **options
            )
        except (BadMetadataError, UnicodeDecodeError):
            raise click.ClickException(
                "The configuration file is neither valid JSON nor valid YAML"
            ) from None
        except click.ClickException:
            raise
        except Exception as error:  # whatever it is, its frames hold the keys
            raise click.ClickException(
                f"Datasette does not start with these options: {type(error).__name__}, "
                "of which 'datasette serve' says more"
            ) from None
        return datasette

    def _check_files(self, files: Sequence[str], create: bool) -> None:
        for file in files:
            if os.path.exists(file):
                continue
            if not create:
                raise Misuse(f"One of the FILES does not exist: {self.missing_file}")
            if not file.endswith(_NEW_DATABASES):
                raise Misuse(
                    "--create makes files whose name ends in "
                    f"{', '.join(_NEW_DATABASES)}, and one of the FILES that does not "
                    f"exist has another name: {self.missing_file}"
                )


def _serve_params() -> list[click.Parameter]:
    """Copies of the options of `datasette serve`, as this version of Datasette has them."""
    from datasette.cli import cli

    copied = []
    for param in cli.commands["serve"].params:
        if param.name in LEFT_OUT:
            continue
        param = copy.copy(param)
        if isinstance(param, click.Option):
            param.hidden = param.name not in SHOWN
        if param.name in IGNORED:
            param.expose_value = False
            param.envvar = None
            if isinstance(param, click.Option) and not param.is_flag:
                param.type = click.UNPROCESSED
        copied.append(param)
    return copied


def _check_internal(path: str | None, create: bool) -> None:
    if path is None:
        return
    if ":memory:" in path:
        _refuse_temporary()
    if os.path.isdir(path):
        raise Misuse("--internal names a folder, not a database")
    if os.path.exists(path):
        return
    if not create:
        raise Misuse(
            "--internal names a file that does not exist: check the path, or add "
            "--create to make it"
        )
    if not Path(path).absolute().parent.is_dir():
        raise Misuse("--internal names a file in a folder that does not exist")


async def _require_place(datasette: Datasette) -> None:
    """Refuse settings that cannot be used, and a database that does not last.

    One that cannot be read is refused here, too: at the first write, Datasette would
    print a line of its own about it.
    """
    from . import service, store

    place = service.vault(datasette)
    if store.is_temporary(place.db):
        _refuse_temporary()
    await store.journal_mode(place.db)


def _refuse_temporary() -> NoReturn:
    raise click.ClickException(
        "These secrets would be in a temporary database, which is gone when the command "
        "ends: name the one that the server is started with, by --internal PATH"
    )


@contextmanager
def _closing(datasette: Datasette) -> Iterator[asyncio.AbstractEventLoop]:
    """A loop for the instance; both are closed at the end, and no write is cut off.

    Not `asyncio.run`: that keeps Ctrl-C waiting while a question is asked.
    """
    from .errors import SecretsError

    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        yield loop
    except SecretsError as error:
        raise click.ClickException(plain(str(error))) from None
    finally:
        with _uninterrupted():
            waiting = asyncio.all_tasks(loop)
            for task in waiting:
                task.cancel()
            if waiting:
                loop.run_until_complete(asyncio.wait(waiting))
            datasette.close()
            asyncio.set_event_loop(None)
            loop.close()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let a second Ctrl-C wait for the end of what the first one ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def shell_user() -> str:
    """Who is recorded for what a command does: `cli:` and the login name."""
    try:
        return f"cli:{getpass.getuser()}"
    except (KeyError, OSError):  # a container may know no name for its user
        return f"cli:{os.getuid()}" if hasattr(os, "getuid") else "cli:unknown"


# Arguments. None of them repeats in an error what was typed.


class SecretName(click.ParamType):  # type: ignore[type-arg]  # since click 8.5
    name = "name"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str:
        if not value or any("\ud800" <= character <= "\udfff" for character in value):
            raise group.Refused.value("it is not text in UTF-8", param, ctx)
        return str(value)


class VersionNumber(click.ParamType):  # type: ignore[type-arg]  # since click 8.5
    name = "N"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        text = str(value)
        if not (text.isascii() and text.isdigit() and 0 < int(text[:20]) < 2**63):
            raise group.Refused.value("a version is a number: 1, 2, 3 …", param, ctx)
        return int(text)


# What is printed.


def is_terminal(stream: TextIO | None) -> bool:
    """Whether it is one. Python's name for a stream that was closed is None."""
    return stream is not None and stream.isatty()


@contextmanager
def echo_off() -> Iterator[Callable[[], None]]:
    """While this lasts, the terminal shows nothing that is typed.

    Yields what reads away the rest of a pasted text, which comes line by line and would go
    to whatever reads the terminal next: a shell would run it, and keep it in its history.
    """
    try:
        import termios
    except ImportError:  # Windows, where the rest stays in the console
        yield lambda: None
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    silent = [*before]
    silent[3] &= ~termios.ECHO

    def discard_input() -> None:
        while select.select([terminal], [], [], _QUIET_SECONDS)[0]:
            if not os.read(terminal, 65_536):
                break

    termios.tcsetattr(terminal, termios.TCSADRAIN, silent)
    try:
        yield discard_input
    finally:
        termios.tcsetattr(terminal, termios.TCSAFLUSH, before)


def give_up_stdout() -> None:
    """Let Python write what is left in its buffer to nowhere when it exits."""
    if sys.stdout is None:
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def styled(text: str, **style: Any) -> str:
    """`text` in this style, on a terminal whose user did not set NO_COLOR."""
    if os.environ.get("NO_COLOR") or not is_terminal(sys.stdout):
        return text
    return click.style(text, **style)


def print_json(content: dict[str, Any]) -> None:
    """A JSON object on stdout. A damaged row may hold what JSON has no word for."""
    click.echo(json.dumps(content, indent=2, default=repr))


def print_table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Columns on stdout; None is an empty cell."""
    cells = [["" if cell is None else plain(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        return "  ".join(padded).rstrip()

    click.echo(styled(line(headings), bold=True))
    for row in cells:
        click.echo(line(row))


def warn(sentence: str) -> None:
    """A sentence on stderr."""
    click.echo(plain(sentence), err=True)


def confirm(question: str, *, yes: bool) -> None:
    """Ask on stderr, unless `yes`. Without the answer "y" the command ends."""
    if yes:
        return
    try:
        agreed = click.confirm(plain(question), err=True)
    except (RuntimeError, UnicodeError):  # broken off, closed, or no text
        agreed = False
        click.echo(err=True)
    if not agreed:
        raise click.ClickException(
            "Nothing was changed: answer y, or add --yes where nobody can answer"
        )


@contextmanager
def progress(label: str, steps: int) -> Iterator[Callable[[int], None]]:
    """What to call with each number of steps done: a bar on a terminal for long work."""
    if steps < _LONG_WORK or not is_terminal(sys.stderr):
        yield lambda _: None
        return
    with click.progressbar(length=steps, label=label, file=sys.stderr) as bar:
        yield bar.update


def count(number: int, noun: str) -> str:
    """`1 version`, `2 versions`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
