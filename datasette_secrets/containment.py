"""Shows Datasette's pages even if another plugin cannot read its secret.

A plugin may call `get_secret` in a hook that only adds links, and not catch its
SecretsError. Its links are then left out, and each reason is printed once on stderr. A hook
that raises before it returns anything takes the links of all plugins with it. Other
exceptions are not caught.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from datasette.hookspecs import hookimpl

from .errors import SecretsError, say_once

if TYPE_CHECKING:
    from datasette.app import Datasette

# Frames of these modules only pass an error on.
_PASSING = ("datasette_secrets", "pluggy", "datasette.utils")


def contain(hook: str) -> Callable[..., Any]:
    """An implementation of `hook` that wraps those of all other plugins."""

    @hookimpl(wrapper=True, specname=hook)
    def contained(datasette: Datasette) -> Generator[None, list[Any], list[Any]]:
        try:
            results = yield
        except SecretsError as error:
            return _left_out(datasette, error)
        return [_contained(datasette, result) for result in results]

    return contained


def _contained(datasette: Datasette, result: Any) -> Any:
    """`result`, with a SecretsError caught that it raises when it is called or awaited."""
    if callable(result):

        def call() -> Any:
            try:
                return _contained(datasette, result())
            except SecretsError as error:
                return _left_out(datasette, error)

        return call
    if inspect.isawaitable(result):

        async def wait() -> Any:
            try:
                return await result
            except SecretsError as error:
                return _left_out(datasette, error)

        return wait()
    return result


def _left_out(datasette: Datasette, error: SecretsError) -> list[Any]:
    plugin = next(
        (
            module
            for frame, _ in traceback.walk_tb(error.__traceback__)
            if not (module := str(frame.f_globals.get("__name__"))).startswith(_PASSING)
        ),
        "a plugin",
    )
    say_once(datasette, f"the links of {plugin} are left out: {error}")
    return []
