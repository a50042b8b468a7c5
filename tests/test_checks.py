"""Checks that plugins register: what they may do wrong, and that nothing of it gets out."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import logging
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from conftest import MakeDatasette
from datasette.app import Datasette
from test_registered import registering

from datasette_secrets import (
    CannotOpen,
    CheckResult,
    InvalidSecret,
    Secret,
    checks,
    delete_secret,
    envelope,
    get_secret,
    set_secret,
)
from datasette_secrets.events import via
from datasette_secrets.registry import Registered

VALUE = "sk-live 4f9c0d1e/ключ+Zq8Wn3Ty"
DROPPED = CheckResult(
    "works", "The message of the check is not shown, since it contains the value"
)


async def run(check: Any, value: str = VALUE, seconds: float = 60) -> CheckResult:
    plaintext = envelope.Plaintext.parse(value)
    secret = Registered("A", check=check, registered_by=("p",), checked_by="p")
    return await checks.run_check(secret, plaintext, seconds=seconds)


def saying(message: Any, outcome: Any = "works") -> Callable[[str], Any]:
    async def check(_: str) -> CheckResult:
        return CheckResult(outcome, message)

    return check


def returning(answer: Any) -> Callable[[str], Any]:
    async def check(_: str) -> Any:
        return answer

    return check


class Hostile:
    def __init__(self, value: str) -> None:
        self.value = value

    def __repr__(self) -> str:
        return self.value

    def __eq__(self, other: object) -> bool:
        raise ValueError(self.value)

    def __hash__(self) -> int:
        raise ValueError(self.value)

    def __bool__(self) -> bool:
        raise ValueError(self.value)

    def __getattribute__(self, name: str) -> Any:
        raise ValueError(object.__getattribute__(self, "value"))


class HostileText(str):
    def split(self, *_: Any) -> Any:
        raise ValueError(str(self))

    def __getitem__(self, _: Any) -> Any:
        raise ValueError(str(self))


async def test_a_check_is_given_what_get_secret_returns(datasette: Datasette) -> None:
    given = []

    async def check(value: str) -> bool:
        given.append(value)
        return True

    await set_secret(datasette, "A", VALUE)
    await run(check)
    assert given == [await get_secret(datasette, "A")]


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (True, "works"),
        (False, "rejected"),
        (None, "unknown"),
        (CheckResult("works"), "works"),
        (CheckResult("rejected"), "rejected"),
        (CheckResult("unknown"), "unknown"),
    ],
)
async def test_what_a_check_returns_is_its_outcome(answer: Any, outcome: str) -> None:
    assert await run(returning(answer)) == CheckResult(outcome)


async def test_a_message_is_shown_with_each_outcome() -> None:
    for outcome in checks.OUTCOMES:
        result = await run(saying("3 models\nare allowed \x1b[31m", outcome))
        assert result == CheckResult(outcome, "3 models are allowed \\x1b[31m")


NONSENSE: dict[str, Callable[[], Any]] = {
    "a number": lambda: 1,
    "zero": lambda: 0,
    "text": lambda: "works",
    "the value": lambda: VALUE,
    "a list": lambda: [VALUE],
    "a mapping": lambda: {"outcome": "works"},
    "an object": object,
    "a hostile object": lambda: Hostile(VALUE),
    "the value as the outcome": lambda: CheckResult(VALUE, VALUE),
    "another word": lambda: CheckResult("Works"),
    "an outcome that is no text": lambda: CheckResult(True),  # type: ignore[arg-type]
    "a list as the outcome": lambda: CheckResult(["works"]),  # type: ignore[arg-type]
    "a hostile outcome": lambda: CheckResult(Hostile(VALUE)),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("kind", NONSENSE)
async def test_nonsense_is_unknown(kind: str) -> None:
    result = await run(returning(NONSENSE[kind]()))
    assert result.outcome == "unknown"
    assert VALUE not in repr(result)


async def test_a_message_that_is_no_text_is_dropped() -> None:
    for message in (None, 7, b"text", Hostile(VALUE), [VALUE], HostileText("fine")):
        assert await run(saying(message)) == CheckResult("works")


class Revealing(Exception):
    pass


def raising(make: Callable[[str], BaseException]) -> Callable[[str], Any]:
    async def check(value: str) -> None:
        raise make(value)

    return check


RAISED: dict[str, Callable[[str], BaseException]] = {
    "ValueError": ValueError,
    "another": Revealing,
    "OSError": lambda value: OSError(value, value),
    "named after the value": lambda value: type(value, (Exception,), {})(value),
    "SystemExit": SystemExit,
    "KeyboardInterrupt": KeyboardInterrupt,
    "CancelledError": asyncio.CancelledError,
    "TimeoutError": asyncio.TimeoutError,
}


@pytest.mark.parametrize("kind", RAISED)
async def test_the_text_of_an_exception_is_never_shown(
    kind: str,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    result = await run(raising(RAISED[kind]))
    assert result.outcome == "unknown"
    assert VALUE not in repr(result)
    assert "The check failed" in result.message or "not shown" in result.message
    assert (*capfd.readouterr(), caplog.text) == ("", "", "")


async def test_a_check_that_is_no_async_function_still_runs() -> None:
    def check(value: str) -> Any:
        raise RuntimeError(value)

    assert (await run(check)).message == "The check failed with RuntimeError"
    assert (await run(lambda _: True)).outcome == "works"
    assert (await run(lambda: True)).message == "The check failed with TypeError"


REVEALING = {
    "the value": VALUE,
    "within a sentence": f"the key {VALUE} is wrong",
    "ten characters of it": f"no such key: {VALUE[3:13]}",
    "the first ten": f"{VALUE[:10]}…",
    "the last ten": f"…{VALUE[-10:]}",
    "in capitals": VALUE.upper(),
    "over two lines": VALUE.replace(" ", "\n\t"),
    "as an address": f"GET https://api.example.com/?key={quote(VALUE, safe='')}",
    "as a form": "key=sk-live+4f9c0d1e%2F",
    "as JSON": json.dumps({"key": VALUE[-14:]}),
    "as Python": repr(VALUE),
    "as ASCII": ascii(VALUE[10:]),
    "as hexadecimal": VALUE.encode().hex(),
    "as Base64": base64.b64encode(VALUE.encode()).decode(),
    "as Base64 for URLs": base64.urlsafe_b64encode(VALUE.encode()).decode(),
    "as a password for basic authentication": base64.b64encode(
        f"user:{VALUE}".encode()
    ).decode(),
    "as another password": base64.b64encode(f":{VALUE}".encode()).decode(),
    "as a token": base64.b64encode(f"us:{VALUE}".encode()).decode(),
}


@pytest.mark.parametrize("door", REVEALING)
async def test_a_message_with_ten_characters_of_the_value_is_not_shown(
    door: str,
) -> None:
    assert await run(saying(REVEALING[door])) == DROPPED


async def test_a_short_value_is_not_shown_either() -> None:
    assert await run(saying("wrong: hunter2"), "hunter2") == DROPPED
    assert (await run(saying("wrong: hunter"), "hunter2")).message == "wrong: hunter"


async def test_nine_characters_of_the_value_are_shown() -> None:
    # Providers name a key by its first and last characters, which helps.
    message = f"Incorrect key {VALUE[:9]}***{VALUE[-4:]}"
    assert (await run(saying(message))).message == message


async def test_a_long_message_is_cut_before_anybody_sees_it() -> None:
    result = await run(saying("word " * 100_000), "x" * 65_536)
    assert len(result.message) == 200
    result = await run(saying("\x1b" * 200))
    assert len(result.message) == 200
    # What is cut off is not looked for, and not shown.
    result = await run(saying("." * 300 + VALUE))
    assert result.message == "." * 199 + "…"


async def test_a_check_that_hangs_is_unknown() -> None:
    ended = threading.Event()

    async def check(_: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    result = await run(check, seconds=0.05)
    assert result.outcome == "unknown"
    assert result.message == "The check did not answer within 0.05 seconds"
    # It is cancelled, so that it does not wait for ever with the value.
    assert await asyncio.to_thread(ended.wait, 60)


async def test_a_check_that_blocks_its_thread_delays_nobody(
    datasette: Datasette,
) -> None:
    begun, go = threading.Event(), threading.Event()

    async def check(_: str) -> bool:
        begun.set()
        return go.wait(60)

    asked = asyncio.create_task(run(check))
    assert await asyncio.to_thread(begun.wait, 60)
    await set_secret(datasette, "A", "another value")
    assert await get_secret(datasette, "A") == "another value"
    assert (await datasette.client.get("/-/versions.json")).status_code == 200
    assert not asked.done()
    go.set()
    assert (await asked).outcome == "works"


@pytest.mark.parametrize(
    ("blocking", "outcome"),
    [
        ("forever.wait()", "unknown"),
        ("await asyncio.to_thread(forever.wait)", "unknown"),
        ("asyncio.get_running_loop().run_in_executor(None, forever.wait)", "works"),
    ],
)
def test_a_process_ends_while_a_check_blocks(blocking: str, outcome: str) -> None:
    program = """
import asyncio, threading
from datasette_secrets import checks, envelope
from datasette_secrets.registry import Registered

forever = threading.Event()

async def check(value):
    BLOCKING
    return True

async def main():
    value = envelope.Plaintext.parse("a value")
    secret = Registered("A", check=check)
    result = await checks.run_check(secret, value, seconds=1)
    print(result.outcome)

asyncio.run(main())
""".replace("BLOCKING", blocking)
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        check=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == (f"{outcome}\n", "")


async def test_what_a_check_leaves_behind_is_not_logged(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(value: str) -> None:
        raise ValueError(value)

    async def wait(value: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise ValueError(value)

    async def check(value: str) -> bool:
        loop = asyncio.get_running_loop()
        left = [loop.create_task(each(value)) for each in (fail, wait)]
        await asyncio.sleep(0)
        loop.call_soon(lambda: 1 / 0)
        await asyncio.sleep(0)
        left.clear()
        gc.collect()
        return not left

    assert (await run(check)).outcome == "works"
    for thread in threading.enumerate():
        if thread.name == "check of A":
            await asyncio.to_thread(thread.join, 60)
    assert (*capfd.readouterr(), caplog.text) == ("", "", "")


async def test_what_a_thread_of_a_check_raises_later_is_not_logged(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    loop_is_closed, threads = threading.Event(), []

    def fail(value: str) -> None:
        threads.append(threading.current_thread())
        loop_is_closed.wait(60)
        raise ValueError(value)

    async def check(value: str) -> bool:
        asyncio.get_running_loop().run_in_executor(None, fail, value)
        return True

    assert (await run(check)).outcome == "works"
    for thread in threading.enumerate():
        if thread.name == "check of A":
            await asyncio.to_thread(thread.join, 60)
    loop_is_closed.set()
    for thread in threads:
        await asyncio.to_thread(thread.join, 60)
    assert threads
    assert (*capfd.readouterr(), caplog.text) == ("", "", "")


async def test_a_check_has_a_loop_of_its_own() -> None:
    loops = []

    async def check(_: str) -> bool:
        loops.append(asyncio.get_running_loop())
        return await asyncio.to_thread(lambda: True)

    assert (await run(check)).outcome == "works"
    assert loops != [asyncio.get_running_loop()]


async def test_a_name_without_a_check_is_refused(datasette: Datasette) -> None:
    with registering(plugin=[Secret("A"), Secret("B", check=returning(True))]):
        assert (await checks.find_check(datasette, "B")).checked_by == "plugin"
        for name in ("A", "NEVER_REGISTERED"):
            with pytest.raises(InvalidSecret, match=f"registered a check for {name}"):
                await checks.find_check(datasette, name)


# Where it is asked.


def logged(path: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as conn:
        return conn.execute(
            "select actor_id, via, name, version, detail from datasette_secrets_log "
            "where action = 'check-secret' order by id"
        ).fetchall()


async def test_the_value_that_is_read_now_is_checked_and_its_version_logged(
    datasette: Datasette, internal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    async def check(value: str) -> CheckResult:
        given.append(value)
        return CheckResult("works", "a message")

    with registering(plugin=[Secret("A", check=check)]):
        await set_secret(datasette, "A", "first")
        await set_secret(datasette, "A", "second")
        via.set("page")
        result = await checks.check_stored(datasette, "A", actor_id="ann")
        assert result == CheckResult("works", "a message")
        monkeypatch.setenv("DATASETTE_SECRETS_A", "from the environment")
        await checks.check_stored(datasette, "A", actor_id="ann")
    assert given == ["second", "from the environment"]
    assert logged(internal) == [
        ("ann", "page", "A", 2, '{"outcome": "works"}'),
        ("ann", "page", "A", None, '{"outcome": "works"}'),
    ]


async def test_without_a_value_nothing_is_checked(
    datasette: Datasette, internal: str
) -> None:
    async def check(_: str) -> bool:
        raise AssertionError("it was called")

    with registering(plugin=[Secret("A", check=check)]):
        with pytest.raises(InvalidSecret, match="it is not-set"):
            await checks.check_stored(datasette, "A")
        await set_secret(datasette, "A", VALUE)
        await delete_secret(datasette, "A")
        with pytest.raises(InvalidSecret, match="it is deleted"):
            await checks.check_stored(datasette, "A")
        await set_secret(datasette, "A", VALUE)
        with closing(sqlite3.connect(internal)) as conn, conn:
            conn.execute("update datasette_secrets set encrypted = zeroblob(296)")
        with pytest.raises(CannotOpen):
            await checks.check_stored(datasette, "A")
    assert logged(internal) == []


async def test_a_new_value_that_is_rejected_is_logged_without_a_version(
    datasette: Datasette, internal: str
) -> None:
    value = envelope.Plaintext.parse(VALUE)
    via.set("page")
    for outcome in checks.OUTCOMES:
        with registering(plugin=[Secret("A", check=saying("", outcome))]):
            result = await checks.check_new(datasette, "A", value, actor_id="ann")
        assert result == CheckResult(outcome)
    assert logged(internal) == [("ann", "page", "A", None, '{"outcome": "rejected"}')]


async def test_a_name_that_cannot_be_stored_is_not_checked(
    datasette: Datasette,
) -> None:
    value = envelope.Plaintext.parse(VALUE)
    reserved = Secret("ENCRYPTION_KEY", check=returning(True))
    with (
        registering(plugin=[reserved]),
        pytest.raises(InvalidSecret, match="reserved"),
    ):
        await checks.check_new(datasette, reserved.name, value)


async def test_an_outcome_that_cannot_be_logged_is_told_all_the_same(
    make_datasette: MakeDatasette, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "data.db"
    key = envelope.generate_master_key()
    datasette = make_datasette(key, database="data", files=[str(path)], memory=False)
    with registering(plugin=[Secret("A", check=returning(True))]):
        path.touch()
        await set_secret(datasette, "A", VALUE)
        datasette = make_datasette(key, database="data", immutables=[str(path)])
        assert (await checks.check_stored(datasette, "A")).outcome == "works"
    assert "the check of A was not logged" in capsys.readouterr().err
    assert logged(str(path)) == []
