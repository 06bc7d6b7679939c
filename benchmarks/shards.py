"""Files of random values in the containers that checkpoints are published in."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.tiled import Shapes

_BLOCK_BYTES: Final = 64 * 2**20
_SHARD_BYTES: Final = 5 * 10**9


def write_json(folder: Path, name: str, data: dict[str, Any]) -> None:
    """A JSON file of a checkpoint folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(data, indent=1), encoding="utf-8")


def write_safetensors(
    folder: Path, shapes: Shapes, *, dtype: str = "float16", sparse: bool = False
) -> None:
    """16-bit shards of at most 5 GB with their index; sparse ones take no space."""
    code = {"float16": "F16", "bfloat16": "BF16"}[dtype]
    shards = _split(shapes)
    weight_map: dict[str, str] = {}
    for k, names in enumerate(shards, start=1):
        file = f"model-{k:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        entries, offset = {}, 0
        for name in names:
            size = 2 * math.prod(shapes[name])
            entries[name] = {
                "dtype": code,
                "shape": list(shapes[name]),
                "data_offsets": [offset, offset + size],
            }
            offset += size
        header = json.dumps(entries).encode()
        header += b" " * (-len(header) % 8)
        with (folder / file).open("wb") as opened:
            opened.write(len(header).to_bytes(8, "little") + header)
            if sparse:
                opened.truncate(opened.tell() + offset)
            else:
                _fill(opened, offset, dtype)
    write_json(folder, "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def write_torch(
    path: Path,
    shapes: Shapes,
    dtype: str,
    wrap: str | None = None,
    ones: Collection[str] = (),
) -> None:
    """A torch file: torch lays it out without values, which are then written into their places.

    Args:
        path: The file.
        shapes: Of the tensors.
        dtype: Of the tensors.
        wrap: The key under which they lie; None for the whole file.
        ones: Tensors that are not random.
    """
    # Not needed, and slow to load, where other files are written.
    import torch  # noqa: PLC0415
    from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: PLC0415

    kind = getattr(torch, dtype)
    with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
        tensors: Any = {name: torch.empty(shape, dtype=kind) for name, shape in shapes.items()}
        torch.save({wrap: tensors} if wrap else tensors, path)
    with zipfile.ZipFile(path) as archive:
        places = [
            (info.header_offset, info.file_size)
            for info in archive.infolist()
            if "/data/" in info.filename
        ]
    with path.open("r+b") as opened:
        for key, (header, size) in zip(shapes, places, strict=True):
            opened.seek(header + 26)
            name, extra = (int.from_bytes(opened.read(2), "little") for _ in range(2))
            opened.seek(header + 30 + name + extra)
            if key in ones:
                opened.write(np.ones(math.prod(shapes[key]), dtype).tobytes())
            else:
                _fill(opened, size, dtype)


def write_torch_shards(folder: Path, shapes: Shapes, ones: Collection[str] = ()) -> None:
    """pytorch_model .bin shards in float16 with their index."""
    shards = _split(shapes)
    weight_map: dict[str, str] = {}
    for k, names in enumerate(shards, start=1):
        file = f"pytorch_model-{k:05d}-of-{len(shards):05d}.bin"
        weight_map |= dict.fromkeys(names, file)
        write_torch(folder / file, {name: shapes[name] for name in names}, "float16", ones=ones)
    write_json(folder, "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": weight_map})


def _split(shapes: Shapes) -> list[list[str]]:
    """Names by shard, in order."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        length = 2 * math.prod(shape)
        if size and size + length > _SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += length
    return shards


def _fill(opened: Any, size: int, dtype: str = "float16") -> None:
    """Random values, the same block again and again."""
    if dtype not in _BLOCKS:
        values = np.random.default_rng(0).standard_normal(_BLOCK_BYTES // 8, dtype=np.float32)
        values *= 0.02
        # A bfloat16 is the upper half of a float32.
        halves = values.view(np.uint32) >> 16 if dtype == "bfloat16" else values
        _BLOCKS[dtype] = halves.astype("uint16" if dtype == "bfloat16" else dtype).tobytes()
    block = memoryview(_BLOCKS[dtype])
    while size:
        size -= opened.write(block[: min(size, len(block))])


_BLOCKS: dict[str, bytes] = {}
