"""BLAKE3, the hash of a bundle's files: weights are hashed as fast as they can be read."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Final

from blake3 import blake3

from gap_runtime.bundle.manifest import FileEntry
from gap_runtime.errors import BundleError
from gap_runtime.records.files import open_file

_BLOCK_BYTES: Final = 2**20


Begin = Callable[[int], AbstractContextManager[Callable[[int], None]]]
"""Told how much there is to do, bytes to hash for example; what it gives is told of every part
that is done, by any thread."""


def new_hash() -> blake3:
    """A hash of nothing yet, to be updated."""
    return blake3()


def hash_bytes(data: bytes | memoryview) -> str:
    """Hash of bytes as hexadecimal text."""
    return blake3(data).hexdigest()


def begin_silently(_: int) -> AbstractContextManager[Callable[[int], None]]:
    """A Begin that shows nothing."""
    return nullcontext(lambda _: None)


def hash_file(path: Path, on_bytes: Callable[[int], None] = lambda _: None) -> str:
    """Hash of a file as hexadecimal text, read in blocks to its end.

    Args:
        path: The file.
        on_bytes: Told the size of every block that was hashed.

    Raises:
        BundleError: The file cannot be read.
    """
    digest = new_hash()
    for block in read_blocks(path):
        digest.update(block)
        on_bytes(len(block))
    return digest.hexdigest()


def read_blocks(path: Path, offset: int = 0, length: int | None = None) -> Iterator[memoryview]:
    """So many bytes of a file, or those that it has; a block holds until the next is asked for.

    Args:
        path: The file.
        offset: Bytes that are left out at its start.
        length: Most bytes that are read; all by default.

    Raises:
        BundleError: The file cannot be read.
    """
    buffer = memoryview(bytearray(_BLOCK_BYTES))
    left = sys.maxsize if length is None else length
    with open_file(path, BundleError) as buffered:
        # Straight into the block: a second buffer would be a second copy.
        file = buffered.raw  # type: ignore[attr-defined]
        file.seek(offset)
        while left > 0 and (size := file.readinto(buffer[: min(left, _BLOCK_BYTES)])):
            left -= size
            yield buffer[:size]


def describe_file(path: Path, on_bytes: Callable[[int], None] = lambda _: None) -> FileEntry:
    """Size and hash of a file, for a manifest; `on_bytes` as for `hash_file`."""
    return FileEntry(size=path.stat().st_size, blake3=hash_file(path, on_bytes))
