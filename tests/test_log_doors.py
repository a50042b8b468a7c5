"""Every action from every door is one row of the change log, and none if it is refused."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeDatasette
from datasette.app import Datasette
from support import zero
from support.console import Console, key_id
from test_log import NAME, VALUE, Row, alter, log
from test_registered import registering, works

from datasette_secrets import (
    DatabaseUnavailable,
    Secret,
    delete_secret,
    envelope,
    restore_secret,
    set_secret,
)

NEW = envelope.generate_master_key()
DATE = "2031-05-31"
CHECKED = {"outcome": "works"}

#: The name, the version and the detail that each action writes.
WRITTEN: dict[str, tuple[str | None, int | None, Any]] = {
    "set-secret": (NAME, 3, None),
    "import": (NAME, 3, None),
    "set with a date": (NAME, 3, None),
    "keep": (NAME, 3, {"pruned": [1]}),
    "roll back": (NAME, 3, {"rolled_back_from": 1}),
    "set-note": (NAME, 2, None),
    "set-renew-by": (NAME, 2, {"renew_by": DATE}),
    "check-secret": (NAME, 2, CHECKED),
    "delete-secret": (NAME, 2, None),
    "restore-secret": (NAME, 2, None),
    "destroy-secret": (NAME, 1, {"versions": [1]}),
    "destroy-row": (NAME, 1, {"versions": [1], "id": 1}),
    "get-secret": (NAME, 2, None),
    "rotate-encryption-key": (None, None, {"key_id": key_id(NEW), "versions": 2}),
    "upgrade-secrets": (None, None, {"versions": 1}),
}
LOGGED_AS = dict.fromkeys(
    ("import", "set with a date", "keep", "roll back"), "set-secret"
) | {"destroy-row": "destroy-secret"}

FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "set-secret": (f"{NAME}/-/set", {"value": VALUE}),
    "set with a date": (f"{NAME}/-/set", {"value": VALUE, "renew_by": DATE}),
    "set-note": (f"{NAME}/-/set", {"note": "a note"}),
    "set-renew-by": (f"{NAME}/-/set", {"renew_by": DATE}),
    "check-secret": (f"{NAME}/-/check", {}),
    "delete-secret": (f"{NAME}/-/delete", {}),
    "restore-secret": (f"{NAME}/-/restore", {}),
    "roll back": (f"{NAME}/-/rollback", {"version": 1}),
    "destroy-secret": (f"{NAME}/-/destroy", {"version": 1}),
    "rotate-encryption-key": ("-/rotate", {}),
    "upgrade-secrets": ("-/upgrade", {}),
}

COMMANDS: dict[str, tuple[str, ...]] = {
    "set-secret": ("set", NAME),
    "set with a date": ("set", NAME, "--renew-by", DATE),
    "import": ("import", "-"),
    "set-note": ("note", NAME, "a note"),
    "set-renew-by": ("renew", NAME, DATE),
    "check-secret": ("check", NAME),
    "delete-secret": ("delete", NAME, "-y"),
    "restore-secret": ("restore", NAME, "-y"),
    "roll back": ("rollback", NAME, "1", "-y"),
    "destroy-secret": ("destroy", NAME, "--version", "1", "-y"),
    "destroy-row": ("destroy-row", "1", "-y"),
    "get-secret": ("get", NAME),
    "rotate-encryption-key": ("rotate-key",),
    "upgrade-secrets": ("upgrade", "-y"),
}

FUNCTIONS: dict[str, Callable[..., Awaitable[Any]]] = {
    "set-secret": lambda datasette, name, **who: set_secret(
        datasette, name, VALUE, **who
    ),
    "set with a date": lambda datasette, name, **who: set_secret(
        datasette, name, VALUE, renew_by=DATE, **who
    ),
    "keep": lambda datasette, name, **who: set_secret(
        datasette, name, VALUE, keep=2, **who
    ),
    "delete-secret": delete_secret,
    "restore-secret": restore_secret,
}


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    with registering(plugin=[Secret(NAME, check=works)]):
        yield


def prepare(console: Console, action: str) -> list[Row]:
    """Two versions under the old key, and what else the action needs; the log so far."""
    asyncio.run(console.fill(NAME, versions=2))
    console.configure(NEW, console.key)
    with closing(sqlite3.connect(console.internal)) as conn, conn:
        if action == "upgrade-secrets":
            token = zero.token(console.key, VALUE)
            zero.insert(conn, "LEGACY", 1, token)
        if action == "restore-secret":
            conn.execute(
                "update datasette_secrets set deleted_at = '2026-01-01 00:00:00' "
                "where version = 2"
            )
    return log(console.internal)


def refuse_changes(path: Path) -> None:
    alter(
        path, "create trigger t after insert on datasette_secrets begin select 1; end"
    )


def allow_changes(path: Path) -> None:
    alter(path, "drop trigger t")


def expected(action: str, via: str, actor_id: str) -> Row:
    name, version, detail = WRITTEN[action]
    return {
        "actor_id": actor_id,
        "via": via,
        "action": LOGGED_AS.get(action, action),
        "name": name,
        "version": version,
        "detail": detail,
    }


@pytest.mark.parametrize("action", COMMANDS)
def test_a_command_that_changes_something_is_one_row(
    console: Console, action: str
) -> None:
    before = prepare(console, action)
    arguments = (*COMMANDS[action], "--actor", "cat")
    sent = f"{NAME}={VALUE}" if action == "import" else VALUE
    refuse_changes(console.internal)
    refused = console.run(*arguments, input=sent)
    # These two give their answer, and say that it was not logged.
    only_looks = action in ("get-secret", "check-secret")
    assert refused.exit_code == (0 if only_looks else 1), refused.output
    assert ("not logged" in refused.stderr) is only_looks
    assert log(console.internal) == before
    allow_changes(console.internal)

    done = console.run(*arguments, input=sent)
    assert done.exit_code == 0, done.output
    *same, added = log(console.internal)
    assert same == before
    assert added == expected(action, "shell", "cat")


@pytest.mark.parametrize(
    ("door", "action"),
    [
        *((door, action) for action in FORMS for door in ("page", "api")),
        *(("plugin", action) for action in FUNCTIONS),
    ],
)
def test_a_change_in_a_server_is_one_row(
    console: Console, make_datasette: MakeDatasette, door: str, action: str
) -> None:
    before = prepare(console, action)
    internal = str(console.internal)
    datasette = make_datasette(NEW, console.key, internal=internal)

    async def run() -> None:
        await datasette.invoke_startup()
        if door == "plugin":
            change = FUNCTIONS[action]
            refuse_changes(console.internal)
            with pytest.raises(DatabaseUnavailable):
                await change(datasette, NAME, actor_id="ann")
            assert log(internal) == before
            allow_changes(console.internal)
            await change(datasette, NAME, actor_id="ann")
            return
        assert await post(datasette, door, action, "ann") == 403
        assert log(internal) == before
        refuse_changes(console.internal)
        refused = await post(datasette, door, action, "root")
        if action == "check-secret":
            assert refused in (200, 302)
        else:
            assert refused == 503
        assert log(internal) == before
        allow_changes(console.internal)
        assert await post(datasette, door, action, "root") in (200, 302)

    asyncio.run(run())
    *same, added = log(internal)
    assert same == before
    assert added == expected(action, door, "ann" if door == "plugin" else "root")


async def post(datasette: Datasette, door: str, action: str, actor_id: str) -> int:
    path, sent = FORMS[action]
    body = {"json" if door == "api" else "data": sent}
    cookies = {"ds_actor": datasette.client.actor_cookie({"id": actor_id})}
    answer = await datasette.client.post(f"/-/secrets/{path}", cookies=cookies, **body)
    return int(answer.status_code)
