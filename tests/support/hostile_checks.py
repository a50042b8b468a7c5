"""A Datasette plugin whose checks try to show the value that they are given.

test_leaks.py puts it into the plugins folder of a real server. Each secret is checked in
another way; `KINDS` says how each ends.
"""

from __future__ import annotations

import asyncio
import base64
from typing import Any
from urllib.parse import quote

from datasette import hookimpl

from datasette_secrets import CheckResult, Secret

KINDS = {
    "WORKS": "works",
    "REJECTS": "rejected",
    "UNKNOWN": "unknown",
    "CUT": "works",
    "RAISES": "unknown",
    "NAMES": "unknown",
    "EXITS": "unknown",
    "RETURNS": "unknown",
    "OUTCOME": "unknown",
    "LEAVES": "works",
}


class Shown(Exception):
    """Prints as the value, however it is printed."""

    def __repr__(self) -> str:
        return str(self.args[0])


async def fail(value: str) -> None:
    raise Shown(value)


async def check(kind: str, value: str) -> Any:
    if kind == "WORKS":
        return CheckResult("works", f"the key {value} works")
    if kind == "REJECTS":
        return CheckResult("rejected", base64.b64encode(value.encode()).decode())
    if kind == "UNKNOWN":
        return CheckResult("unknown", f"GET /?key={quote(value)}")
    if kind == "CUT":
        return CheckResult("works", f"the key {value[:12]}… works")
    if kind == "RAISES":
        try:
            await fail(value)
        except Shown as error:
            raise OSError(value, value) from error
    if kind == "NAMES":
        raise type(value, (Exception,), {})(value)
    if kind == "EXITS":
        raise SystemExit(value)
    if kind == "RETURNS":
        return [value]
    if kind == "OUTCOME":
        return CheckResult(value, value)
    loop = asyncio.get_running_loop()
    loop.create_task(fail(value))  # noqa: RUF006
    loop.call_soon(lambda: 1 / len(value[:0]))
    loop.call_exception_handler({"message": value, "exception": Shown(value)})
    await asyncio.sleep(0)
    return True


@hookimpl
def register_secrets() -> list[Secret]:
    def secret(kind: str) -> Secret:
        async def ask(value: str) -> Any:
            return await check(kind, value)

        return Secret(f"CHECK_{kind}", check=ask)

    return [secret(kind) for kind in KINDS]
