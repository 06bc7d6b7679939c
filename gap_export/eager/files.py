"""All tensors of a checkpoint in memory, by the libraries' own readers."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from gap_export.checkpoint import Checkpoint


def load_tensors(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor of the checkpoint's own files by key, in one dtype; code is never unpickled."""
    found: dict[str, Tensor] = {}
    for file in sorted({tensor.file for tensor in checkpoint.tensors.values()}):
        values = _load(file)
        found |= {key: value for key, value in values.items() if key in checkpoint.tensors}
    return {key: value.detach().to(dtype) for key, value in found.items()}


def _load(file: Path) -> dict[str, Tensor]:
    # A hub cache's files have no suffix behind their links, so the content decides.
    with file.open("rb") as opened:
        is_zip = opened.read(4) == b"PK\x03\x04"
    if not is_zip:
        tensors: dict[str, Tensor] = load_file(file)
        return tensors
    data = torch.load(file, map_location="cpu", weights_only=True)
    for name in ("model", "state_dict", "module"):
        if isinstance(data.get(name), dict):
            inner: dict[str, Tensor] = data[name]
            return inner
    outer: dict[str, Tensor] = data
    return outer


def rename_tensors(tensors: dict[str, Tensor], prefixes: dict[str, str]) -> dict[str, Tensor]:
    """Those tensors whose key starts with one of the prefixes, with another prefix instead."""
    renamed = {}
    for key, value in tensors.items():
        for old, new in prefixes.items():
            if key.startswith(old):
                renamed[new + key.removeprefix(old)] = value
                break
    return renamed
