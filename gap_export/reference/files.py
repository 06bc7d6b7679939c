"""A checkpoint's tensors for the reference: by the libraries' readers, or read when asked for.

Layers that are quantized (AWQ, GPTQ) are written out as the weights that they stand for, by the
plainest code: nothing of the export's own unpacking is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file
from torch import Tensor

from gap_export.checkpoint.index import Checkpoint
from gap_export.checkpoint.legacy_torch_file import MAGIC
from gap_export.checkpoint.tensor import TensorLocation, cut_rows, read_tensor
from gap_export.reference.lazy import LazyTensor

# S rows that are asked for.

_PACKED: Final = ("qweight", "qzeros", "scales", "g_idx")
"""What stands for the weight of a quantized layer."""
_PIECE_VALUES: Final = 4 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    """A tensor in a file: `read` gives it in the file's dtype, `tensor` in the model's."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    tensor: LazyTensor


def open_tensors(
    checkpoint: Checkpoint, dtype: torch.dtype, *, whole: bool
) -> dict[str, LazyTensor]:
    """Every tensor of the checkpoint's own files by its key.

    Args:
        checkpoint: Of which parts are left out.
        dtype: Of the tensors.
        whole: Whether the libraries' own readers map the files, which keeps the reference apart
            from the export; else each tensor is read when it is asked for and takes no memory
            before.
    """
    stored = _map_files(checkpoint, dtype) if whole else _locate(checkpoint, dtype)
    quantization = read_quantization(checkpoint)
    tensors = {}
    for key in sorted(stored):
        layer, _, part = key.rpartition(".")
        if f"{layer}.qweight" not in stored or not quantization:
            tensors[key] = stored[key].tensor
        elif part == "qweight":
            packed = {each: stored.get(f"{layer}.{each}") for each in _PACKED}
            tensors[f"{layer}.weight"] = _unpack(packed, quantization, dtype)
        elif part not in _PACKED and bool(stored[key].read().any()):
            # Packers add biases of zeros, which no model has a place for.
            tensors[key] = stored[key].tensor
    return tensors


def read_quantization(checkpoint: Checkpoint) -> dict[str, Any]:
    """How layers of a checkpoint are quantized; empty where none is."""
    config = checkpoint.read_json("config.json") or {}
    text: dict[str, Any] = config.get("text_config") or {}
    found: dict[str, Any] | None = config.get("quantization_config")
    return found or text.get("quantization_config") or {}


def _map_files(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, _Stored]:
    """Tensors by the libraries' own readers; code is never unpickled."""
    stored: dict[str, _Stored] = {}
    for file in sorted({tensor.file for tensor in checkpoint.tensors.values()}):
        values = _map_file(file)
        if _is_wrapped(values):
            values = {key.partition(".")[2]: value for key, value in values.items()}
        stored |= {
            key: _mapped(value, dtype)
            for key, value in values.items()
            if key in checkpoint.tensors
        }
    return stored


def is_wrapped(checkpoint: Checkpoint) -> bool:
    """Whether a file has the names of a model in a wrapper, which the library knows nothing of."""
    torch_files = {
        tensor.file
        for tensor in checkpoint.tensors.values()
        if tensor.shown.suffix != ".safetensors"
    }
    return any(_is_wrapped(_map_file(file)) for file in torch_files)


def _is_wrapped(values: Mapping[str, Any]) -> bool:
    return {key.partition(".")[0] for key in values} == {"module"}


def _map_file(file: Path) -> dict[str, Tensor]:
    # A hub cache's files have no suffix behind their links, so the content decides.
    with file.open("rb") as opened:
        head = opened.read(64)
    is_zip = head.startswith(b"PK\x03\x04")
    if not is_zip and MAGIC not in head:
        tensors: dict[str, Tensor] = load_file(file)
        return tensors
    # Torch's older format cannot be mapped.
    data = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    for name in ("model", "state_dict", "module"):
        if isinstance(data.get(name), dict):
            inner: dict[str, Tensor] = data[name]
            return inner
    outer: dict[str, Tensor] = data
    return outer


def _mapped(value: Tensor, dtype: torch.dtype) -> _Stored:
    value = value.detach()
    tensor = LazyTensor(
        length=len(value) if value.ndim else 0,
        read=lambda: value.to(dtype, copy=True),
        rows=lambda index_S: value[index_S].to(dtype),
    )
    return _Stored(shape=tuple(value.shape), read=lambda: value, tensor=tensor)


def _locate(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, _Stored]:
    """Tensors by their places in the files."""
    return {key: _located(location, dtype) for key, location in checkpoint.tensors.items()}


def _located(location: TensorLocation, dtype: torch.dtype) -> _Stored:
    """A tensor that is converted in pieces, so that it is not there twice."""

    def read() -> Tensor:
        if not location.shape:
            return read_tensor(location).to(dtype)
        made = torch.empty(location.shape, dtype=dtype)
        step = max(1, _PIECE_VALUES // max(math.prod(location.shape[1:]), 1))
        for start in range(0, location.shape[0], step):
            piece = read_tensor(cut_rows(location, start, start + step))
            made[start : start + step] = piece
        return made

    def rows(index_S: Tensor) -> Tensor:
        found = [read_tensor(cut_rows(location, k, k + 1)) for k in index_S.tolist()]
        empty = torch.empty(0, *location.shape[1:], dtype=dtype)
        return torch.cat([empty, *(each.to(dtype) for each in found)])

    length = location.shape[0] if location.shape else 0
    tensor = LazyTensor(length=length, read=read, rows=rows)
    return _Stored(shape=location.shape, read=lambda: read_tensor(location), tensor=tensor)


def _unpack(
    packed: Mapping[str, _Stored | None], quantization: dict[str, Any], dtype: torch.dtype
) -> LazyTensor:
    """The weight of a quantized layer."""

    def read() -> Tensor:
        values = {part: None if each is None else each.read() for part, each in packed.items()}
        return _dequantize(values, quantization).to(dtype)

    scales = packed["scales"]
    assert scales is not None
    return LazyTensor(length=scales.shape[1], read=read, rows=lambda index_S: read()[index_S])


def _dequantize(packed: dict[str, Tensor | None], quantization: dict[str, Any]) -> Tensor:
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
