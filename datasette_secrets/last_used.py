"""Records who used a secret when, in very few writes.

`service.get_secret` hands in each use. `store.record_uses` writes `last_used_at` and
`last_used_by`, unless the row already has a later use. A process writes one actor for one row
at most once a second, and writes queued uses together. A read waits at most 50 ms for the
write. After that the use is written later. It is lost if the process is killed, if more than
10,000 wait, or if the write fails for another reason than a lock. No failure here stops a read.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections import deque
from operator import itemgetter
from typing import TYPE_CHECKING

from . import store
from .changes import now
from .database import is_locked

if TYPE_CHECKING:
    from datasette.database import Database

WAIT_SECONDS = 0.05
# This many transactions a second are not delayed. More are spaced out, so that a loaded
# server writes tens of transactions a second, not thousands.
_BURST = 10
_SPACING_SECONDS = 0.04
_PAUSE_SECONDS = 0.5
_PENDING_MAX = 10_000


class LastUsedRecorder:
    """Writes the uses of one database's secrets, for any number of event loops."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._written_at = ""
        self._written: set[tuple[int, str | None]] = set()
        self._queues: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Queue] = (
            weakref.WeakKeyDictionary()
        )

    def is_recorded(self, row: store.Row, actor_id: str | None) -> bool:
        """Whether the row already has this use.

        The time in the row is compared as well, since the row may have been replaced after
        this process wrote it.
        """
        return (
            row.last_used_at == self._written_at == now()
            and (row.id, actor_id) in self._written
        )

    async def record(self, row: store.Row, actor_id: str | None) -> None:
        """Queue the use, and wait at most 50 ms until it is written."""
        if not self._db.is_mutable:
            return
        loop = asyncio.get_running_loop()
        queue = self._queues.get(loop)
        if queue is None:
            queue = self._queues[loop] = _Queue(self)
        done = queue.add(row.id, actor_id)
        if done is not None:
            await asyncio.wait([done], timeout=WAIT_SECONDS)

    async def flush(self) -> None:
        """Write the queued uses now, when the server stops."""
        queue = self._queues.get(asyncio.get_running_loop())
        if queue is not None:
            await queue.flush()

    async def write(self, uses: dict[tuple[int, str | None], str]) -> Exception | None:
        """Write the latest second and its last actor for each row.

        Returns the error if it failed.
        """
        by_time = sorted(uses.items(), key=itemgetter(1))
        latest = {row_id: (at, actor_id) for (row_id, actor_id), at in by_time}
        try:
            failed = await store.record_uses(self._db, latest, now())
        except Exception as error:
            # A closed, missing or broken database must not stop a read here. The read
            # itself raises the error.
            return error
        if not failed:
            newest = by_time[-1][1]
            if newest != self._written_at:
                self._written_at, self._written = newest, set()
            self._written |= {use for use, at in by_time if at == newest}
        return failed


class _Queue:
    """The queued uses of one event loop, and the timer that writes them.

    Between two writes there is at most a timer, so a loop that ends leaves no task behind.
    An idle queue refers to no loop.
    """

    def __init__(self, recorder: LastUsedRecorder) -> None:
        self._write = recorder.write
        #: When a row was last used by an actor.
        self._pending: dict[tuple[int, str | None], str] = {}
        self._done: asyncio.Future[None] | None = None
        self._next: asyncio.TimerHandle | asyncio.Task[None] | None = None
        self._started: deque[float] = deque([0.0] * _BURST, maxlen=_BURST)
        self._paused_until = 0.0

    def add(self, row_id: int, actor_id: str | None) -> asyncio.Future[None] | None:
        """Queue a use. Returns a future that is done after the try, or None not to wait."""
        if len(self._pending) < _PENDING_MAX:
            self._pending[row_id, actor_id] = now()
        self._schedule()
        if time.monotonic() < self._paused_until:
            return None
        if self._done is None:
            self._done = asyncio.get_running_loop().create_future()
        return self._done

    async def flush(self) -> None:
        """Write the queued uses now, after a write that is running."""
        if isinstance(self._next, asyncio.Task):
            await asyncio.wait([self._next])
        await self._write_pending()

    def _schedule(self) -> None:
        if self._pending and self._next is None:
            loop = asyncio.get_running_loop()
            self._next = loop.call_later(self._delay(), self._start)

    def _start(self) -> None:
        self._next = asyncio.get_running_loop().create_task(self._write_pending())

    async def _write_pending(self) -> None:
        uses, self._pending = self._pending, {}
        done, self._done = self._done, None
        self._started.append(time.monotonic())
        try:
            failed = await self._write(uses) if uses else None
        finally:
            self._next = None
            if done is not None and not done.done():
                done.set_result(None)
        if failed:
            self._paused_until = time.monotonic() + _PAUSE_SECONDS
            if is_locked(failed):
                self._pending = uses | self._pending
        self._schedule()

    def _delay(self) -> float:
        time_now = time.monotonic()
        next_at = self._paused_until
        if time_now - self._started[0] <= 1:
            next_at = max(next_at, self._started[-1] + _SPACING_SECONDS)
        return max(0, next_at - time_now)
