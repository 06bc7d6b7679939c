"""What exports that were killed have left: found by the lock that a living one holds, removed.

.NAME.partial-HOST-PID     a bundle that is being made, locked by its process
.NAME.replaced-HOST-PID    an older bundle that gave way, where folders cannot be exchanged

A folder may be shared by machines, whose locks and processes cannot be seen from here: what
another one left is said and never removed.
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

from gap_runtime.bundle.files import host_name, is_alive

_REMAINS: Final = re.compile(r"\.(.+)\.(partial|replaced)-([\w.-]+)-([0-9]+)")

Held = Literal["here", "elsewhere", "unknown"]
"""Who holds the lock of a folder: we now, another process, or the system cannot tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remains:
    """A folder of an export that is no more, as far as this machine can tell.

    `bundle` is what it was to be, `host` the machine that made it, `is_ours` whether that is this
    one.
    """

    folder: Path
    bundle: Path
    is_whole: bool
    host: str

    @property
    def is_ours(self) -> bool:
        """Whether this machine can tell that its process is no more, and so may remove it."""
        return self.host == host_name()

    def measure(self) -> int:
        """Bytes of the files in it."""
        size = 0
        for path in self.folder.rglob("*"):
            with contextlib.suppress(OSError):
                size += path.lstat().st_size
        return size


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
    """Folders in a folder whose exports are no more, without those of living ones.

    Raises:
        OSError: The folder cannot be looked through.
    """
    found = []
    for path in sorted(home.glob(".*-*")):
        match = _REMAINS.fullmatch(path.name)
        if match is None or not _may_be_left(path, match) or _is_at_work(path, match):
            continue
        found.append(
            Remains(
                folder=path,
                bundle=home / match[1],
                is_whole=match[2] == "replaced",
                host=match[3],
            )
        )
    return found


def clear(remains: Remains) -> None:
    """Remove what was left; a whole bundle goes back to its place where nothing lies there.

    Raises:
        OSError: The system does not let all of it be removed.
    """
    if remains.is_whole and not remains.bundle.exists():
        remains.folder.rename(remains.bundle)
    elif remains.folder.is_symlink():
        # The bundle's place was one, to a bundle elsewhere, which stays as it is.
        remains.folder.unlink()
    else:
        shutil.rmtree(remains.folder)


def find_writer(out: Path) -> str | None:
    """The process that is making a bundle of that place; None where none is."""
    for path in out.parent.glob(".*-*"):
        match = _REMAINS.fullmatch(path.name)
        if match is not None and match[1] == out.name and _is_at_work(path, match):
            return match[4] if match[3] == host_name() else f"{match[4]} on {match[3]}"
    return None


def _may_be_left(path: Path, match: re.Match[str]) -> bool:
    """A folder; or the link that a bundle's place was before it gave way."""
    return path.is_dir() and (match[2] == "replaced" or not path.is_symlink())


def _is_at_work(path: Path, match: re.Match[str]) -> bool:
    """Whether the export of a folder lives; a number alone may have come to another process."""
    if match[2] == "replaced":
        partial = path.with_name(f".{match[1]}.partial-{match[3]}-{match[4]}")
        return partial.is_dir() and _is_held(partial, match)
    return _is_held(path, match)


def _is_held(path: Path, match: re.Match[str]) -> bool:
    with contextlib.ExitStack() as trial:
        try:
            held = lock(path, trial)
        except FileNotFoundError:
            return False
        except OSError:
            held = "unknown"
    if held == "unknown":
        return match[3] == host_name() and is_alive(int(match[4]))
    return held == "elsewhere"
