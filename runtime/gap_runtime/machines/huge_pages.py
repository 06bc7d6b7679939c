"""Huge pages for what this process holds, the weights of sessions on the CPU above all.

A step of a decoder reads every weight once. In pages of 4 KiB a good part of that time goes into
finding the pages, in a virtual machine most of all. Linux has pages of 2 MiB, as a rule for those
alone who ask for them. numpy asks for its arrays; libraries that hold weights do not, and have no
setting for it. So once they have them, their memory is moved into huge pages from here.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from threading import Thread
from typing import Final

_MAPS: Final = Path("/proc/self/maps")
_SETTING: Final = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_PAGE: Final = 2 * 2**20
_PART: Final = 4 * 2**20
"""Bytes that are moved at a time: until they are, no thread can map memory or end."""
_PAUSE: Final = 0.002
"""Seconds behind each part: without a pause, a session's call waits until all is moved."""
_COLLAPSE: Final = 25  # MADV_COLLAPSE, of Linux 6.1
_HEAP: Final = "[heap]"


def start_moving() -> Thread | None:
    """Move this process's memory into huge pages, in a thread; None where the system has none.

    It takes about as long as copying the memory once. What it holds and its size stay as they
    are. Where a kernel knows no such request, or has no memory in one piece, pages stay too.
    """
    if not sys.platform.startswith("linux") or not _are_there():
        return None
    thread = Thread(target=_move, name="huge pages", daemon=True)
    thread.start()
    return thread


def _are_there() -> bool:
    try:
        return "[never]" not in _SETTING.read_text(encoding="utf-8")
    except OSError:
        return False


def _move() -> None:
    try:
        lines = _MAPS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    advise = ctypes.CDLL(None).madvise
    for start, length in list_ranges(lines):
        # Memory may have been given back meanwhile, which is an error that means nothing.
        if not advise(ctypes.c_void_p(start), ctypes.c_size_t(length), _COLLAPSE):
            time.sleep(_PAUSE)


def list_ranges(lines: Iterable[str]) -> Iterator[tuple[int, int]]:
    """Start and length of every part of memory that huge pages can hold.

    Args:
        lines: Of the system's list of a process's memory: place, rights, and the file where it
            is of one. Memory of files is left out.
    """
    for line in lines:
        place, rights, *rest = line.split(maxsplit=5)
        if not rights.startswith("rw") or (len(rest) > 3 and rest[3] != _HEAP):
            continue
        begin, end = (int(each, 16) for each in place.split("-"))
        begin, end = -(-begin // _PAGE) * _PAGE, end // _PAGE * _PAGE
        for start in range(begin, end, _PART):
            yield start, min(_PART, end - start)
