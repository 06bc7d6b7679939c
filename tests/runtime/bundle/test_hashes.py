"""The hash of files, against the published vectors of BLAKE3."""

from __future__ import annotations

import pytest

from gap_runtime.bundle import hashes
from gap_runtime.bundle.hashes import describe_file, hash_bytes, hash_file, read_blocks

VECTORS = {
    0: "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
    102400: "bc3e3d41a1146b069abffad3c0d44860cf664390afce4d9661f7902e7943e085",
}
"""By length; the input counts bytes from 0 to 250, over and over."""


@pytest.mark.parametrize("length", VECTORS)
def test_hashes_are_blake3(length, tmp_path):
    data = (bytes(range(251)) * (length // 251 + 1))[:length]
    path = tmp_path / "file"
    path.write_bytes(data)
    assert hash_bytes(data) == hash_file(path) == VECTORS[length]
    assert describe_file(path).size == length


def test_a_file_of_several_blocks_has_the_same_hash(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes((bytes(range(251)) * 408)[:102400])
    monkeypatch.setattr(hashes, "_BLOCK_BYTES", 1000)
    assert hash_file(path) == VECTORS[102400]


@pytest.mark.parametrize("length", [0, 1, 10, 999, 2000])
def test_blocks_end_with_the_part_or_the_file(length, tmp_path, monkeypatch):
    path = tmp_path / "file"
    data = bytes(range(251)) * 4
    path.write_bytes(data)
    monkeypatch.setattr(hashes, "_BLOCK_BYTES", 10)
    blocks = [bytes(block) for block in read_blocks(path, 7, length)]
    assert b"".join(blocks) == data[7 : 7 + length]
    assert all(len(block) <= 10 for block in blocks)
