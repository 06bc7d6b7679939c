"""Plain operators of opset 18 to 20, for runtimes that know no fused attention.

Norms, rotary embedding, attention and the cache update are written out. What needs float32 is
cast in the graph itself: norms, rotary products, softmax. Masks are finite.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from gap_export.interfaces.dialect import Rows, merge_heads, slot_causal_mask, split_heads

# B batch (1), S rows, H query heads, G key/value heads, R query heads of a key head, L cache
# slots, D width, d head width, E = H * d, F = G * d.

OPSETS: Final = frozenset({18, 19, 20, 21})
OPERATORS: Final = frozenset(
    [
        "Abs",
        "Add",
        "And",
        "ArgMax",
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
        "Range",
        "Reciprocal",
        "ReduceL2",
        "ReduceMax",
        "ReduceMean",
        "ReduceMin",
        "ReduceSum",
        "Relu",
        "Reshape",
        "Shape",
        "Sigmoid",
        "Sin",
        "Slice",
        "Softmax",
        "Split",
        "Sqrt",
        "Squeeze",
        "Sub",
        "Tanh",
        "Tile",
        "TopK",
        "Transpose",
        "Unsqueeze",
        "Where",
    ]
)
"""Operators that TensorRT 10.3's parser reads; none with control flow or open sizes.

Gelu is of opset 20, so that no graph for TensorRT 10.3, which reads 19, has it.
"""
FUSES_WHOLE: Final = False

_HIDDEN: Final = -1e30
_FLOAT: Final = 1  # onnx.TensorProto.FLOAT


def rms_norm(x_SD: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """Root-mean-square norm over the last dimension, computed in float32."""
    wide_SD = x_SD.float()
    mean_S1 = (wide_SD * wide_SD).mean(dim=-1, keepdim=True)
    return (wide_SD / torch.sqrt(mean_S1 + epsilon)).to(x_SD.dtype) * weight_D


def takes_int8_cache(head_dim: int) -> bool:
    """Never: the operators have no scales of keys and values."""
    del head_dim
    return False


def plan_rows(rows: Rows, cache_BGLd: Tensor) -> tuple[Tensor, ...]:
    """The mask [B, 1, S, L]."""
    return (slot_causal_mask(rows, cache_BGLd.shape[2]),)


def attend(
    query_SE: Tensor,
    key_SF: Tensor,
    value_SF: Tensor,
    cache: tuple[Tensor, Tensor],
    rows: Rows,
    planned: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal grouped attention over the whole cache."""
    head_dim = cache[0].shape[-1]
    query_BHSd = rotate(split_heads(query_SE, head_dim), rows)
    key_BGSd = rotate(split_heads(key_SF, head_dim), rows)
    key_BGLd = write_cache(cache[0], key_BGSd, rows.write_slot_B)
    value_BGLd = write_cache(cache[1], split_heads(value_SF, head_dim), rows.write_slot_B)
    return merge_heads(mix(query_BHSd, key_BGLd, value_BGLd, *planned)), key_BGLd, value_BGLd


def rotate(x_BHSd: Tensor, rows: Rows) -> Tensor:
    """Rotary embedding, halves layout, in float32."""
    cosine, sine = rows.cosine_BSd[:, None], rows.sine_BSd[:, None]  # B1Sd: one axis of heads
    half = x_BHSd.shape[-1] // 2
    first, second = x_BHSd[..., :half].float(), x_BHSd[..., half:].float()
    turned = (first * cosine - second * sine, second * cosine + first * sine)
    return torch.cat(turned, dim=-1).to(x_BHSd.dtype)


def write_cache(cache_BGLd: Tensor, update_BGSd: Tensor, write_slot_B: Tensor) -> Tensor:
    """The cache with rows written from a slot on.

    Every slot chooses between its old row and one of the new ones, which every runtime can do.
    """
    row_L = torch.arange(cache_BGLd.shape[2]) - write_slot_B
    rows = update_BGSd.shape[2]
    is_new_L = (row_L >= 0) & (row_L < rows)
    moved_BGLd = torch.index_select(update_BGSd, 2, torch.where(is_new_L, row_L, 0))
    return torch.where(is_new_L[:, None], moved_BGLd, cache_BGLd)


def mix(query_BHSd: Tensor, key_BGLd: Tensor, value_BGLd: Tensor, mask_BHSL: Tensor) -> Tensor:
    """Grouped attention over the whole cache with an explicit boolean mask."""
    batch, heads, rows, width = query_BHSd.shape
    groups = key_BGLd.shape[1]
    query, key, value = query_BHSd, key_BGLd, value_BGLd
    if heads != groups:
        # Rows stay an axis of their own, so that only it is open.
        query = query.reshape(batch, groups, heads // groups, rows, width)
        key, value, mask_BHSL = key[:, :, None], value[:, :, None], mask_BHSL[:, :, None]
    scores = (query @ key.transpose(-1, -2)).float() * width**-0.5
    weights = torch.softmax(torch.where(mask_BHSL, scores, _HIDDEN), dim=-1)
    return (weights.to(value.dtype) @ value).reshape(batch, heads, rows, width)


translate_convolution: Final = None


def translate_attention(op: Any, query: Any, key: Any, value: Any, mask: Any, scale: float) -> Any:
    """A tower's attention, written out; softmax in float32."""
    scores = op.MatMul(query, op.Transpose(key, perm=[0, 1, 3, 2]))
    scores = op.Mul(op.Cast(scores, to=_FLOAT), op.Constant(value_float=scale))
    if mask is not None:
        scores = op.Add(scores, op.Cast(mask, to=_FLOAT))
    return op.MatMul(op.CastLike(op.Softmax(scores, axis=-1), value), value)
