"""Files that are there whole or not at all, also after a loss of power."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import re
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from gap_runtime.errors import InputError
from gap_runtime.records.files import is_folder, resolve

_LONGEST_HOST: Final = 64


def name_aside(name: str, state: str) -> str:
    """A hidden name beside `name` that is this process's alone, also in a folder of a network.

    .NAME.STATE-HOST-PID
    """
    return f".{name}.{state}-{host_name()}-{os.getpid()}"


def user_cache() -> Path:
    """The user's folder for what can be made again.

    Raises:
        OSError: The user has no home folder, as in a container that is run by a number.
    """
    named = os.environ.get("XDG_CACHE_HOME", "")
    home = named if os.path.isabs(named) else os.path.expanduser("~/.cache")  # noqa: PTH111, PTH117
    if not os.path.isabs(home):  # noqa: PTH117
        raise FileNotFoundError(errno.ENOENT, "the user has no home folder; set XDG_CACHE_HOME")
    return Path(home) / "gap-runtime"


def host_name() -> str:
    """This machine's name, as it may stand in a file's."""
    return re.sub(r"[^\w.-]", "_", socket.gethostname())[:_LONGEST_HOST] or "host"


@contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """A path beside the given one to write to; the file takes its place when the block ends.

    Where an error ends the block, what lay there before is unchanged and nothing lies beside it.
    What a process that was killed has left there is removed.

    Raises:
        OSError: It cannot be written there, or what lies there is no file.
    """
    require_replaceable(path)
    _clear_remains(path)
    aside = path.with_name(name_aside(path.name, "partial"))
    try:
        yield aside
        store(aside)
        aside.replace(path)
    finally:
        # In its place it has the other name by now; else the first error is the one to tell.
        with contextlib.suppress(OSError):
            aside.unlink()
    # The file is there; whether its name is on the disk is no reason to call it failed.
    with contextlib.suppress(OSError):
        store(path.parent)


def require_replaceable(path: Path) -> None:
    """Refuse to put a file in the place of a device, a pipe or a socket, as root could.

    Raises:
        OSError: There is one, also where a link leads; or no file can have that name.
    """
    if "\0" in str(path):
        raise OSError(errno.EINVAL, "no name of a file")
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):  # noqa: PTH110, PTH112, PTH113
        raise OSError(errno.EINVAL, "a pipe, socket or device, expected a file")


def require_apart(path: str | Path, inputs: Iterable[str | Path], option: str) -> None:
    """Refuse to write over what is read, or into it; the one rule for all that a command writes.

    Args:
        path: To be written, a file or a folder; it need not be there.
        inputs: What is read: files, and folders whose content is theirs alone, as a bundle's and a
            checkpoint's.
        option: That names the path.

    Raises:
        InputError: It is one of them or lies in one, also by a link.
    """
    # By its own name, too: the files of a bundle in the hub's cache are links that lead out of it.
    named = Path(os.path.abspath(path))  # noqa: PTH100 - Path's follows links
    places = {resolve(path), resolve(named.parent) / named.name}
    for each in inputs:
        source = resolve(each)
        if source in places or _is_same_file(path, each):
            raise InputError(
                f"{path}: is read, too, and would be written over; give {option} another place"
            )
        if is_folder(source) and any(source in place.parents for place in places):
            raise InputError(f"{path}: lies in {each}, which is read; give {option} another place")


def _is_same_file(one: str | Path, other: str | Path) -> bool:
    """Whether two names lead to one file; False for any name that the system refuses."""
    try:
        return os.path.samefile(one, other)  # noqa: PTH121 - names that are too long raise, too
    except (OSError, ValueError):
        return False


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
    """Remove what processes of this machine that are no more have written beside a file."""
    start = f".{path.name}.partial-{host_name()}-"
    for left in path.parent.glob(f"{glob.escape(start)}*"):
        number = left.name.removeprefix(start)
        if re.fullmatch(r"[0-9]+", number) and not is_alive(int(number)):
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
