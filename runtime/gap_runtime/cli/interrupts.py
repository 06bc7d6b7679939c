"""Ctrl-C: one line while Python still loads a command, an exception once it works.

This module and what it imports stay small: until it is loaded, Ctrl-C is Python's own.
"""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType

STOPPED = 130
"""Exit code after Ctrl-C, as shells count it."""
_interrupts: list[int] = []
"""Signals that came since a command began: a library may take one for a failure of its own."""


def stop_at_once(_signal: int, _frame: FrameType | None) -> None:
    """End the process in one line; nothing is there yet that has to be tidied up."""
    with contextlib.suppress(OSError):
        os.write(2, b"stopped\n")
    os._exit(STOPPED)


def stop_early() -> None:
    """From here on Ctrl-C ends the process at once, unless who started it has it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop_at_once)


def stop_tidily() -> None:
    """From here on Ctrl-C is an exception again, so that work can be tidied up."""
    if signal.getsignal(signal.SIGINT) is stop_at_once:
        signal.signal(signal.SIGINT, _interrupt)


def is_interrupted() -> bool:
    """Whether Ctrl-C came, also where a library turned the exception into another one."""
    return bool(_interrupts)


def _interrupt(number: int, frame: FrameType | None) -> None:
    _interrupts.append(number)
    signal.default_int_handler(number, frame)
