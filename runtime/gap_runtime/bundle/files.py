"""Files that are there whole or not at all, also after a loss of power."""

from __future__ import annotations

import contextlib
import glob
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_PROCESS: Final = re.compile(r"\.partial-(\d+)$")


@contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """A path beside the given one to write to; the file takes its place when the block ends.

    Where an error ends the block, what lay there before is unchanged and nothing lies beside it.
    What a process that was killed has left there is removed.

    Raises:
        OSError: It cannot be written there.
    """
    _clear_remains(path)
    aside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield aside
        store(aside)
        aside.replace(path)
        store(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def store(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk.

    Raises:
        OSError: They cannot be brought there.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        # Some filesystems cannot do it for folders, and then need not.
        if not path.is_dir():
            raise
    finally:
        os.close(handle)


def _clear_remains(path: Path) -> None:
    """Remove what processes that are no more have written beside a file."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.partial-*"):
        found = _PROCESS.search(left.name)
        if found is not None and not is_alive(int(found[1])):
            with contextlib.suppress(OSError):
                left.unlink()


def is_alive(process: int) -> bool:
    """Whether another process of that number is there; one's own is none that wrote before."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        # It is another user's.
        return True
    return True
