"""onnxruntime's own attention in the decoder, all else as in `native`: the fastest on its CPUs.

`GroupQueryAttention` reads the slots in use alone, and takes heads as linear layers give them, so
that nothing is transposed. Where `turns_itself` says so, it turns queries and keys by the rows'
position IDs too; else they are turned before it. Weights in blocks are those of `MatMulNBits`
(gap_export.quantization.graph).
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from gap_export.dialects import native
from gap_export.interfaces.dialect import ATTENTION, FUSED, RotaryTables, Rows

# B batch (1), S rows, H query heads, G key/value heads, L cache slots, d head width, P positions,
# E = H * d, F = G * d.

OPSETS: Final = native.OPSETS
OPERATORS: Final = native.OPERATORS | {
    ATTENTION,
    FUSED,
}
"""Those of native, and onnxruntime's own."""
FUSES_WHOLE: Final = True
"""It would fuse them itself, and arrange all values anew for it: most of the time of loading."""
_HEAD_MULTIPLE: Final = 8
"""Of the head width, which GroupQueryAttention wants."""
_TURNED_MULTIPLE: Final = 16
"""Of the head width, where it turns queries and keys itself."""

rms_norm = native.rms_norm
translate_attention: Final = native.translate_attention
translate_convolution: Final = native.translate_convolution


def fuses_attention(head_dim: int) -> bool:
    """Whether the fused operator takes heads of that width; others have attention as in native."""
    return head_dim % _HEAD_MULTIPLE == 0


def find_tables(rows: Rows, head_dim: int, dtype: torch.dtype) -> RotaryTables | None:
    """The rotary tables for attention that turns queries and keys itself; None where it does not.

    It takes one position of each row. In 16 bits CUDA's kernel of a step counts slots, whatever
    positions it is given, and answers would be others without a word; in float32 it has none.
    """
    serves = dtype == torch.float32 and head_dim % _TURNED_MULTIPLE == 0
    return rows.tables if serves else None


def takes_int8_cache(head_dim: int) -> bool:
    """Where attention is fused: its operator has scales of keys and values."""
    return fuses_attention(head_dim)


def plan_rows(rows: Rows, cache_BGLd: Tensor) -> tuple[Tensor, ...]:
    """Slots in use after the run, less one [B] and as a scalar, both int32.

    The operator takes a run whose rows are all of the slots by the scalar for the first one, and
    counts positions on from its first row's. So where it turns, the scalar is one more in an empty
    cache; what is read there follows the vector.
    """
    head_dim = cache_BGLd.shape[-1]
    if not fuses_attention(head_dim):
        return native.plan_rows(rows, cache_BGLd)
    tables = find_tables(rows, head_dim, cache_BGLd.dtype)
    if tables is None:
        used_B = (rows.write_slot_B + rows.cosine_BSd.shape[1]).to(torch.int32)
        return used_B - 1, used_B[0]
    count = tables.position_BS.shape[1]
    used_B = (rows.write_slot_B + count).to(torch.int32)
    behind_B = (torch.clamp(rows.write_slot_B, min=1) + count).to(torch.int32)
    return used_B - 1, behind_B[0]


def attend(
    query_SE: Tensor,
    key_SF: Tensor,
    value_SF: Tensor,
    cache: tuple[Tensor, Tensor],
    rows: Rows,
    planned: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal grouped attention; the caches are written in place where they are bound so."""
    tables = find_tables(rows, cache[0].shape[-1], cache[0].dtype)
    if tables is None:
        return attend_turned(query_SE, key_SF, value_SF, cache, rows, planned)
    turn = (tables.cosine_Pd, tables.sine_Pd, tables.position_BS)
    heads_BSE = (query_SE[None], key_SF[None], value_SF[None])
    return _attend(heads_BSE, cache, (*planned, *turn), turns=True)


def attend_turned(
    query_SE: Tensor,
    key_SF: Tensor,
    value_SF: Tensor,
    cache: tuple[Tensor, Tensor],
    rows: Rows,
    planned: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with queries and keys turned before the operator."""
    head_dim = cache[0].shape[-1]
    if not fuses_attention(head_dim):
        return native.attend(query_SE, key_SF, value_SF, cache, rows, planned)
    query_BSE = _rotate(query_SE[None], rows, query_SE.shape[-1] // head_dim)
    key_BSF = _rotate(key_SF[None], rows, cache[0].shape[1])
    return _attend((query_BSE, key_BSF, value_SF[None]), cache, planned, turns=False)


def _attend(
    heads_BSE: tuple[Tensor, Tensor, Tensor],
    cache: tuple[Tensor, Tensor],
    planned: tuple[Tensor, ...],
    *,
    turns: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator, on queries, keys and values with their batch."""
    query_BSE, head_dim = heads_BSE[0], cache[0].shape[-1]
    mixed_BSE, key_BGLd, value_BGLd = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        [*heads_BSE, *cache, *planned],
        {
            "num_heads": query_BSE.shape[-1] // head_dim,
            "kv_num_heads": cache[0].shape[1],
            "do_rotary": int(turns),
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
