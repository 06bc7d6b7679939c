"""The newest frame of a live source, whoever asks: frames are dropped, never waited for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Final

from gap_runtime.errors import GapError, InputError
from gap_runtime.grounding.video.source import Frame, Source

_POLL_SECONDS: Final = 0.2
"""How soon a wish to stop is heard while no frame comes."""


class LatestFrames:
    """Reads a source in a thread of its own and keeps the newest frame of those that are wanted.

    `dropped` counts wanted frames that a newer one took the place of.
    """

    def __init__(self, source: Source, *, every: int) -> None:
        """Begin to read.

        Args:
            source: That does not wait.
            every: One of so many frames is wanted.
        """
        self.dropped = 0
        self._source, self._every = source, every
        self._newest: Frame | None = None
        self._broken: list[InputError] = []
        self._error: GapError | None = None
        self._is_over = self._is_given_up = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read, name="frames", daemon=True)
        self._thread.start()

    def read(self, is_stopped: Callable[[], bool]) -> Iterator[Frame | InputError]:
        """The newest frame, again and again, until the source ends or a stop is wished for.

        Raises:
            InputError: The source broke off.
        """
        while True:
            with self._changed:
                while self._newest is None and not self._broken and not self._is_over:
                    self._changed.wait(_POLL_SECONDS)
                    if is_stopped():
                        return
                broken, self._broken = self._broken, []
                frame, self._newest = self._newest, None
                is_over = self._is_over
            yield from broken
            if frame is not None:
                yield frame
            elif is_over:
                if self._error is not None:
                    raise self._error
                return

    def close(self) -> None:
        """Read no more."""
        self._is_given_up = True
        # What a device is waited for ends by its own time limit.
        self._thread.join(_POLL_SECONDS)

    def _read(self) -> None:
        try:
            for frame in self._source.read():
                if self._is_given_up:
                    break
                with self._changed:
                    self._take(frame)
                    self._changed.notify()
        except GapError as error:
            self._error = error
        finally:
            with self._changed:
                self._is_over = True
                self._changed.notify()

    def _take(self, frame: Frame | InputError) -> None:
        if isinstance(frame, InputError):
            self._broken.append(frame)
        elif frame.index % self._every == 0:
            self.dropped += self._newest is not None
            self._newest = frame
