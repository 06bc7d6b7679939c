"""BLAKE3, the hash of a bundle's files: weights are hashed as fast as they can be read."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from blake3 import blake3

from gap_runtime.bundle.manifest import FileEntry
from gap_runtime.errors import BundleError
from gap_runtime.records.files import open_file

_BLOCK_BYTES: Final = 2**20


def new_hash() -> blake3:
    """A hash of nothing yet, to be updated."""
    return blake3()


def hash_bytes(data: bytes | memoryview) -> str:
    """Hash of bytes as hexadecimal text."""
    return blake3(data).hexdigest()


def hash_file(path: Path) -> str:
    """Hash of a file as hexadecimal text, read in blocks to its end.

    Raises:
        BundleError: The file cannot be read.
    """
    digest = new_hash()
    for block in read_blocks(path):
        digest.update(block)
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


def describe_file(path: Path) -> FileEntry:
    """Size and hash of a file, for a manifest."""
    return FileEntry(size=path.stat().st_size, blake3=hash_file(path))
