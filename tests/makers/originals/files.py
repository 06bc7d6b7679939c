"""Seeded weights and the files that they are stored in."""

import functools
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SPREAD = 0.15


class Draw:
    """Seeded float32 weights: around zero, or around one for norms."""

    def __init__(self, seed, spread):
        self._generator = torch.Generator().manual_seed(seed)
        self._spread = spread

    def zero(self, *shape):
        return torch.randn(shape, generator=self._generator) * self._spread

    def one(self, *shape):
        return self.zero(*shape) + 1


def linear(draw, name, rows, columns):
    return {f"{name}.weight": draw.zero(rows, columns), f"{name}.bias": draw.zero(rows)}


def affine(draw, name, width):
    return {f"{name}.weight": draw.one(width), f"{name}.bias": draw.zero(width)}


def under(prefix, tensors):
    return {prefix + name: value for name, value in tensors.items()}


def cast(tensors, dtype):
    return {name: value.to(getattr(torch, dtype)) for name, value in tensors.items()}


def read_folder(folder, names="*model*"):
    """All tensors of a folder's checkpoint by name, from its safetensors or torch files."""
    tensors = {}
    for path in sorted(Path(folder).glob(f"{names}.safetensors")):
        tensors |= load_file(path)
    for path in sorted(Path(folder).glob(f"{names}.bin")):
        tensors |= torch.load(path, weights_only=True)
    return tensors


def save_tensors(folder, tensors, files, *, shards):
    """Write a checkpoint in one file, or in several of about equal size and an index.

    `files` is `safetensors`, `bin`, or `legacy` for `bin` in torch's format from before 1.6.
    """
    if files == "safetensors":
        stem, write = "model", functools.partial(save_file, metadata={"format": "pt"})
    else:
        zipped = files != "legacy"
        stem, files = "pytorch_model", "bin"
        write = functools.partial(torch.save, _use_new_zipfile_serialization=zipped)
    if shards == 1:
        write(tensors, folder / f"{stem}.{files}")
        return
    total = sum(value.nbytes for value in tensors.values())
    parts, seen = [{} for _ in range(shards)], 0
    for name, value in tensors.items():
        parts[min(seen * shards // total, shards - 1)][name] = value
        seen += value.nbytes
    places = {}
    for k, part in enumerate(parts, 1):
        file = f"{stem}-{k:05d}-of-{shards:05d}.{files}"
        write(part, folder / file)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    write_json(folder / f"{stem}.{files}.index.json", index)


def write_json(path, data):
    path.write_text(
        json.dumps(data, indent=2, sort_keys=path.name != "vocab.json") + "\n", "utf-8"
    )
