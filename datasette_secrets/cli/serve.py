"""The options of `datasette serve`, and an instance made with them, for every command.

No plugin is started and no catalog is written. A command creates no database file without
`--create`, and refuses to work on a temporary one.
"""

from __future__ import annotations

import copy
import difflib
import errno
import functools
import os
import shlex
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NoReturn

import click
from click.core import ParameterSource
from datasette.cli import cli
from datasette.utils import BadMetadataError

from .. import database, inspection, registry, store
from ..errors import DatabaseUnavailable, printable
from ..events import via
from ..instance import get_instance, stop
from . import arguments, interrupt
from .arguments import GIVEN, Command
from .output import give_up_stdout, is_terminal, path_of, warn

if TYPE_CHECKING:
    from datasette.app import Datasette

#: Options of `datasette serve` that make no sense for a command.
LEFT_OUT = frozenset(
    {"get", "headers", "token", "actor", "pdb", "open_browser", "help_settings"}
)

#: Options of `datasette serve` that only concern serving: accepted and ignored.
IGNORED = frozenset(
    [
        *("host", "port", "uds", "reload", "cors", "ssl_keyfile", "ssl_certfile"),
        *("root", "default_deny", "secret", "template_dir", "static", "inspect_file"),
        "version_note",
    ]
)

#: Options of `datasette serve` that say where the secrets are. The others are hidden.
SHOWN = frozenset({"files", "internal", "config", "settings", "plugins_dir"})

#: Options of `datasette serve` that are repeated in the commands that a message names.
LEADING = frozenset({"immutable", "config", "metadata", "internal", "plugins_dir"})


class DatabaseCommand(Command):
    """A command on an instance. Its callback is `async def (datasette, **own_options)`.

    It returns the exit code, None for 0. `creates`: it stores secrets, so --create makes a
    database, and a new name is fine. `missing`: what to do when a FILE does not exist.
    `look`: the command that shows whether it made its change; empty if it makes none.
    """

    example_options = "-c datasette.yaml --internal internal.db"
    callback: Any

    def __init__(
        self,
        *args: Any,
        creates: bool = False,
        missing: str = "check the paths",
        look: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.own_params = self.params
        shown = SHOWN | {"create"} if creates else SHOWN
        self.params = [*self.params, *_serve_params(shown)]
        self._creates = creates
        self._missing = missing
        self._look = look

    def invoke(self, ctx: click.Context) -> None:
        own = {str(each.name) for each in self.own_params}
        own_options = {name: ctx.params.pop(name) for name in own}
        ctx.meta[GIVEN] = _given(ctx)
        umask = os.umask(0o077)  # for the databases that --create makes
        try:
            datasette = self._build(ctx)
            interrupt.run(self._run(datasette, own_options), datasette.close)
        except KeyboardInterrupt as interrupted:
            if is_terminal(sys.stderr):
                click.echo(err=True)  # after the ^C
            raise click.ClickException(self._interrupted(interrupted)) from None
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # Click ends without a word, as is the custom in a pipe.
            give_up_stdout()
            reason = error.strerror or "unknown reason"
            can_change = self._look and not own_options.get("dry_run")
            look = f", but {self._may_have_changed()}" if can_change else ""
            raise click.ClickException(
                f"Something could not be read or printed: {reason}{look}"
            ) from None
        finally:
            os.umask(umask)

    def _interrupted(self, how: KeyboardInterrupt) -> str:
        # At a prompt, nothing has been changed yet.
        if not self._look or not isinstance(how, interrupt.Cancelled):
            return "Interrupted: nothing is half done, and the command can be run again"
        if arguments.vacuum in self.params:
            return (
                "Interrupted: no version is half done, but what was replaced or "
                "destroyed may remain in the file. Run the command again to finish"
            )
        return f"Interrupted: nothing is half done, but {self._may_have_changed()}"

    def _may_have_changed(self) -> str:
        return (
            "the change may have been made. Before you run the command again, look at "
            f"'datasette secrets {self._look}'"
        )

    async def _run(self, datasette: Datasette, own_options: dict[str, Any]) -> None:
        via.set("shell")
        try:
            await self.check(datasette)
            if "name" in own_options:
                name = own_options["name"]
                await require_name(datasette, name, can_be_new=self._creates)
            exit_code = await self.callback(datasette, **own_options)
        except DatabaseUnavailable as error:
            raise DatabaseUnavailable(f"{path_of(datasette)}: {error}") from None
        finally:
            await stop(datasette)
        if exit_code:
            raise click.exceptions.Exit(exit_code)

    async def check(self, datasette: Datasette) -> None:
        """Refuse settings that cannot be used, and a database that is temporary.

        One that cannot be read is refused here, too: at the first write, Datasette would
        print a line of its own about it.
        """
        db = get_instance(datasette).db
        if database.is_temporary(db):
            _refuse_temporary()
        await database.journal_mode(db)

    def _build(self, ctx: click.Context) -> Datasette:
        options = ctx.params
        create = options["create"] and self._creates
        # An empty one, from a variable that is set to nothing, is none.
        options["internal"] = options["internal"] or None
        if ":memory:" in (options["internal"] or ""):
            _refuse_temporary()
        if options["internal"]:
            way_out = "check the path" + ", or add --create" * (
                self._creates and not create
            )
            self._require_file("--internal", options["internal"], create, way_out)
        for file in options["files"]:
            self._require_file("FILES", file, create, self._missing)
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
                f"Datasette does not start with these options ({type(error).__name__}). "
                "Run 'datasette serve' with them to see why"
            ) from None
        # Nobody listens to events here. Datasette, which takes a table that the VACUUM of
        # another process has moved for one that was renamed, would fail to send one.
        datasette.track_event = track_nothing  # type: ignore[method-assign]
        return datasette

    def _require_file(self, option: str, path: str, create: bool, way_out: str) -> None:
        # What is not called like a database may be a value, typed by mistake.
        is_database = path.endswith((".db", ".sqlite", ".sqlite3"))
        problem = ""
        if os.path.isdir(path) and option == "--internal":
            problem = "names a folder, not a database"
        elif not os.path.exists(path) and not (create and is_database):
            problem = "names a file that does not exist"
            if create and option == "--internal":
                way_out = "a new database must end in .db, .sqlite or .sqlite3"
        elif not os.path.isdir(os.path.dirname(os.path.abspath(path))):
            problem = "names a file in a folder that does not exist"
        if problem:
            shown = f" ({printable(os.path.abspath(path))})" if is_database else ""
            raise click.UsageError(f"{option} {problem}{shown}: {way_out}")


command = functools.partial(click.command, cls=DatabaseCommand)
changing_command = functools.partial(command, look="log")


async def require_name(
    datasette: Datasette, name: str, *, can_be_new: bool = False
) -> None:
    """Refuse a name that is not stored, registered, or in the environment.

    A similar name that exists is printed, but never what was typed.
    """
    instance = get_instance(datasette)
    if can_be_new:
        await inspection.require_own(instance.db)
    known = {*await registry.registered_secrets(datasette)}
    known.update(await store.names(instance.db))
    if name in known or instance.environment_value(name) is not None:
        return
    by_case = {each.casefold(): each for each in known}
    similar = difflib.get_close_matches(name.casefold(), by_case, n=1)
    question = f". Did you mean {printable(by_case[similar[0]])}?" if similar else ""
    if not can_be_new:
        raise click.ClickException(
            f"There is no secret of that name in {path_of(datasette)}{question}"
        )
    if question:
        warn(f"There is no secret of that name yet{question}")


async def stored_versions(
    datasette: Datasette, name: str, needed: Iterable[int] = ()
) -> list[store.Version]:
    """The versions of a secret, newest first. Refuses a name without any or these."""
    versions = await store.history(get_instance(datasette).db, name)
    if not versions:
        raise click.ClickException(
            f"Nothing is stored for {printable(name)} in {path_of(datasette)}"
        )
    if not {*needed} <= {each.version for each in versions}:
        raise click.ClickException(
            f"{printable(name)} has no such version. To see which it has: datasette "
            f"secrets history {shlex.quote(printable(name))}"
        )
    return versions


async def track_nothing(event: object) -> None:
    pass


def _given(ctx: click.Context) -> str:
    """The options that lead to the database, to be typed again."""
    words: list[str] = list(ctx.params["files"])
    for param in ctx.command.params:
        name = str(param.name)
        is_given = ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if is_given and name in LEADING:
            given = ctx.params[name]
            for each in given if isinstance(given, (list, tuple)) else [given]:
                words += [param.opts[0], str(getattr(each, "name", each))]
    for name, _ in ctx.params["settings"]:
        # The value may be a key, or a secret of another plugin.
        words += ["-s", name, "…"]
    return printable(shlex.join(words))


def _serve_params(shown: frozenset[str]) -> list[click.Parameter]:
    """Copies of the options of `datasette serve`, as this version of Datasette has them."""
    params = cli.commands["serve"].params
    copied = [copy.copy(param) for param in params if param.name not in LEFT_OUT]
    for param in copied:
        if isinstance(param, click.Option):
            param.hidden = param.name not in shown
        if param.name in IGNORED:
            param.expose_value = False
            param.envvar = None
            param.type = click.UNPROCESSED
    return copied


def _refuse_temporary() -> NoReturn:
    raise click.ClickException(
        "These secrets would be in a temporary database, which is gone when the command "
        "ends. Name the database of the server with --internal PATH"
    )
