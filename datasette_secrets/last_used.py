"""Records who used a secret when, at the cost of very few writes.

A use changes its row only when the row does not yet say so: this process writes one
actor for one row at most once a second. Uses that wait together are written together.
Whoever reads a secret waits for the writing 50 ms at most; after that the use is written
later, or lost with the process. No failure here stops a read.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING

from . import store

if TYPE_CHECKING:
    from datasette.database import Database

WAIT_SECONDS = 0.05
# A burst of this many transactions a second goes at once; more are spaced out, so that
# a loaded server writes some tens of transactions a second, not thousands.
_BURST = 10
_SPACING_SECONDS = 0.04
_PAUSE_SECONDS = 0.5
_PENDING_MAX = 10_000


class LastUsedRecorder:
    """Writes the uses of one database's secrets, for any number of event loops."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._clock = (0, "")
        self._written_at = ""
        self._written: set[tuple[int, str | None]] = set()
        self._queues: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Queue] = (
            weakref.WeakKeyDictionary()
        )

    def now(self) -> str:
        """This second in UTC, `YYYY-MM-DD HH:MM:SS`."""
        second = int(time.time())
        known, text = self._clock
        if second != known:
            text = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(second))
            self._clock = (second, text)
        return text

    def is_recorded(self, row: store.Row, actor_id: str | None) -> bool:
        """Whether this use would change nothing.

        The row just read must carry this second: the memory of having written it
        speaks of no other row that has taken its instance.
        """
        now = self.now()
        return (
            row.last_used_at == now
            and self._written_at == now
            and (row.id, actor_id) in self._written
        )

    async def record(self, row: store.Row, actor_id: str | None) -> None:
        """Have the use written, and wait for that 50 ms at most."""
        if not self._db.is_mutable:
            return
        loop = asyncio.get_running_loop()
        queue = self._queues.get(loop)
        if queue is None:
            queue = self._queues[loop] = _Queue(self)
        done = queue.add(store.Use(row.id, self.now(), actor_id))
        if done is not None:
            await asyncio.wait([done], timeout=WAIT_SECONDS)

    async def flush(self) -> None:
        """Write what waits, once; for a server that is about to stop."""
        queue = self._queues.get(asyncio.get_running_loop())
        if queue is not None:
            await queue.flush()

    async def write(self, uses: list[store.Use]) -> store.Recorded:
        """Write the uses, one for each row: the latest second, and its last actor."""
        latest = {use.id: use for use in sorted(uses, key=lambda use: use.at)}
        try:
            outcome = await store.record_uses(
                self._db, list(latest.values()), self.now()
            )
        except Exception:  # no database, closed, gone or broken, may stop a read here
            # The reads themselves say what is wrong with it.
            return store.Recorded(written=False)
        if outcome.written:
            self._remember(uses)
        return outcome

    def _remember(self, uses: list[store.Use]) -> None:
        newest = max(use.at for use in uses)
        if newest != self._written_at:
            self._written_at = newest
            self._written.clear()
        self._written.update((use.id, use.actor_id) for use in uses if use.at == newest)


class _Queue:
    """The uses that wait on one event loop, and what writes them when it is time.

    Between two writings there is a timer at most: a loop that ends leaves no task behind,
    and an idle queue refers to no loop.
    """

    def __init__(self, recorder: LastUsedRecorder) -> None:
        self._write = recorder.write
        # Of an actor's uses of a row the latest is enough.
        self._pending: dict[tuple[int, str | None], store.Use] = {}
        self._done: asyncio.Future[None] | None = None
        self._next: asyncio.TimerHandle | asyncio.Task[None] | None = None
        self._started: deque[float] = deque([0.0] * _BURST, maxlen=_BURST)
        self._paused_until = 0.0

    def add(self, use: store.Use) -> asyncio.Future[None] | None:
        """Queue the use: a future that is done once it was tried, None not to wait."""
        if len(self._pending) < _PENDING_MAX:
            self._pending[use.id, use.actor_id] = use
        self._schedule()
        if time.monotonic() < self._paused_until:
            return None
        if self._done is None:
            self._done = asyncio.get_running_loop().create_future()
        return self._done

    async def flush(self) -> None:
        """Write what waits, once, after what is being written and may have to wait again."""
        if isinstance(self._next, asyncio.Task):
            await asyncio.wait([self._next])
        await self.write_pending()

    async def write_pending(self) -> None:
        """Write what waits, once. Never raises."""
        if not self._pending:
            return
        uses, self._pending = self._pending, {}
        done, self._done = self._done, None
        self._started.append(time.monotonic())
        try:
            outcome = await self._write(list(uses.values()))
        finally:
            if done is not None and not done.done():
                done.set_result(None)
        if not outcome.written:
            self._paused_until = time.monotonic() + _PAUSE_SECONDS
            if outcome.try_again:
                self._pending = uses | self._pending

    def _schedule(self) -> None:
        if self._pending and self._next is None:
            loop = asyncio.get_running_loop()
            self._next = loop.call_later(self._delay(), self._start)

    def _start(self) -> None:
        self._next = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        try:
            await self.write_pending()
        finally:
            self._next = None
            self._schedule()

    def _delay(self) -> float:
        now = time.monotonic()
        if now < self._paused_until:
            return self._paused_until - now
        if now - self._started[0] > 1:
            return 0
        return max(0, self._started[-1] + _SPACING_SECONDS - now)
