"""Datasette's own options, and an instance made of them, for every command on a database.

A database command takes what `datasette serve` takes, so that an operator changes two
words in the line that starts the server. It builds the instance, runs, and closes: no
plugin is started and no catalog is written. It creates no database file unless `--create`
says so, keeps nothing in a temporary one, and echoes no argument that is no file: that
may be a value, typed by mistake.
"""

from __future__ import annotations

import copy
import errno
import os
import shlex
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import click
from click.core import ParameterSource
from datasette.cli import cli
from datasette.utils import BadMetadataError

from .. import database
from ..errors import SecretsError, printable
from ..events import via
from ..instance import get_instance
from . import interrupt
from .arguments import GIVEN, Command, Misuse
from .output import give_up_stdout, is_terminal

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


class DatabaseCommand(Command):
    """A command on an instance. Its callback is `async def (datasette, **own_options)`.

    The options of `datasette serve` are added when they are first asked for: importing
    Datasette's commands for them would otherwise make `import datasette_secrets` slow.
    """

    #: Said when a FILE does not exist, after "One of the FILES does not exist: ".
    missing_file = "check the paths, which are not repeated here"
    #: Whether --create makes a database: only where something is stored.
    creates = False
    _serve_options: frozenset[str] | None = None

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        if self._serve_options is None:
            own = {param.name for param in self.params}
            copied = [param for param in _serve_params() if param.name not in own]
            for param in copied:
                if param.name == "create" and isinstance(param, click.Option):
                    param.hidden = not self.creates
            self.params += copied
            self._serve_options = frozenset(str(param.name) for param in copied)
        return super().get_params(ctx)

    def invoke(self, ctx: click.Context) -> None:
        options = {
            name: ctx.params.pop(name)
            for name in self._serve_options or ()
            if name in ctx.params
        }
        ctx.meta[GIVEN] = _given(ctx, options)
        umask = os.umask(0o077)  # for the databases that --create makes
        try:
            datasette = self._build(ctx, options)
            interrupt.run(self._run(datasette, ctx.params), datasette.close)
        except KeyboardInterrupt:
            if is_terminal(sys.stderr):
                click.echo(err=True)
            raise click.ClickException(
                "Interrupted: nothing is half done, and the command can be run again"
            ) from None
        except SecretsError as error:
            raise click.ClickException(printable(error)) from None
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # Click ends without a word, as is the custom in a pipe.
            give_up_stdout()
            raise click.ClickException(
                "Something could not be read or printed: "
                f"{error.strerror or 'it is unknown why'}"
            ) from None
        finally:
            os.umask(umask)

    async def _run(self, datasette: Datasette, own_options: dict[str, Any]) -> None:
        via.set("shell")
        run = cast(Callable[..., Coroutine[Any, Any, None]], self.callback)
        await self.check(datasette)
        await run(datasette, **own_options)

    def _build(self, ctx: click.Context, options: dict[str, Any]) -> Datasette:
        create = bool(options.get("create")) and self.creates
        # An empty one, from a variable that is set to nothing, is none.
        options["internal"] = options.get("internal") or None
        self._check_files(options.get("files") or (), create)
        self._check_internal(options["internal"], create)
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
        # Nobody listens to events here. Datasette, which takes a table that the VACUUM of
        # another process has moved for one that was renamed, would fail to send one.
        datasette.track_event = _track_nothing  # type: ignore[method-assign]
        return datasette

    async def check(self, datasette: Datasette) -> None:
        """Refuse settings that cannot be used, and a database that does not last.

        One that cannot be read is refused here, too: at the first write, Datasette would
        print a line of its own about it.
        """
        instance = get_instance(datasette)
        if database.is_temporary(instance.db):
            _refuse_temporary()
        await database.journal_mode(instance.db)

    def _check_internal(self, path: str | None, create: bool) -> None:
        if path is None:
            return
        if ":memory:" in path:
            _refuse_temporary()
        # What is not called like a database may be a value, typed by mistake.
        named = path.endswith(_NEW_DATABASES)
        shown = f" ({printable(os.path.abspath(path))})" if named else ""
        if os.path.isdir(path):
            raise Misuse(f"--internal names a folder, not a database{shown}")
        if os.path.exists(path):
            return
        if not create:
            way_out = ", or add --create to make it" if self.creates else ""
            raise Misuse(
                f"--internal names a file that does not exist{shown}: check the "
                f"path{way_out}"
            )
        if not Path(path).absolute().parent.is_dir():
            raise Misuse(
                f"--internal names a file in a folder that does not exist{shown}"
            )

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


async def _track_nothing(event: object) -> None:
    pass


def _given(ctx: click.Context, options: dict[str, Any]) -> str:
    """The options that were typed and lead to the database, to be typed again."""
    words: list[str] = []
    for name, option in (
        ("config", "-c"),
        ("internal", "--internal"),
        ("plugins_dir", "--plugins-dir"),
    ):
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            value = options[name]
            words += [option, str(getattr(value, "name", value))]
    for name, value in options.get("settings") or ():
        # A key may have been given as a setting.
        shown = "…" if "encryption" in name else value
        words += ["-s", name, shown]
    return shlex.join([*(options.get("files") or ()), *words])


def _serve_params() -> list[click.Parameter]:
    """Copies of the options of `datasette serve`, as this version of Datasette has them."""
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


def _refuse_temporary() -> NoReturn:
    raise click.ClickException(
        "These secrets would be in a temporary database, which is gone when the command "
        "ends: name the one that the server is started with, by --internal PATH"
    )
