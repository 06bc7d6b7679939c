"""Fused standard operators of opset 23 and 24: each is one node of the graph.

For onnxruntime 1.24 or newer and TensorRT 10.16 or newer. The functions exist for tracing and are
not computed by torch; the reference uses other code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

# B batch (1), S rows, H query heads, G key/value heads, L cache slots, P positions, D width.

OPSETS: Final = frozenset({24})
OPERATORS: Final = frozenset(
    [
        "Abs",
        "Add",
        "And",
        "ArgMax",
        "Attention",
        "Cast",
        "Clip",
        "Concat",
        "Conv",
        "Cos",
        "DequantizeLinear",
        "Div",
        "Equal",
        "Erf",
        "Exp",
        "Expand",
        "Flatten",
        "Floor",
        "Gather",
        "GatherElements",
        "GatherND",
        "Gelu",
        "Gemm",
        "Greater",
        "GreaterOrEqual",
        "Identity",
        "LayerNormalization",
        "Less",
        "LessOrEqual",
        "MatMul",
        "Max",
        "Min",
        "Mul",
        "Neg",
        "Not",
        "Or",
        "Pad",
        "Pow",
        "RMSNormalization",
        "Range",
        "Reciprocal",
        "ReduceL2",
        "ReduceMax",
        "ReduceMean",
        "ReduceMin",
        "ReduceSum",
        "Relu",
        "Reshape",
        "RotaryEmbedding",
        "Shape",
        "Sigmoid",
        "Sin",
        "Slice",
        "Softmax",
        "Split",
        "Sqrt",
        "Squeeze",
        "Sub",
        "Swish",
        "Tanh",
        "TensorScatter",
        "Tile",
        "TopK",
        "Transpose",
        "Unsqueeze",
        "Where",
    ]
)
"""Standard operators without control flow or data-dependent shapes."""

_FLOAT: Final = 1  # onnx.TensorProto.FLOAT


def rms_norm(x_BSD: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """Root-mean-square norm over the last dimension, computed in float32."""
    return _operator(
        "RMSNormalization",
        [x_BSD, weight_D],
        {"axis": -1, "epsilon": epsilon, "stash_type": _FLOAT},
        like=x_BSD,
        version=23,
    )


def rotate(x_BHSd: Tensor, cosine_Pd: Tensor, sine_Pd: Tensor, position_ids_BS: Tensor) -> Tensor:
    """Rotary embedding by position ID, halves layout; tables hold head_dim / 2 columns."""
    return _operator(
        "RotaryEmbedding",
        [x_BHSd, cosine_Pd.to(x_BHSd.dtype), sine_Pd.to(x_BHSd.dtype), position_ids_BS],
        {"interleaved": 0},
        like=x_BHSd,
        version=23,
    )


def write_cache(cache_BGLd: Tensor, update_BGSd: Tensor, write_slot_B: Tensor) -> Tensor:
    """The cache with rows written from a slot on; in place where a runtime binds it so."""
    return _operator(
        "TensorScatter",
        [cache_BGLd, update_BGSd, write_slot_B],
        {"mode": "linear", "axis": 2},
        like=cache_BGLd,
        version=24,
    )


def attend(query_BHSd: Tensor, key_BGLd: Tensor, value_BGLd: Tensor, mask_BHSL: Tensor) -> Tensor:
    """Grouped attention over the whole cache with an explicit boolean mask.

    TensorRT's parser ignores `nonpad_kv_seqlen` and refuses `softmax_precision`, so the mask is
    explicit and the precision of the softmax is the runtime's, float32 inside its kernels.
    """
    return _operator(
        "Attention",
        [query_BHSd, key_BGLd, value_BGLd, mask_BHSL],
        {},
        like=query_BHSd,
        version=24,
    )


translate_attention: Final = None
"""The converter's own translation is one Attention node; its softmax is the runtime's."""


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
