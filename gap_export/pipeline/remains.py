"""What exports that were killed have left: found by the lock that a living one holds, removed.

.NAME.partial-PID     a bundle that is being made, locked by its process
.NAME.replaced-PID    an older bundle that gave way, where folders cannot be exchanged
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from gap_runtime.bundle.files import is_alive

_REMAINS: Final = re.compile(r"\.(.+)\.(partial|replaced)-(\d+)")

Held = Literal["here", "elsewhere", "unknown"]
"""Who holds the lock of a folder: we now, another process, or the system cannot tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remains:
    """A folder of an export that is no more. `size` in bytes, `bundle` what it was to be."""

    folder: Path
    bundle: Path
    is_whole: bool
    size: int


def lock(folder: Path, locks: contextlib.ExitStack, *, wait: bool = False) -> Held:
    """Lock a folder until the stack is left. It goes with its process, however that ends.

    Raises:
        OSError: The folder cannot be opened.
    """
    try:
        import fcntl  # noqa: PLC0415 - Windows has none
    except ImportError:
        return "unknown"
    handle = os.open(folder, os.O_RDONLY)
    locks.callback(os.close, handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        # Others come from filesystems without locks.
        return "elsewhere" if error.errno in {errno.EWOULDBLOCK, errno.EACCES} else "unknown"
    return "here"


def find_remains(home: Path) -> list[Remains]:
    """Folders in a folder whose exports are no more, without those of living ones."""
    found = []
    for path in sorted(home.glob(".*-*")):
        match = _REMAINS.fullmatch(path.name)
        if match is None or path.is_symlink() or not path.is_dir() or _is_at_work(path, match):
            continue
        found.append(
            Remains(
                folder=path,
                bundle=home / match[1],
                is_whole=match[2] == "replaced",
                size=_measure(path),
            )
        )
    return found


def clear(remains: Remains) -> None:
    """Remove what was left; a whole bundle goes back to its place where nothing lies there."""
    if remains.is_whole and not remains.bundle.exists():
        remains.folder.rename(remains.bundle)
    else:
        shutil.rmtree(remains.folder, ignore_errors=True)


def find_writer(out: Path) -> str | None:
    """The process that is making a bundle of that place; None where none is."""
    for path in out.parent.glob(".*-*"):
        match = _REMAINS.fullmatch(path.name)
        if match is not None and match[1] == out.name and _is_at_work(path, match):
            return match[3]
    return None


def _is_at_work(path: Path, match: re.Match[str]) -> bool:
    """Whether the export of a folder lives; a number alone may have come to another process."""
    if match[2] == "replaced":
        partial = path.with_name(f".{match[1]}.partial-{match[3]}")
        return partial.is_dir() and _is_held(partial, int(match[3]))
    return _is_held(path, int(match[3]))


def _is_held(path: Path, process: int) -> bool:
    with contextlib.ExitStack() as trial:
        try:
            held = lock(path, trial)
        except FileNotFoundError:
            return False
        except OSError:
            held = "unknown"
    return is_alive(process) if held == "unknown" else held == "elsewhere"


def _measure(folder: Path) -> int:
    """Bytes of the files in a folder."""
    size = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            size += path.lstat().st_size
    return size
