"""Connections of a service: one over which nothing comes keeps nobody out.

uvicorn counts connections and refuses requests beyond a limit, but closes one only behind an
answer. So a connection over which no request ever comes, or one that comes byte by byte, would
count for ever.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from uvicorn.protocols.http.auto import AutoHTTPProtocol

MOST_CONNECTIONS: Final = 128
IDLE_SECONDS: Final = 30
LEAST_IDLE_SECONDS: Final = 1
"""Nobody makes way before: the request may be here, and not yet read."""
LONGEST_HEAD: Final = 2**16
"""Bytes before the body."""


class _Connection(asyncio.Protocol):
    """What is added to uvicorn's protocol: a time for the next request to come, and its length."""

    connections: set[_Connection]
    transport: asyncio.Transport
    loop: asyncio.AbstractEventLoop
    cycle: Any
    idle_since = 0.0
    _timer: asyncio.TimerHandle | None = None
    _head = 0

    @property
    def is_idle(self) -> bool:
        """Whether no request is under way; the head of one may be."""
        return self.cycle is None or bool(self.cycle.response_complete)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for a request; where there is no room, who was idle for longest makes way."""
        super().connection_made(transport)
        self._wait()
        open_ones = [each for each in self.connections if not each.transport.is_closing()]
        excess = len(open_ones) - MOST_CONNECTIONS + 1
        if excess > 0:
            latest = self.loop.time() - LEAST_IDLE_SECONDS
            idle = [
                each
                for each in open_ones
                if each.is_idle and each.idle_since <= latest and each is not self
            ]
            # As many as came within a moment, when nobody had been idle for long enough.
            for each in sorted(idle, key=lambda each: each.idle_since)[:excess]:
                each.transport.close()

    def data_received(self, data: bytes) -> None:
        """Read on, but no head without an end."""
        super().data_received(data)
        self._head = self._head + len(data) if self.is_idle else 0
        if self._head > LONGEST_HEAD:
            self.transport.close()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()  # type: ignore[misc]
        self._head = 0
        self._wait()

    def connection_lost(self, error: Exception | None) -> None:
        """Wait for nothing more."""
        super().connection_lost(error)
        if self._timer is not None:
            self._timer.cancel()

    def _wait(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self.idle_since = self.loop.time()
        self._timer = self.loop.call_later(IDLE_SECONDS, self._give_up)

    def _give_up(self) -> None:
        if self.is_idle:
            self.transport.close()


def make_protocol(parser: type[asyncio.Protocol] = AutoHTTPProtocol) -> type[asyncio.Protocol]:
    """Uvicorn's protocol with these limits.

    Args:
        parser: Its own class, of the parser that is installed.
    """
    return type("Connection", (_Connection, parser), {})
