"""BLAKE3, the hash of a bundle's files: weights are hashed as fast as they can be read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from blake3 import blake3

_BLOCK_BYTES: Final = 2**20


def new_hash() -> blake3:
    """A hash of nothing yet, to be updated."""
    return blake3()


def hash_bytes(data: bytes) -> str:
    """Hash of bytes as hexadecimal text."""
    return blake3(data).hexdigest()


def hash_file(path: Path) -> str:
    """Hash of a file as hexadecimal text, read in blocks."""
    digest = new_hash()
    for block in read_blocks(path, 0, path.stat().st_size):
        digest.update(block)
    return digest.hexdigest()


def read_blocks(path: Path, offset: int, length: int) -> Iterator[memoryview]:
    """So many bytes of a file, or those that it has; a block holds until the next is asked for."""
    buffer = memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while length > 0 and (size := file.readinto(buffer[: min(length, _BLOCK_BYTES)])):
            length -= size
            yield buffer[:size]
