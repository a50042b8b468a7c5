"""Keeps pages alive when another plugin cannot read its secret.

A plugin may ask for its secret in a hook that only adds links, and let out what
`get_secret` raises. Such a SecretsError costs that plugin's links, and one line on stderr
for each plugin and secret. Anything else passes.
"""

from __future__ import annotations

import inspect
import sys
import traceback
import weakref
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from datasette.hookspecs import hookimpl

from .errors import SecretsError, printable

if TYPE_CHECKING:
    from datasette.app import Datasette

# Frames of these pass an error on and are not where it comes from.
_PASSING = ("datasette_secrets", "pluggy", "datasette.utils")

_said: weakref.WeakKeyDictionary[Datasette, set[str]] = weakref.WeakKeyDictionary()


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
    """A result with the error caught that it may raise when Datasette calls or awaits it."""
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
    said = _said.setdefault(datasette, set())
    subject = f"{plugin} {getattr(error, 'name', '')} {error.code}"
    if subject not in said:
        said.add(subject)
        print(
            f"datasette-secrets: the links of {plugin} are left out: {printable(error)}",
            file=sys.stderr,
        )
    return []
