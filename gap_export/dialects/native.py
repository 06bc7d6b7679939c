"""Fused standard operators of opset 23 and 24: each is one node of the graph.

For onnxruntime 1.24 or newer and TensorRT 10.16 or newer. The functions exist for tracing and are
not computed by torch; the reference uses other code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from gap_export.dialects import portable
from gap_export.interfaces.dialect import Rows, merge_heads, slot_causal_mask, split_heads

# B batch (1), S rows, H query heads, G key/value heads, L cache slots, D width, d head width,
# E = H * d, F = G * d.

OPSETS: Final = frozenset({24})
OPERATORS: Final = portable.OPERATORS | {
    "Attention",
    "RMSNormalization",
    "RotaryEmbedding",
    "Swish",
    "TensorScatter",
}
"""Standard operators without control flow or data-dependent shapes."""
FUSES_WHOLE: Final = False

_FLOAT: Final = 1  # onnx.TensorProto.FLOAT


def rms_norm(x_SD: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """Root-mean-square norm over the last dimension, computed in float32."""
    return _operator(
        "RMSNormalization",
        [x_SD, weight_D],
        {"axis": -1, "epsilon": epsilon, "stash_type": _FLOAT},
        like=x_SD,
        version=23,
    )


def takes_int8_cache(head_dim: int) -> bool:
    """Never: the operators have no scales of keys and values."""
    del head_dim
    return False


def plan_rows(rows: Rows, cache_BGLd: Tensor) -> tuple[Tensor, ...]:
    """The mask [B, 1, S, L].

    TensorRT's parser ignores `nonpad_kv_seqlen`, so it is explicit.
    """
    return (slot_causal_mask(rows, cache_BGLd.shape[2]),)


def attend(
    query_SE: Tensor,
    key_SF: Tensor,
    value_SF: Tensor,
    cache: tuple[Tensor, Tensor],
    rows: Rows,
    planned: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal grouped attention; the caches are written in place where a runtime binds them so.

    TensorRT refuses `softmax_precision`, so that it is the runtime's, float32 inside its kernels.
    """
    head_dim = cache[0].shape[-1]
    query_BHSd, key_BGSd = (
        _rotate(split_heads(x_SE, head_dim), rows) for x_SE in (query_SE, key_SF)
    )
    key_BGLd = _write_cache(cache[0], key_BGSd, rows.write_slot_B)
    value_BGLd = _write_cache(cache[1], split_heads(value_SF, head_dim), rows.write_slot_B)
    mixed_BHSd = _operator(
        "Attention", [query_BHSd, key_BGLd, value_BGLd, *planned], {}, like=query_BHSd, version=24
    )
    return merge_heads(mixed_BHSd), key_BGLd, value_BGLd


translate_attention: Final = None
"""The converter's own translation is one Attention node; its softmax is the runtime's."""
translate_convolution: Final = None


def _rotate(x_BHSd: Tensor, rows: Rows) -> Tensor:
    """Rotary embedding, halves layout."""
    return _operator(
        "RotaryEmbedding",
        [x_BHSd, rows.cosine_BSd.to(x_BHSd.dtype), rows.sine_BSd.to(x_BHSd.dtype)],
        {"interleaved": 0},
        like=x_BHSd,
        version=23,
    )


def _write_cache(cache_BGLd: Tensor, update_BGSd: Tensor, write_slot_B: Tensor) -> Tensor:
    return _operator(
        "TensorScatter",
        [cache_BGLd, update_BGSd, write_slot_B],
        {"mode": "linear", "axis": 2},
        like=cache_BGLd,
        version=24,
    )


def _operator(
    name: str,
    inputs: Sequence[Tensor],
    attributes: dict[str, Any],
    *,
    like: Tensor,
    version: int,
) -> Tensor:
    result: Tensor = torch.onnx.ops.symbolic(
        name, inputs, attributes, dtype=like.dtype, shape=like.shape, version=version
    )
    return result
