"""The position mapping: which ID and which order every slot of the prompt gets.

    mode              visual slots hold     visual IDs        text after      first new ID
    gap               raster order I        s + I[r]          s + N + j       s + N + t
    compact           raster order I        s + r             s + K + j       s + K + t
    permuted          pruner's order J      s + I[r]          s + N + j       s + N + t
    permuted-compact  pruner's order J      s + r             s + K + j       s + K + t

s tokens before the picture, N visual tokens, K kept, t tokens after. The first new ID is one more
than the last prompt token's, so the runtime counts on from there in every mode.

An extra token, made of removed ones, lies behind the kept ones. It is the last of the order in
every mode but one, and counts as one more token wherever IDs are compact:

    rule              its ID in gap and permuted
    last-visual       s + N - 1, that of the last visual token
    append            s + N; all text after moves on by one
    centroid          s + c, c the mean index of what it is made of, weighted and rounded; where
                      slots are in raster order it lies behind the last kept token up to c

References:
    Grounding-Aware Token Pruning, arXiv:2506.21873. The ablation modes' formulas and the rules
    for extra tokens are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from gap_runtime.bundle.layout import TokenLayout

# B batch (1), K kept, E extra (0 or 1), N visual tokens, S prompt slots.

_RASTER: Final = frozenset({"gap", "compact"})
_COMPACT: Final = frozenset({"compact", "permuted-compact"})
CENTROID: Final = "centroid"


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where kept and extra tokens go.

    `slots_BV` says which token each visual slot holds, as an index into the kept ones in the
    pruner's order with the extra one behind them. `kept_BK` are the kept tokens by slot.
    `position_ids_BS` covers all slots of the longest prompt.
    """

    slots_BV: Tensor
    kept_BK: Tensor
    position_ids_BS: Tensor


def keeps_raster_order(mode: str) -> bool:
    """Whether kept patches lie in the order that they had before pruning."""
    return mode in _RASTER


def place_tokens(
    layout: TokenLayout,
    order: Tensor | tuple[int, ...],
    mode: str,
    *,
    extra_rule: str | None,
    centroid_B: Tensor | None,
) -> Places:
    """Slots and position IDs of a choice.

    Args:
        layout: Token counts.
        order: Kept tokens in the pruner's order, int64 [B, K] or a constant.
        mode: One of the modes above.
        extra_rule: One of the rules above, None where there is no extra token.
        centroid_B: Mean index of the extra token, int64, where the rule asks for it.
    """
    raster_BK, rank_BK = _sort(order)
    order_BK = torch.tensor([order]) if isinstance(order, tuple) else order
    kept, patches = layout.kept, layout.patches
    slots_BV = rank_BK if keeps_raster_order(mode) else torch.arange(kept)[None]
    visual_BV = raster_BK
    if extra_rule == CENTROID:
        assert centroid_B is not None
        # Half a step behind a kept token of the same index.
        marks_BV = torch.cat([raster_BK.float(), centroid_B[:, None].float() + 0.5], dim=1)
        marks_BV, sorted_BV = torch.topk(marks_BV, kept + 1, largest=False)
        visual_BV = marks_BV.to(torch.int64)
        last_B1 = torch.full((1, 1), kept)
        slots_BV = torch.cat([slots_BV, last_B1], dim=1)
        if keeps_raster_order(mode):
            slots_BV = torch.gather(slots_BV, 1, sorted_BV)
    elif extra_rule is not None:
        behind = patches if extra_rule == "append" else patches - 1
        visual_BV = torch.cat([raster_BK, torch.full((1, 1), behind)], dim=1)
        slots_BV = torch.cat([slots_BV, torch.full((1, 1), kept)], dim=1)
    return Places(
        slots_BV=slots_BV,
        kept_BK=raster_BK if keeps_raster_order(mode) else order_BK,
        position_ids_BS=_number(layout, visual_BV, mode, extra_rule),
    )


def _number(layout: TokenLayout, visual_BV: Tensor, mode: str, extra_rule: str | None) -> Tensor:
    """Position IDs of all slots, from the ascending indices of the visual ones."""
    if mode in _COMPACT:
        return torch.arange(layout.prompt)[None]
    start = layout.prefix + layout.patches + (extra_rule == "append")
    return torch.cat(
        [
            torch.arange(layout.prefix)[None],
            layout.prefix + visual_BV,
            start + torch.arange(layout.suffix)[None],
        ],
        dim=1,
    )


def _sort(order: Tensor | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Indices ascending and where each stood, int64 [B, K]; at once where they are a constant.

    ONNX has no sort, so the K smallest of K are taken; float32 holds indices up to 2**24.
    """
    if isinstance(order, tuple):
        rank = sorted(range(len(order)), key=order.__getitem__)
        return torch.tensor([sorted(order)]), torch.tensor([rank])
    values, rank_BK = torch.topk(order.to(torch.float32), order.shape[1], largest=False)
    return values.to(torch.int64), rank_BK
