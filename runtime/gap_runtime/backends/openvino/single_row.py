"""A graph of its own for calls of a single row, which are most of an answer's calls.

A compiled graph prepares every operator anew when the number of rows changes, as it does twice
with every draft. Where a single row has a graph whose shapes are all fixed, the other one has
prompts and drafts alone. It is compiled in a thread once there were enough such calls: a session
opens as fast as without, and one that answers a few times does not pay for it. Its weights lie in
memory once more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

from gap_runtime.errors import EngineError

_LOG: Final = logging.getLogger(__name__)
_ENOUGH: Final = 64
"""Calls of a single row, sixteen answers with drafts: by then, what the graph would have saved is
a good part of what it costs to compile."""


class SingleRow:
    """A request for calls of a single row, once there is one."""

    def __init__(self, open_request: Callable[[], Any] | None) -> None:
        """Compile nothing yet.

        Args:
            open_request: Compiles the graph and makes a request of it; None for no such graph.
        """
        self._open_request = open_request
        self._calls = 0
        self._future: Future[Any] | None = None

    @property
    def request(self) -> Any:
        """What calls of a single row are made with; None as long as that is the other graph's."""
        return self._future.result() if self._future is not None and self._future.done() else None

    def count(self) -> None:
        """Say that such a call is made; once there were enough, the graph is compiled."""
        self._calls += 1
        if self._open_request is not None and self._calls >= _ENOUGH:
            self._future = _start(self._open_request)
            self._open_request = None


def _start(open_request: Callable[[], Any]) -> Future[Any]:
    """Open a request in a thread that ends with it."""
    threads = ThreadPoolExecutor(1, "single row")
    future = threads.submit(_try, open_request)
    threads.shutdown(wait=False)
    return future


def _try(open_request: Callable[[], Any]) -> Any:
    """A request; None, and a line that says why, where OpenVINO makes none."""
    try:
        return open_request()
    except (EngineError, RuntimeError) as error:
        _LOG.info("calls of a single row get no graph of their own: %s", error)
        return None
