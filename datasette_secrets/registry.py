"""What plugins register: `Secret`, and the hook through which they do."""

from __future__ import annotations

import dataclasses
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from datasette.hookspecs import hookspec
from datasette.utils import await_me_maybe

if TYPE_CHECKING:
    from datasette.app import Datasette
    from pluggy import PluginManager


@dataclasses.dataclass
class Secret:
    """A secret that a plugin needs.

    `name`: up to 128 characters, and best `[A-Za-z_][A-Za-z0-9_]*`, since
    `DATASETTE_SECRETS_<NAME>` can then be set in any shell. `description`: for people,
    may contain HTML. `obtain_url`: where to get one, http or https. `obtain_label`: the
    text of that link.
    """

    name: str
    description: str | None = None
    obtain_url: str | None = None
    obtain_label: str | None = None


EXAMPLE = Secret("EXAMPLE_SECRET", "An example secret")


@hookspec
def register_secrets(datasette: Datasette) -> Any:
    """Return a list of Secret objects, or an async function that returns one"""


async def get_secrets(datasette: Datasette) -> list[Secret]:
    """Every secret that a plugin registered, in the order of registration.

    The first to register a name wins. While nothing is registered it is
    `EXAMPLE_SECRET`, so that a new user has something to try.
    """
    # Importing this loads every plugin, and they import this package.
    from datasette.plugins import pm

    by_name: dict[str, Secret] = {}
    for registered in pm.hook.register_secrets(datasette=datasette):
        for secret in await await_me_maybe(registered) or ():
            if isinstance(secret, Secret) and isinstance(secret.name, str):
                by_name.setdefault(secret.name, secret)
            else:
                print(
                    "datasette-secrets: a plugin registered an object of type "
                    f"{type(secret).__name__}, which is no Secret with a name: left out",
                    file=sys.stderr,
                )
    return list(by_name.values()) or [EXAMPLE]


def register_late_hooks(pm: PluginManager) -> None:
    """Have `pm` know the hooks that modules got after it had looked at them.

    Where a program's first import is a plugin that itself imports `datasette.plugins`
    (datasette_enrichments, datasette_llm), that loads all plugins, this one included,
    while it is half built: it is registered with none of the hooks that follow.
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
