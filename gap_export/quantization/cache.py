"""A KV cache of int8: its scales, and the decoder's graph that reads and writes it.

    value = scale * stored, stored = round(value / scale) within -128 and 127

There is one scale for each layer, key/value head and channel, for keys and for values: channels of
keys differ in size by far. They are fixed at export, from the largest magnitude that PyTorch's
answers to the samples put there, without pruning and at every ratio. What lies beyond is clipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from gap_export.interfaces.dialect import ATTENTION
from gap_export.tracing.graph import Traced
from gap_runtime.bundle.tensors import TensorSpec

# B batch (1), G key/value heads, T cached rows, d head width.

_STEPS: Final = 127
"""Steps from 0 to the largest magnitude."""
_LEAST: Final = 1e-3
"""Least largest magnitude of a channel, of the layer's: one that was always 0 has a scale too."""
_SCALE_INPUTS: Final = (12, 13)
"""Of the operator: keys' scales and values'."""


class CacheRange:
    """The largest magnitudes of keys and values by layer, head and channel."""

    def __init__(self) -> None:
        """Nothing was seen yet."""
        self._largest: list[list[Tensor]] = []

    def see(self, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Take keys and values [G, T, d] of every layer into account."""
        found = [[each.abs().amax(dim=1) for each in pair] for pair in layers]
        if self._largest:
            found = [
                [torch.maximum(*both) for both in zip(*pairs, strict=True)]
                for pairs in zip(self._largest, found, strict=True)
            ]
        self._largest = found

    def scales(self) -> list[np.ndarray]:
        """Scales float32 [1, G, 1, d], of keys and of values of each layer in turn."""
        return [_scale(largest_Gd) for pair in self._largest for largest_Gd in pair]


def _scale(largest_Gd: Tensor) -> np.ndarray:
    least = max(float(largest_Gd.max()) * _LEAST, float(np.finfo(np.float32).tiny) * _STEPS)
    scale_Gd = largest_Gd.double().clamp(min=least) / _STEPS
    scales: np.ndarray = scale_Gd.float().numpy()[None, :, None]
    return scales


def quantize_cache(traced: Traced, scales: Sequence[np.ndarray]) -> Traced:
    """A decoder that keeps keys and values in int8.

    Args:
        traced: Its graph, whose attention is fused in every layer.
        scales: Of each cache tensor [1, G, 1, d], in the order of the graph's inputs.
    """
    graph = traced.model.graph
    names = [spec.name for spec in traced.inputs if spec.name.startswith("cache_")]
    scale_of = {name: _declare(graph, name, s) for name, s in zip(names, scales, strict=True)}
    domain, _, op_type = ATTENTION.rpartition(".")
    changed = set()
    for node in graph:
        if (node.domain, node.op_type) != (domain, op_type):
            continue
        caches = node.inputs[3:5]
        node.resize_inputs(_SCALE_INPUTS[-1] + 1)
        for cache, place, written in zip(caches, _SCALE_INPUTS, node.outputs[1:3], strict=True):
            assert cache is not None
            assert cache.name is not None
            node.replace_input_with(place, scale_of[cache.name])
            # Not its dtype alone: copies of a graph share their types.
            cache.type = written.type = ir.TensorType(ir.DataType.INT8)
            changed |= {cache.name, written.name}
        for part in ("k", "v"):
            node.attributes[f"{part}_quant_type"] = ir.AttrString(
                f"{part}_quant_type", "PER_CHANNEL"
            )
        node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", 8)
    assert changed == {*names, *(f"next_{name}" for name in names)}, changed
    return replace(
        traced,
        inputs=tuple(_store(spec, changed) for spec in traced.inputs),
        outputs=tuple(_store(spec, changed) for spec in traced.outputs),
    )


def _declare(graph: ir.Graph, cache: str, scale_BG1d: np.ndarray) -> ir.Value:
    """The scales of a cache tensor as a constant of the graph."""
    name = f"{cache}.scale"
    value = ir.Value(
        name=name,
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape(scale_BG1d.shape),
        const_value=ir.tensor(scale_BG1d, name=name),
    )
    graph.initializers[name] = value
    return value


def _store(spec: TensorSpec, changed: set[str | None]) -> TensorSpec:
    return replace(spec, dtype="int8") if spec.name in changed else spec
