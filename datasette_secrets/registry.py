"""What plugins register: `Secret`, its check, and the hook."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Awaitable, Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

from datasette.hookspecs import hookspec
from datasette.utils import await_me_maybe

from .errors import say_once

if TYPE_CHECKING:
    from datasette.app import Datasette
    from pluggy import PluginManager


@dataclasses.dataclass(frozen=True)
class CheckResult:
    """What the check of a secret found out about a value.

    Attributes:
        outcome: `"works"`, `"rejected"` or `"unknown"`.
        message: One sentence for the person who asked. It must not contain the value.
    """

    outcome: str
    message: str = ""


Check = Callable[[str], Awaitable["CheckResult | bool | None"]]


@dataclasses.dataclass
class Secret:
    """A secret that a plugin needs.

    Attributes:
        name: Up to 128 characters, preferably `[A-Za-z_][A-Za-z0-9_]*`, because
            `DATASETTE_SECRETS_<NAME>` can then be set in any shell.
        description: For people, may contain HTML.
        obtain_url: Where to get one, http or https.
        obtain_label: The text of that link.
        check: An async function that is given a value and asks the provider whether it
            works. It returns a CheckResult, or True, False or None for works, rejected
            and unknown.
        looks_like: A regular expression that most values match somewhere. The browser
            shows a hint beside the field when the typed value does not match.
    """

    name: str
    description: str | None = None
    obtain_url: str | None = None
    obtain_label: str | None = None
    _: dataclasses.KW_ONLY
    check: Check | None = None
    looks_like: str | None = None


@dataclasses.dataclass
class Registered(Secret):
    """What one or more plugins registered under one name.

    The first plugin to register a name describes it. The check and the pattern are those
    of the first that has one.

    Attributes:
        registered_by: The names of the plugins, as `/-/plugins` shows them.
        checked_by: The name of the plugin whose check it is.
    """

    registered_by: tuple[str, ...] = ()
    checked_by: str | None = None


EXAMPLE = Registered("EXAMPLE_SECRET", "An example secret")


@hookspec
def register_secrets(datasette: Datasette) -> Any:
    """Return a list of Secret objects, or an async function that returns one"""


async def get_secrets(datasette: Datasette) -> list[Secret]:
    """Every secret that a plugin registered, in the order of registration.

    The first to register a name wins. While nothing is registered it is
    `EXAMPLE_SECRET`, so that a new user has something to try.
    """
    return list((await registered_secrets(datasette)).values())


async def registered_secrets(datasette: Datasette) -> dict[str, Registered]:
    """The registered secrets by name, with the plugins that registered each.

    In the shell, where no plugin has started, the secrets of one that fails are left out.
    """
    # Not at the top: this import loads every plugin, and those import this package.
    from datasette.plugins import pm

    by_name: dict[str, Registered] = {}
    failed = False
    for plugin_name, call in _implementations(pm, datasette):
        try:
            secrets = list(await await_me_maybe(call()) or ())
        except Exception as error:  # a plugin's code may raise anything
            problem = f"failed in register_secrets: {type(error).__name__}"
            _complain(datasette, plugin_name, problem)
            if hasattr(datasette, "event_classes"):  # a server
                raise
            failed = True
            continue
        for secret in secrets:
            if isinstance(secret, Secret) and isinstance(secret.name, str):
                _add(datasette, by_name, secret, plugin_name)
            else:
                kind = f"an object of type {type(secret).__name__}"
                problem = f"registered {kind}, not a Secret with a name"
                _complain(datasette, plugin_name, problem)
    return by_name if by_name or failed else {EXAMPLE.name: EXAMPLE}


def _implementations(
    pm: PluginManager, datasette: Datasette
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The name of each plugin with the hook, and its hook.

    In pluggy's order. A call through pluggy would not show which plugin returned what.
    """
    distributions = dict(pm.list_plugin_distinfo())
    for implementation in reversed(pm.hook.register_secrets.get_hookimpls()):
        plugin = implementation.plugin
        name = getattr(plugin, "__name__", type(plugin).__name__)
        if plugin in distributions:
            name = distributions[plugin].project_name
        arguments = [datasette for _ in implementation.argnames]
        yield str(name), functools.partial(implementation.function, *arguments)


def _add(
    datasette: Datasette,
    by_name: dict[str, Registered],
    secret: Secret,
    plugin_name: str,
) -> None:
    """Add the secret of one plugin to those of the others with that name."""
    name = str.__str__(secret.name)  # that of an Enum of strings is its value
    url, label = secret.obtain_url, secret.obtain_label
    known = by_name.setdefault(name, Registered(name, secret.description, url, label))
    if plugin_name not in known.registered_by:
        known.registered_by += (plugin_name,)
    if secret.check is not None and not callable(secret.check):
        problem = f"has a check for {name} that is not a function"
        _complain(datasette, plugin_name, problem)
    elif secret.check is not None and known.check is None:
        known.check, known.checked_by = secret.check, plugin_name
    if secret.looks_like is None:
        return
    try:
        re.compile(secret.looks_like if isinstance(secret.looks_like, str) else "[")
        known.looks_like = known.looks_like or secret.looks_like
    except re.error:
        problem = f"has a looks_like for {name} that is not a regular expression"
        _complain(datasette, plugin_name, problem)


def _complain(datasette: Datasette, plugin_name: str, problem: str) -> None:
    say_once(datasette, f"plugin {plugin_name} {problem}")


def register_late_hooks(pm: PluginManager) -> None:
    """Register each module again that has hooks which `pm` does not know.

    A program's first import may be a plugin that imports `datasette.plugins`, such as
    datasette_llm. That loads all plugins while a module is only half imported, and
    registers that module without its later hooks.
    """
    for name, plugin in pm.list_name_plugin():
        if not isinstance(plugin, ModuleType):
            continue
        known = {caller.name for caller in pm.get_hookcallers(plugin) or ()}
        found = {
            options.get("specname") or attribute
            for attribute in vars(plugin)
            if (options := pm.parse_hookimpl_opts(plugin, attribute))
        }
        if not found <= known:
            pm.unregister(plugin, name)
            pm.register(plugin, name)
