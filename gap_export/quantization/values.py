"""How the values of quantized weights are found, tensor by tensor.

Memory does not grow with the model: a weight is rounded a few rows at a time when its file is
written. Integers that a checkpoint holds are arranged, never rounded again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gap_export.checkpoint.sources import (
    NOT_FINITE,
    PackedValues,
    TensorSource,
    cut_pieces,
    make_tensor,
)
from gap_export.errors import ExportError
from gap_export.quantization.scheme import ORDER, SCALES, VALUES, ZEROS, Scheme, Shape

_CLIPS: Final = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Shares of the largest value of a block that its scale is tried for."""

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Smoothing:
    """What activation-aware scaling does to one weight [out, in] before it is quantized.

    `columns` [in] and `rows` [out] are factors, `importance` [in] the mean square of each input,
    by which errors count.
    """

    columns: Tensor | None = None
    rows: Tensor | None = None
    importance: Tensor | None = None


NO_SMOOTHING: Final = Smoothing()


def quantize_sources(
    sources: Mapping[str, TensorSource],
    schemes: Mapping[str, Scheme],
    smoothings: Mapping[str, Smoothing],
    *,
    dtype: str,
) -> dict[str, TensorSource]:
    """Where the values and scales of quantized weights come from, by name.

    Args:
        sources: Of the weights as they are.
        schemes: Of those that are quantized.
        smoothings: What is done to them before.
        dtype: Of the scales.
    """
    made: dict[str, TensorSource] = {}
    for name, scheme in schemes.items():
        source = sources[name]
        if source.packed is not None:
            made |= _packed_sources(name, source, source.packed, scheme)
            continue
        pair = _Pair(name, source, scheme, smoothings.get(name, NO_SMOOTHING), dtype)
        tensors = scheme.tensors(source.shape, dtype)
        made[name + VALUES] = TensorSource(
            shape=tensors[VALUES][1],
            inputs=source.inputs,
            dtype=tensors[VALUES][0],
            encode=pair.take_values,
        )
        made[name + SCALES] = TensorSource(
            shape=tensors[SCALES][1], inputs=source.inputs, encode=pair.take_scales
        )
    return made


def _packed_sources(
    name: str, source: TensorSource, packed: PackedValues, scheme: Scheme
) -> dict[str, TensorSource]:
    """Where the integers of a weight that came quantized come from: its checkpoint's own."""
    outputs, inputs = source.shape
    shape = scheme.scales_shape(outputs, inputs)
    repeats = packed.group // (scheme.block or inputs)
    middle = np.uint8(2 ** (packed.bits - 1))

    def values() -> Bytes:
        found = packed.read_values().numpy()
        if scheme.is_fused:
            return _pack(found.T, scheme.dtype)
        # What is less than nothing wraps around, as signed values do.
        return _pack(found if scheme.has_zeros else found - middle, scheme.dtype)

    def zeros() -> Bytes:
        found = packed.read_zeros().repeat_interleave(repeats, 0).numpy()
        if scheme.is_fused:
            # Every output begins with a byte of its own.
            found = np.pad(found.T, ((0, 0), (0, found.shape[0] % (8 // scheme.bits))))
        return _pack(found, scheme.dtype)

    def order() -> Bytes:
        assert packed.order_I is not None
        return packed.order_I.int().view(torch.uint8).numpy()

    encodes = {VALUES: values, ZEROS: zeros, ORDER: order}
    made = {
        name + suffix: TensorSource(
            shape=size, inputs=source.inputs, dtype=dtype, encode=encodes[suffix]
        )
        for suffix, (dtype, size) in scheme.tensors(source.shape, "").items()
        if suffix != SCALES
    }
    made[name + SCALES] = TensorSource(
        shape=shape,
        inputs=(packed.scales,),
        make=lambda scales: _arrange_scales(scales.repeat_interleave(repeats, 0), shape, scheme),
    )
    return made


def _arrange_scales(scales: Tensor, shape: Shape, scheme: Scheme) -> Tensor:
    """Scales [blocks, out] in the shape in which they are stored."""
    if not scheme.is_fused:
        return scales.reshape(shape)
    # A copy in any case: one block leaves a stride that cannot be viewed as bytes.
    return scales.T.clone(memory_format=torch.contiguous_format)


class _Pair:
    """Values and scales of a weight, found together and each taken once."""

    def __init__(
        self, name: str, source: TensorSource, scheme: Scheme, smoothing: Smoothing, dtype: str
    ) -> None:
        self._arguments = (name, source, scheme, smoothing, dtype)
        self._found: dict[str, Bytes] = {}

    def take_values(self) -> Bytes:
        return self._take(VALUES)

    def take_scales(self) -> Bytes:
        return self._take(SCALES)

    def _take(self, which: str) -> Bytes:
        if which not in self._found:
            self._found[VALUES], self._found[SCALES] = _quantize(*self._arguments)
        return self._found.pop(which)


def _quantize(
    name: str, source: TensorSource, scheme: Scheme, smoothing: Smoothing, dtype: str
) -> tuple[Bytes, Bytes]:
    """Bytes of the values and of the scales of a weight, found a few rows at a time."""
    outputs, inputs = source.shape
    block = scheme.block or inputs
    # As they are stored, or turned.
    values = np.empty((outputs, inputs) if scheme.is_fused else (inputs, outputs), np.int8)
    scales = torch.empty(
        (outputs, inputs // block) if scheme.is_fused else (inputs // block, outputs),
        dtype=getattr(torch, dtype),
    )
    scales_OB = scales if scheme.is_fused else scales.T
    middle = np.uint8(2 ** (scheme.bits - 1))
    start = 0
    for piece in cut_pieces(source):
        rows = slice(start, start + piece.shape[0])
        weight = make_tensor(piece).float()
        if smoothing.columns is not None:
            weight = weight * smoothing.columns
        if smoothing.rows is not None:
            weight = weight * smoothing.rows[rows, None]
        found, scale = round_weight(weight, scheme, dtype, smoothing)
        # The largest of a block, and so its scale, is no number where any of its values is.
        if not bool(torch.isfinite(scale).all()):
            raise ExportError(f"{source.inputs[0].shown}: tensor '{name}' holds {NOT_FINITE}")
        whole = found.to(torch.int8)
        if scheme.is_fused:
            # What is less than nothing wraps around.
            values.view(np.uint8)[rows] = whole.numpy().view(np.uint8) + middle
        else:
            # Turned before it is put in place: strided writes would take most of the time.
            values[:, rows] = whole.T.contiguous().numpy()
        scales_OB[rows] = scale.to(scales.dtype)
        start = rows.stop
    return _pack(values, scheme.dtype), scales.view(torch.uint8).numpy().reshape(-1)


def round_weight(
    weight: Tensor, scheme: Scheme, dtype: str, smoothing: Smoothing = NO_SMOOTHING
) -> tuple[Tensor, Tensor]:
    """The nearest values [rows, in] of a weight float32 [rows, in], and scales [rows, in / block].

    Where it is known how much inputs count, the scale of each block is the one of a few that
    loses least.
    """
    rows, inputs = weight.shape
    blocks = weight.reshape(rows, -1, scheme.block or inputs)
    # The scale that will be stored, so that rounding it is part of the error that is seen.
    tiny = torch.finfo(getattr(torch, dtype)).tiny
    largest = blocks.abs().amax(dim=-1, keepdim=True) / scheme.limit

    def stored(scale: Tensor) -> Tensor:
        return scale.to(getattr(torch, dtype)).float().clamp_min(tiny)

    def nearest(scale: Tensor) -> Tensor:
        return (blocks / scale).round_().clamp_(-scheme.limit, scheme.limit)

    scale = stored(largest)
    values = nearest(scale)
    if smoothing.importance is not None:
        counts = smoothing.importance
        if smoothing.columns is not None:
            counts = counts / smoothing.columns.square()
        counts = counts.reshape(1, -1, blocks.shape[-1])
        least = ((values * scale - blocks).square() * counts).sum(dim=-1, keepdim=True)
        for clip in _CLIPS[1:]:
            other = stored(largest * clip)
            tried = nearest(other)
            loss = ((tried * other - blocks).square() * counts).sum(dim=-1, keepdim=True)
            better = loss < least
            least = torch.where(better, loss, least)
            scale = torch.where(better, other, scale)
            values = torch.where(better, tried, values)
    return values.reshape(rows, inputs), scale[..., 0]


def _pack(values: npt.NDArray[np.int8] | Bytes, dtype: str) -> Bytes:
    """Values as they lie in a file: 4-bit ones two in a byte, the first in the lower half."""
    flat = np.frombuffer(values.tobytes(), np.uint8)
    if dtype.endswith("8"):
        return flat
    # There are even many: inputs come in sixteens, packed outputs in eights.
    return ((flat[0::2] & 0xF) | (flat[1::2] << 4)).astype(np.uint8)
