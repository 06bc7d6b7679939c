"""What a command reads and writes of its own, where it was closed or takes nothing more.

A stream that who started the command had closed is none at all in Python, and the next file that
is opened gets its descriptor: what libraries print would be written into that file. One that is
full fails at every word, at the last ones too.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Final

_STREAMS: Final = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))
"""By descriptor: their names and how they are opened."""


class _Stderr(io.TextIOWrapper):
    """Where nobody can be told, the work goes on."""

    def write(self, text: str, /) -> int:
        """Write a text, or drop it."""
        with contextlib.suppress(OSError):
            return super().write(text)
        return len(text)

    def flush(self) -> None:
        """Bring what was written to who reads it, where that can be."""
        with contextlib.suppress(OSError):
            super().flush()


def prepare_streams() -> None:
    """Put what takes all in the place of closed streams, and stderr where it fails nobody."""
    for name, mode in _STREAMS:
        if getattr(sys, name) is None:
            # The lowest descriptor that is closed is what is opened next, which is its own.
            with contextlib.suppress(OSError):
                opened = os.open(os.devnull, os.O_RDWR)
                setattr(sys, name, os.fdopen(opened, mode, encoding="utf-8"))
    stream = sys.stderr
    # Not that of who calls from Python and has put one of its own there.
    if stream is sys.__stderr__ and type(stream) is io.TextIOWrapper:
        sys.stderr = _Stderr(
            stream.buffer,
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=stream.line_buffering,
            # Instead of lines, where Python itself is told to hold nothing back.
            write_through=stream.write_through,
        )


def give_up_stdout() -> None:
    """From here on what is printed is dropped, what waits in a buffer too.

    Where its reader has gone or its disk is full, it would fail again as Python ends.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
