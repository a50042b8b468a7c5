"""For pytest, when it runs the suites of plugins that depend on datasette-secrets.

They were written for a Datasette that hands out CSRF tokens, which 1.0a27 no longer does,
and in which root may do everything without `--root`: every response carries that cookie
again, and root is enabled. And datasette-enrichments' tests of secrets need an enrichment
that its sdist leaves out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from datasette import hookimpl
from datasette.plugins import pm

COOKIE = (b"set-cookie", b"ds_csrftoken=no-longer-checked; Path=/")


class FormerDatasette:
    __name__ = "former_datasette"

    @hookimpl
    def startup(self, datasette: Any) -> None:
        datasette.root_enabled = True

    @hookimpl
    def asgi_wrapper(self, datasette: Any) -> Any:
        return supply_cookie


def supply_cookie(app: Any) -> Any:
    async def with_cookie(scope: Any, receive: Any, send: Any) -> None:
        async def send_with_cookie(event: Any) -> None:
            if event["type"] == "http.response.start":
                event = {**event, "headers": [*event["headers"], COOKIE]}
            await send(event)

        await app(scope, receive, send_with_cookie)

    return with_cookie


def make_replacing_enrichment() -> Any:
    from datasette_enrichments import Enrichment
    from wtforms import Form, StringField

    from datasette_secrets import Secret

    class Replacing(Enrichment):
        name = "Replace string with a secret"
        slug = "secretreplace"
        description = "Needs a secret"
        secret = Secret("STRING_SECRET", "What to replace the string with")

        async def get_config_form(self) -> Any:
            return type(
                "Fields",
                (Form,),
                {"column": StringField("Column"), "string": StringField("String")},
            )

        async def enrich_batch(
            self, datasette: Any, db: Any, table: str, rows: Any, pks: Any, config: Any
        ) -> None:
            secret = await self.get_secret(datasette, config)
            column = config["column"]
            for row in rows:
                await db.execute_write(
                    f"update [{table}] set [{column}] = ? where [{pks[0]}] = ?",  # noqa: S608
                    [row[column].replace(config["string"], secret), row[pks[0]]],
                )

    return Replacing()


class ReplacingEnrichment:
    __name__ = "replacing_enrichment"

    @hookimpl
    def register_enrichments(self) -> Any:
        return [make_replacing_enrichment()]


@pytest.fixture(autouse=True)
def _supplied() -> Iterator[None]:
    plugins = (FormerDatasette(), ReplacingEnrichment())
    for plugin in plugins:
        pm.register(plugin)
    yield
    for plugin in plugins:
        pm.unregister(plugin)
