"""Workers and a bounded queue: a model answers one question at a time.

All but the work itself runs on the event loop, so counts need no lock.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Final, TypeVar

from gap_runtime.errors import GapError

T = TypeVar("T")
_WEIGHT: Final = 0.1
"""Of the last work in the mean time that work takes."""


class BusyError(GapError):
    """As many requests wait as may wait. `retry_after` is in seconds."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} requests wait already; come back in {retry_after} s")
        self.retry_after = retry_after


class LateError(GapError):
    """A request that took longer than it may."""


class GoneError(GapError):
    """The client has gone, so nobody waits for the answer."""


_SAID: Final[dict[type[GapError], str]] = {
    LateError: "no answer in time; send less at once, or come back",
    GoneError: "the client has gone",
}


class Worker:
    """Does work in threads of its own, in the order in which it came."""

    def __init__(self, queue: int, *, threads: int = 1) -> None:
        """Begin with nothing to do.

        Args:
            queue: How much may wait or run at once.
            threads: How much may run at once.
        """
        self._pool = ThreadPoolExecutor(threads)
        self._queue = queue
        self._mean_seconds = 0.0
        self.waiting = 0

    def require_room(self) -> None:
        """Refuse what could not even wait.

        Raises:
            BusyError: As much waits as may wait.
        """
        if self.waiting >= self._queue:
            raise BusyError(self.waiting, max(1, math.ceil(self.waiting * self._mean_seconds)))

    async def run(
        self,
        work: Callable[[threading.Event], T],
        *,
        seconds: float | None = None,
        gone: Callable[[], Awaitable[object]] | None = None,
    ) -> T:
        """What the work gives, when its turn has come.

        Args:
            work: Called with an event; once that is set nobody waits for the result any more.
            seconds: How long to wait for it; None for as long as it takes.
            gone: Waits until the client has gone.

        Raises:
            BusyError: As much waits as may wait.
            LateError: It takes longer.
            GoneError: The client has gone.
        """
        self.require_room()
        given_up = threading.Event()
        held = [work]
        loop = asyncio.get_running_loop()
        # Not the error itself: the pool keeps what was cancelled for a while, this with it, and an
        # error keeps all that was there where it was raised.
        awaited: asyncio.Future[type[GapError] | None] = loop.create_future()
        inner = self._pool.submit(self._time, held, given_up)
        self.waiting += 1
        inner.add_done_callback(partial(self._tell, loop, awaited))
        leaving = None if gone is None else asyncio.ensure_future(gone())
        if leaving is not None:
            leaving.add_done_callback(lambda _: _settle(awaited, GoneError))
        timer = None if seconds is None else loop.call_later(seconds, _settle, awaited, LateError)
        try:
            refused = await awaited
            if refused is not None:
                raise refused(_SAID[refused])
            return inner.result()
        finally:
            given_up.set()
            if leaving is not None:
                leaving.cancel()
            if timer is not None:
                timer.cancel()
            # Work that has not begun never will; what runs looks at the event.
            if inner.cancel():
                # The pool keeps what was cancelled until its turn comes; not the picture in it.
                held.clear()

    def _time(self, held: list[Callable[[threading.Event], T]], given_up: threading.Event) -> T:
        """Do the one work that is held, and remember how long work takes; in the thread."""
        began = time.perf_counter()
        try:
            return held.pop()(given_up)
        finally:
            self._mean_seconds += _WEIGHT * (time.perf_counter() - began - self._mean_seconds)

    def _tell(
        self,
        loop: asyncio.AbstractEventLoop,
        awaited: asyncio.Future[type[GapError] | None],
        _: Future[T],
    ) -> None:
        """Have the event loop told that the thread has let go of some work: once, it is slow."""
        # After the loop has ended there is nobody left to tell.
        if not loop.is_closed():
            loop.call_soon_threadsafe(self._finish, awaited)

    def _finish(self, awaited: asyncio.Future[type[GapError] | None]) -> None:
        """Count work as done, and wake whoever waits for it still; on the event loop."""
        self.waiting -= 1
        _settle(awaited, None)

    def stop(self, seconds: float) -> bool:
        """Do nothing that has not begun; whether what runs came to its end within some seconds."""
        idle = threading.Event()
        closing = threading.Thread(target=self._close, args=(idle,), daemon=True)
        closing.start()
        return idle.wait(seconds)

    def _close(self, idle: threading.Event) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        idle.set()


def _settle(
    awaited: asyncio.Future[type[GapError] | None], refused: type[GapError] | None
) -> None:
    """Say how it went, to whoever does not know it yet."""
    if not awaited.done():
        awaited.set_result(refused)
