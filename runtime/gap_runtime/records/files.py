"""Files to read: regular ones alone, of a size that is expected, each opened once.

A named pipe or a device would be waited for without end. What the system refuses becomes one line
with the path; the caller says which error it is.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

from gap_runtime.errors import GapError

SMALL_BYTES: Final = 256 * 2**20
"""Largest file of settings, headers or tokens that is read as a whole."""


@contextmanager
def open_file(
    path: str | Path,
    kind: type[GapError],
    *,
    limit: int | None = None,
    advice: str = "",
    smaller: str = "",
) -> Iterator[BinaryIO]:
    """A regular file, open to be read; also what fails while it is read becomes the error.

    Args:
        path: The file.
        kind: Of the error.
        limit: Most bytes that it may have; any number by default.
        advice: End of the message, what to do.
        smaller: The same where it is too large, if that is something else.

    Raises:
        GapError: Of that kind: it is missing, no regular file, too large, or cannot be read.
    """
    try:
        with _open_regular(path, kind, limit, advice, smaller or advice) as file:
            yield file
    except OSError as error:
        raise refusal(path, error, kind, advice) from error


def read_bytes(
    path: str | Path,
    kind: type[GapError],
    *,
    limit: int = SMALL_BYTES,
    advice: str = "",
    smaller: str = "",
) -> bytes:
    """All bytes of a regular file.

    Raises:
        GapError: As for `open_file`.
    """
    with open_file(path, kind, limit=limit, advice=advice, smaller=smaller) as file:
        return file.read()


def read_text(
    path: str | Path, kind: type[GapError], *, limit: int = SMALL_BYTES, advice: str = ""
) -> str:
    """All of a regular file as text in UTF-8.

    Raises:
        GapError: As for `open_file`, or it is no such text.
    """
    try:
        return read_bytes(path, kind, limit=limit, advice=advice).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise kind(_end(f"{path}: not text in UTF-8 ({error})", advice)) from error


def refusal(path: str | Path, error: OSError, kind: type[GapError], advice: str = "") -> GapError:
    """The error for a file that the system does not let read."""
    if isinstance(error, FileNotFoundError):
        return kind(_end(f"{path}: no such file", advice))
    return kind(_end(f"{path}: cannot be read ({error.strerror or error})", advice))


def is_file(path: str | Path) -> bool:
    """Whether a regular file is there; False for any name that the system refuses."""
    return os.path.isfile(path)  # noqa: PTH113 - Path's raises for names that are too long


def is_folder(path: str | Path) -> bool:
    """Whether a folder is there; False for any name that the system refuses."""
    return os.path.isdir(path)  # noqa: PTH112 - Path's raises for names that are too long


def exists(path: str | Path) -> bool:
    """Whether anything is there; False for any name that the system refuses."""
    return os.path.exists(path)  # noqa: PTH110 - Path's raises for names that are too long


def resolve(path: str | Path) -> Path:
    """Where a path leads; one that leads in a circle as far as it goes."""
    try:
        return Path(os.path.realpath(path))
    except ValueError:
        return Path(path)


def expand(path: str | Path) -> Path:
    """A path with `~` as somebody's home; that of nobody stays as it is written."""
    try:
        return Path(os.path.expanduser(path))  # noqa: PTH111 - Path's raises where there is none
    except ValueError:
        return Path(path)


@contextmanager
def _open_regular(
    path: str | Path, kind: type[GapError], limit: int | None, advice: str, smaller: str
) -> Iterator[BinaryIO]:
    # Without waiting for who may write to a pipe; a regular file is read as ever.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        handle = os.open(path, flags)
    except ValueError as error:
        raise kind(_end(f"{path}: no name of a file ({error})", advice)) from error
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            what = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, socket or device"
            raise kind(_end(f"{path}: {what}, expected a file", advice))
        if limit is not None and found.st_size > limit:
            raise kind(
                _end(f"{path}: {found.st_size:,} bytes, at most {limit:,} are read", smaller)
            )
        with io.BufferedReader(io.FileIO(handle, closefd=False)) as file:
            yield file
    finally:
        os.close(handle)


def _end(message: str, advice: str) -> str:
    return f"{message}; {advice}" if advice else message
