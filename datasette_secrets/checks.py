"""Runs the check that a plugin registered, and shows nothing of the value.

The check runs in an event loop of its own, in a daemon thread, and its blocking calls run
in others. Nobody waits for it longer than ten seconds, so a check that blocks delays nobody
else, and the process can end. Whatever it returns or raises is read in that thread. Only a
CheckResult made here leaves it.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar
from urllib.parse import quote, quote_plus

from datasette.utils import await_me_maybe

from . import changes, listing, service
from .envelope import Plaintext
from .errors import DatabaseUnavailable, InvalidSecret, printable, say
from .events import Change
from .instance import get_instance
from .registry import Check, CheckResult, Registered, registered_secrets

if TYPE_CHECKING:
    from datasette.app import Datasette

P = ParamSpec("P")
T = TypeVar("T")

OUTCOMES = ("works", "rejected", "unknown")
SECONDS = 10.0
_MESSAGE_MAX_CHARACTERS = 200
# A message with so many characters of the value in a row is not shown.
_REVEALING_CHARACTERS = 10
_MEANINGS = {True: "works", False: "rejected", None: "unknown"}


async def find_check(datasette: Datasette, name: str) -> Registered:
    """The secret of this name, which has a check. Raises InvalidSecret if none has one."""
    secret = (await registered_secrets(datasette)).get(name)
    if secret is None or secret.check is None:
        raise InvalidSecret(f"No plugin registered a check for {name}")
    return secret


async def check_stored(
    datasette: Datasette, name: str, *, actor_id: str | None = None
) -> CheckResult:
    """Run the check on the value that `get_secret` would return, and log the outcome.

    Raises InvalidSecret where there is no check or no value, and what `get_secret` raises.
    """
    state = await listing.secret_state(datasette, name)
    secret = await find_check(datasette, name)
    if state.source is None:
        raise InvalidSecret(f"{name} has no value to check: it is {state.state}")
    # A value from the environment has no version.
    version = state.version if state.source == "database" else None
    try:
        value = Plaintext.parse(
            await service.get_secret(datasette, name, actor_id)
            if version is None
            else await service.get_version(datasette, name, version, actor_id=actor_id)
        )
    except InvalidSecret as error:
        raise InvalidSecret(f"{name} cannot be checked: {error}") from None
    result = await run_check(secret, value)
    await log(datasette, name, version, result, actor_id)
    return result


async def check_new(
    datasette: Datasette,
    name: str,
    value: Plaintext,
    *,
    actor_id: str | None = None,
    **details: Any,
) -> CheckResult:
    """Run the check on a value that is to be stored, unless it is rejected.

    Only a rejection is logged here. Log the other outcomes once the value is stored.
    `details`: what is to be stored with it, which `check_settable` looks at before the plugin
    gets the value. Raises InvalidSecret where there is no check, and what that raises.
    """
    secret = await find_check(datasette, name)
    await service.check_settable(datasette, name, value, **details)
    result = await run_check(secret, value)
    if result.outcome == "rejected":
        await log(datasette, name, None, result, actor_id)
    return result


async def log(
    datasette: Datasette,
    name: str,
    version: int | None,
    result: CheckResult,
    actor_id: str | None = None,
) -> None:
    """Log the outcome. `version`: the one that was checked; None where none is stored."""
    change = Change("check-secret", name, version, {"outcome": result.outcome})
    try:
        await changes.record(datasette, get_instance(datasette).db, actor_id, change)
    except DatabaseUnavailable as error:
        # Nothing was changed, and the outcome is worth more than its record.
        say(f"the check of {name} was not logged: {error}")


async def run_check(
    secret: Registered, value: Plaintext, *, seconds: float = SECONDS
) -> CheckResult:
    """Run the plugin's check on `value`. Nothing is raised, whatever it does.

    The outcome is `"unknown"` if the check raises, returns nonsense or takes longer than
    `seconds`. The message is printable, at most 200 characters, and shows nothing of the
    value.
    """
    if secret.check is None:
        return CheckResult("unknown", "No plugin registered a check")
    check = secret.check
    answer: Future[CheckResult] = Future()

    def run_in_this_thread() -> None:
        try:
            asyncio.run(_ask(check, value, seconds, answer))
        except BaseException:  # a plugin's code may do anything, exit included
            with contextlib.suppress(InvalidStateError):  # answered, or nobody waits
                answer.set_result(CheckResult("unknown", "The check failed"))

    thread_name = f"check of {secret.name}"
    threading.Thread(target=run_in_this_thread, name=thread_name, daemon=True).start()
    try:
        return await asyncio.wait_for(asyncio.wrap_future(answer), seconds)
    except asyncio.TimeoutError:
        said = f"The check did not answer within {seconds:g} seconds"
        return CheckResult("unknown", said)


class _DaemonThreads(ThreadPoolExecutor):
    """Runs every job in a daemon thread of its own, for which nothing waits.

    A loop takes only a ThreadPoolExecutor. Python waits for the threads of that class when
    it exits, so none is started here.
    """

    def submit(
        self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> Future[T]:
        job: Future[T] = Future()
        job.set_running_or_notify_cancel()  # so that it cannot be cancelled

        def run() -> None:
            try:
                job.set_result(fn(*args, **kwargs))
            except BaseException as error:  # the check gets it, as from any executor
                job.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return job


async def _ask(
    check: Check, value: Plaintext, seconds: float, answer: Future[CheckResult]
) -> None:
    loop = asyncio.get_running_loop()
    # asyncio would log an exception of the check's tasks, with its text.
    loop.set_exception_handler(lambda *_: None)
    # Python prints what a task raises if it is garbage-collected while it waits. So each
    # is kept until the loop cancels it.
    tasks: list[asyncio.Task[Any]] = []

    def create_task(_: object, job: Any, **options: Any) -> asyncio.Task[Any]:
        tasks.append(asyncio.Task(job, loop=loop, **options))
        return tasks[-1]

    loop.set_task_factory(create_task)
    loop.set_default_executor(_DaemonThreads())
    try:
        # A second longer than the caller waits, who describes a time-out better.
        asked = await_me_maybe(check(value.reveal()))
        result = _read(await asyncio.wait_for(asked, seconds + 1), value)
    except Exception as error:  # a plugin's code may raise anything
        # Only the name of the type is shown.
        message = f"The check failed with {type(error).__name__}"
        result = CheckResult("unknown", _safe(message, value))
    # Before the loop closes, which waits for tasks of the check.
    answer.set_result(result)


def _read(answer: object, value: Plaintext) -> CheckResult:
    if answer is None or isinstance(answer, bool):
        return CheckResult(_MEANINGS[answer])
    if isinstance(answer, CheckResult):
        outcome, message = answer.outcome, answer.message
        if type(outcome) is str and outcome in OUTCOMES:
            return CheckResult(outcome, _safe(message, value))
    said = "The check did not return a CheckResult, True, False or None"
    return CheckResult("unknown", said)


def _safe(message: object, value: Plaintext) -> str:
    """The message as it can be shown, or the reason why it is not shown."""
    if type(message) is not str:
        return ""
    cut = " ".join(message[: _MESSAGE_MAX_CHARACTERS + 1].split())
    if _reveals(cut, value.reveal()):
        return "The message of the check is not shown, since it contains the value"
    shown = printable(cut)
    if len(shown) > _MESSAGE_MAX_CHARACTERS:
        return f"{shown[: _MESSAGE_MAX_CHARACTERS - 1]}…"
    return shown


def _reveals(message: str, value: str) -> bool:
    """Whether the value, or ten characters of it in a row, is in the message."""
    message = message.casefold()
    if " ".join(value.split()).casefold() in message:
        return True
    length = _REVEALING_CHARACTERS
    windows = {message[at : at + length] for at in range(len(message) - length + 1)}
    return any(
        window in spelling for spelling in _spellings(value) for window in windows
    )


def _spellings(value: str) -> Iterator[str]:
    """The value in the encodings that a message may use, in lower case."""
    utf8 = value.encode("utf-8")
    yield from map(str.casefold, (value, " ".join(value.split()), utf8.hex()))
    for spell in (repr, ascii, json.dumps, quote_plus):
        yield spell(value).casefold()
    yield quote(value, safe="").casefold()
    for skipped in range(3):  # within a longer text, it can start at any of these
        encoded = base64.b64encode(utf8[skipped:]).decode("ascii").casefold()
        yield encoded
        yield encoded.translate(str.maketrans("+/", "-_"))
