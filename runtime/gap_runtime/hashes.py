"""BLAKE3, the hash of a bundle's files: weights are hashed as fast as they can be read."""

from __future__ import annotations

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
    digest, block = new_hash(), memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
    return digest.hexdigest()
