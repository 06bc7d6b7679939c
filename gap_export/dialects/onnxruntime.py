"""onnxruntime's own attention in the decoder, all else as in `native`: the fastest on its CPUs.

`GroupQueryAttention` reads the slots in use alone, and takes heads as linear layers give them, so
that nothing is transposed. Its own rotary embedding would count positions by slot, which GAP's
are not: queries and keys are turned before it. Weights in blocks are
those of `MatMulNBits` (gap_export.quantization.graph).
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from gap_export.dialects import native
from gap_export.interfaces.dialect import ATTENTION, FUSED, Rows

# B batch (1), S rows, H query heads, G key/value heads, L cache slots, d head width, E = H * d,
# F = G * d.

OPSETS: Final = native.OPSETS
OPERATORS: Final = native.OPERATORS | {
    ATTENTION,
    FUSED,
}
"""Those of native, and onnxruntime's own."""
_HEAD_MULTIPLE: Final = 8
"""Of the head width, which GroupQueryAttention wants."""

rms_norm = native.rms_norm
translate_attention: Final = native.translate_attention
translate_convolution: Final = native.translate_convolution


def fuses_attention(head_dim: int) -> bool:
    """Whether the fused operator takes heads of that width; others have attention as in native."""
    return head_dim % _HEAD_MULTIPLE == 0


def takes_int8_cache(head_dim: int) -> bool:
    """Where attention is fused: its operator has scales of keys and values."""
    return fuses_attention(head_dim)


def plan_rows(rows: Rows, cache_BGLd: Tensor) -> tuple[Tensor, ...]:
    """Slots in use after the run, less one [B] and as a scalar, both int32."""
    if not fuses_attention(cache_BGLd.shape[-1]):
        return native.plan_rows(rows, cache_BGLd)
    used_B = (rows.write_slot_B + rows.cosine_BSd.shape[1]).to(torch.int32)
    return used_B - 1, used_B[0]


def attend(
    query_SE: Tensor,
    key_SF: Tensor,
    value_SF: Tensor,
    cache: tuple[Tensor, Tensor],
    rows: Rows,
    planned: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal grouped attention; the caches are written in place where they are bound so."""
    head_dim = cache[0].shape[-1]
    if not fuses_attention(head_dim):
        return native.attend(query_SE, key_SF, value_SF, cache, rows, planned)
    heads, cache_heads = query_SE.shape[-1] // head_dim, cache[0].shape[1]
    query_BSE = _rotate(query_SE[None], rows, heads)
    key_BSF = _rotate(key_SF[None], rows, cache_heads)
    mixed_BSE, key_BGLd, value_BGLd = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        [query_BSE, key_BSF, value_SF[None], *cache, *planned],
        {
            "num_heads": heads,
            "kv_num_heads": cache_heads,
            "do_rotary": 0,
            "scale": head_dim**-0.5,
        },
        dtypes=[each.dtype for each in (query_BSE, *cache)],
        shapes=[each.shape for each in (query_BSE, *cache)],
        version=1,
    )
    return mixed_BSE.squeeze(0), key_BGLd, value_BGLd


def _rotate(x_BSE: Tensor, rows: Rows, heads: int) -> Tensor:
    """Rotary embedding, halves layout, of heads that lie side by side."""
    turned_BSE: Tensor = torch.onnx.ops.symbolic(
        "RotaryEmbedding",
        [x_BSE, rows.cosine_BSd.to(x_BSE.dtype), rows.sine_BSd.to(x_BSE.dtype)],
        {"interleaved": 0, "num_heads": heads},
        dtype=x_BSE.dtype,
        shape=x_BSE.shape,
        version=23,
    )
    return turned_BSE
