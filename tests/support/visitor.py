"""Somebody with a browser without JavaScript, and plugins for as long as a test needs them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from datasette import hookimpl
from datasette.app import Datasette
from datasette.plugins import pm


class Visitor:
    """Root with a browser without JavaScript: pages, and forms as they stand."""

    def __init__(self, datasette: Datasette) -> None:
        self.datasette = datasette
        self.cookies = {"ds_actor": datasette.client.actor_cookie({"id": "root"})}

    async def get(self, path: str = "") -> Any:
        return await self.datasette.client.get(
            "/-/secrets" + path, cookies=self.cookies
        )

    async def post(self, path: str, **fields: Any) -> Any:
        return await self.datasette.client.post(
            "/-/secrets" + path, data=fields, cookies=self.cookies
        )

    async def messages(self, answer: Any) -> list[str]:
        """The messages that the page after this answer shows."""
        cookies = {**self.cookies, **dict(answer.cookies)}
        page = await self.datasette.client.get(
            answer.headers["location"], cookies=cookies
        )
        return re.findall(
            r'<p class="message-(?:info|warning)">([^<]*)</p>\s*(?=<p|</div>)',
            page.text,
        )


@contextmanager
def plugin(**hooks: Any) -> Iterator[None]:
    """A plugin with these hooks, while it lasts."""
    module = type(
        "Plugin", (), {name: hookimpl(staticmethod(fn)) for name, fn in hooks.items()}
    )
    pm.register(module, name="a-plugin")
    try:
        yield
    finally:
        pm.unregister(name="a-plugin")
