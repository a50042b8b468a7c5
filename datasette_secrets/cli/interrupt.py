"""Runs the task of a command, so that Ctrl-C always ends it.

The first SIGINT cancels the task, which ends after the current transaction. The second
ends the process with exit code 130. Python's own handler raises wherever it strikes. It
could lose a wake-up of the event loop, for which the task would wait for ever. So only
what blocks the loop, such as a prompt, is interrupted in that way. A SIGINT that is
ignored when the command starts stays ignored.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

_EXIT_CODE = 130  # 128 and the number of SIGINT, as a shell says it


class Cancelled(KeyboardInterrupt):
    """Ctrl-C came while the task ran, and not while it waited at a prompt."""


class _Handler:
    def __init__(self, task: asyncio.Task[None]) -> None:
        self._task = task
        self.has_struck = False

    def __call__(self, *_: object) -> None:
        if self.has_struck:
            os._exit(_EXIT_CODE)
        self.has_struck = True
        self._task.cancel()
        loop = self._task.get_loop()
        if not loop.is_closed():
            loop.call_soon_threadsafe(lambda: None)  # it may wait for something else


def run(main: Coroutine[Any, Any, None], close: Callable[[], None]) -> None:
    """Run a coroutine on a loop of its own, and then `close`.

    Raises KeyboardInterrupt when Ctrl-C ended a prompt, and Cancelled when it ended
    anything else. No write is cut off.
    """
    loop = asyncio.new_event_loop()
    task = loop.create_task(main)
    with _handling(_Handler(task)):
        try:
            loop.run_until_complete(task)
        except asyncio.CancelledError:
            raise Cancelled from None
        finally:
            waiting = asyncio.all_tasks(loop)
            for each in waiting:
                each.cancel()
            if waiting:
                loop.run_until_complete(asyncio.wait(waiting))
            loop.run_until_complete(loop.shutdown_asyncgens())
            if not task.cancelled():
                task.exception()  # or the loop complains that nobody asked
            close()
            loop.close()


@contextmanager
def _handling(handler: Callable[..., Any]) -> Iterator[None]:
    is_main = threading.current_thread() is threading.main_thread()
    # Only the main thread can set a handler, and what is ignored stays ignored.
    if not (is_main and callable(signal.getsignal(signal.SIGINT))):
        yield
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        if getattr(before, "has_struck", False):
            raise KeyboardInterrupt  # nothing else would answer one that came just before
        yield
    finally:
        # Once ours has struck it stays: the process may yet wait for a thread.
        if not getattr(handler, "has_struck", False):
            signal.signal(signal.SIGINT, before)


def blocking() -> AbstractContextManager[None]:
    """Let Ctrl-C interrupt what blocks the loop at once, with KeyboardInterrupt."""
    return _handling(signal.default_int_handler)
