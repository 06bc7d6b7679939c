"""A graph of its own for calls of a single row: half of an answer's with drafts, all without.

A compiled graph prepares every operator anew when the number of rows changes, as it does twice
with every draft. Where a single row has a graph whose shapes are all fixed, the other one has
prompts and drafts alone. It is compiled in a thread once there were enough such calls: a session
opens as fast as without, and one that answers a few times is spared it. Its weights lie in memory
once more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from threading import Thread
from typing import Any, Final

from gap_runtime.backends.openvino.memory import infer
from gap_runtime.errors import GapError

ENOUGH: Final = 64
"""Calls of a single row, 16 to 30 answers with drafts: by then, what the graph would have saved is
a good part of what it costs to compile."""
_LOG: Final = logging.getLogger(__name__)


class SingleRow:
    """Calls of a single row by their own graph, once it is there, and for as long as it works."""

    def __init__(self, open_request: Callable[[], Any] | None) -> None:
        """Compile nothing yet.

        Args:
            open_request: Compiles the graph and makes a request of it; None for no such graph.
        """
        self._open_request = open_request
        self._calls = 0
        self._request: Any = None

    @property
    def is_open(self) -> bool:
        """Whether the graph is there."""
        return self._request is not None

    def run(self, tensors: Mapping[str, Any]) -> bool:
        """Make a call; False where it is left to the other graph.

        Args:
            tensors: Inputs and outputs of the call, by name.
        """
        if self._request is None:
            self._count()
            return False
        try:
            infer(self._request, tensors)
        except RuntimeError as error:
            self._request = None
            _tell(error)
            return False
        return True

    def _count(self) -> None:
        self._calls += 1
        if self._open_request is None or self._calls < ENOUGH:
            return
        open_request, self._open_request = self._open_request, None
        # Python waits for the thread at its end; C++ code that is stopped could take it down.
        thread = Thread(target=self._open, args=(open_request,), name="single row")
        try:
            thread.start()
        except RuntimeError as error:
            # A system may have no more of them.
            _tell(error)

    def _open(self, open_request: Callable[[], Any]) -> None:
        try:
            self._request = open_request()
        except (GapError, RuntimeError, MemoryError) as error:
            _tell(error)


def _tell(error: Exception) -> None:
    _LOG.info("calls of a single row have no graph of their own: %s", error)
