"""All tensors of a checkpoint in memory, by the libraries' own readers.

Layers that are quantized (AWQ, GPTQ) are written out as the weights that they stand for, by the
plainest code: nothing of the export's own unpacking is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from gap_export.checkpoint.index import Checkpoint

Value = TypeVar("Value")

PACKED: Final = ("qweight", "qzeros", "scales", "g_idx")
"""What stands for the weight of a quantized layer."""


def load_tensors(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor of the checkpoint's own files by key, in one dtype; code is never unpickled."""
    found: dict[str, Tensor] = {}
    for file in sorted({tensor.file for tensor in checkpoint.tensors.values()}):
        values = _load(file)
        found |= {key: value for key, value in values.items() if key in checkpoint.tensors}
    quantization = read_quantization(checkpoint)
    tensors = {}
    for key in sorted(found):
        layer, _, part = key.rpartition(".")
        if f"{layer}.qweight" not in found or not quantization:
            tensors[key] = found[key].detach().to(dtype)
        elif part == "qweight":
            packed = {each: found.get(f"{layer}.{each}") for each in PACKED}
            tensors[f"{layer}.weight"] = dequantize(packed, quantization).to(dtype)
        elif part not in PACKED and bool(found[key].any()):
            # Packers add biases of zeros, which no model has a place for.
            tensors[key] = found[key].to(dtype)
    return tensors


def is_quantized(checkpoint: Checkpoint) -> bool:
    """Whether layers of a checkpoint are quantized."""
    return bool(read_quantization(checkpoint))


def read_quantization(checkpoint: Checkpoint) -> dict[str, Any]:
    """How layers of a checkpoint are quantized; empty where none is."""
    config = checkpoint.read_json("config.json") or {}
    text: dict[str, Any] = config.get("text_config") or {}
    found: dict[str, Any] | None = config.get("quantization_config")
    return found or text.get("quantization_config") or {}


def dequantize(packed: dict[str, Tensor | None], quantization: dict[str, Any]) -> Tensor:
    """A layer's weight [out, in], float32."""
    bits = int(quantization["bits"])
    qweight, qzeros, scales = packed["qweight"], packed["qzeros"], packed["scales"]
    assert qweight is not None
    assert qzeros is not None
    assert scales is not None
    if quantization["quant_method"] == "awq":
        # Eight outputs in a word: the even ones in its lower half, the odd ones in its upper.
        values, zeros = (
            _spread(words, bits).reshape(len(words), -1, 2, 4).transpose(2, 3).flatten(1)
            for words in (qweight, qzeros)
        )
    else:
        values = _spread(qweight.T, bits).T
        form = quantization.get("checkpoint_format") or quantization.get("format")
        if form != "gptq_v2":
            # Each is stored less one.
            qzeros = (qzeros.long() + sum(1 << place for place in range(0, 32, bits))).int()
        zeros = _spread(qzeros, bits)
    groups = packed["g_idx"]
    if groups is None:
        groups = torch.arange(len(values)) // (len(values) // len(scales))
    return ((values - zeros[groups]) * scales.float()[groups]).T.contiguous()


def _spread(words: Tensor, bits: int) -> Tensor:
    """The numbers in each row of words, from the lowest bits of a word to its highest."""
    positive = words.long() % 2**32
    found = [(positive // 2**place) % 2**bits for place in range(0, 32, bits)]
    return torch.stack(found, dim=-1).flatten(1)


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


def rename_tensors(tensors: dict[str, Value], prefixes: dict[str, str]) -> dict[str, Value]:
    """Those tensors whose key starts with one of the prefixes, with another prefix instead."""
    renamed = {}
    for key, value in tensors.items():
        for old, new in prefixes.items():
            if key.startswith(old):
                renamed[new + key.removeprefix(old)] = value
                break
    return renamed
