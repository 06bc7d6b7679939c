"""A copy of this process that works beside it (a fork: so that nothing is loaded twice).

Each of the two has an interpreter lock of its own. What the copy makes comes back through a pipe;
what it cannot do, for whatever reason, does not come, and is left to the process.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, Final, NoReturn, Self

import torch

_OPEN: Final = Path("/dev/fd")
"""Where the system lists the files that a process has open."""
_STANDARD: Final = frozenset({0, 1, 2})


class ProcessCopy:
    """At work from its making to the end of the context. Make it where no other thread runs."""

    def __init__(self, work: Callable[[], Iterable[Any]], *, needs: Sequence[int] = ()) -> None:
        """Begin.

        Args:
            work: Makes what is sent, in the copy.
            needs: Descriptors of files that it works with; the copy closes all others, as a lock
                is held as long as one of them is open.
        """
        self._results, send = Pipe(duplex=False)
        with warnings.catch_warnings():
            # Threads of libraries alone, which the copy does without.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._process = os.fork()
        if not self._process:
            _work(work, send, needs)
        send.close()

    def receive(self, patience: float | None = None) -> Iterator[Any]:
        """What the copy made, one after the other, until it ends.

        Args:
            patience: Seconds that each may take, without end where there is none.
        """
        with contextlib.suppress(OSError, EOFError, pickle.UnpicklingError):
            while self._results.poll(patience):
                yield self._results.recv()

    def __enter__(self) -> Self:
        """Nothing more to do."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the copy, which may still be at work where this process failed."""
        self._results.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)


def _work(work: Callable[[], Iterable[Any]], send: Connection, needs: Sequence[int]) -> NoReturn:
    # Nothing of the process's own ways out may run in its copy, whatever goes wrong there.
    code = 1
    try:
        opened = {int(each.name) for each in _OPEN.iterdir()}
        for descriptor in opened - {*needs, send.fileno()} - _STANDARD:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        # A pool of threads does not survive a fork.
        torch.set_num_threads(1)
        for each in work():
            send.send(each)
        code = 0
    finally:
        os._exit(code)
