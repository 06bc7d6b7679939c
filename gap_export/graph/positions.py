"""The position mapping: which ID and which order every slot of the prompt gets.

    mode              visual slots hold     visual IDs        text after      first new ID
    gap               raster order I        s + I[r]          s + N + j       s + N + t
    compact           raster order I        s + r             s + K + j       s + K + t
    permuted          pruner's order J      s + I[r]          s + N + j       s + N + t
    permuted-compact  pruner's order J      s + r             s + K + j       s + K + t

s tokens before the picture, N visual tokens, K kept, t tokens after. The first new ID is one more
than the last prompt token's, so the runtime counts on from there in every mode.

Where a token has three IDs (time, row, column: rotary embedding of pictures, M-RoPE), text has
the same number as all three, and the cell of visual token i in the picture's grid of R rows and C
columns is its place:

    mode              visual IDs: time, row, column                text after
    gap, permuted     s, s + I[r] // C, s + I[r] mod C             s + max(R, C) + j
    compact-grid      the same, in raster order                    1 + the largest visual ID + j
    the other two     s + r as all three                           s + K + j

So a kept token stays in its cell, and text goes on where it did before pruning; `compact-grid`
keeps the cells and moves the text up to them, as OpenVINO GenAI does. With one axis it would be
`compact` and is refused. The extra token's rules hold as below with cells for indices; behind the
last visual token is s + max(R, C), in `compact-grid` 1 + the largest ID of a kept one.

An extra token, made of removed ones, lies behind the kept ones. It is the last of the order in
every mode but one, and counts as one more token wherever IDs are compact:

    rule              its ID in gap and permuted
    last-visual       s + N - 1, that of the last visual token
    append            s + N; all text after moves on by one
    centroid          s + c, c the mean index of what it is made of, weighted and rounded; where
                      slots are in raster order it lies behind the last kept token up to c

References:
    Grounding-Aware Token Pruning, arXiv:2506.21873. The ablation modes' formulas, the rules
    for extra tokens and what compact means with three axes are ours. Cells are those of
    `get_rope_index` of Hugging Face's Qwen2-VL.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from gap_export.config.records import GRID_MODE
from gap_runtime.bundle.layout import TokenLayout

# A axes of positions, B batch (1), K kept, E extra (0 or 1), V visual slots, N visual tokens, S
# prompt slots.

_RASTER: Final = frozenset({"gap", "compact", GRID_MODE})
_COMPACT: Final = frozenset({"compact", "permuted-compact"})
CENTROID: Final = "centroid"
AXES: Final = 3
"""Position IDs of a token where they are more than one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where kept and extra tokens go.

    `slots_BV` says which token each visual slot holds, as an index into the kept ones in the
    pruner's order with the extra one behind them. `kept_BK` are the kept tokens by slot.
    `position_ids_AS` covers all slots of the longest prompt.
    """

    slots_BV: Tensor
    kept_BK: Tensor
    position_ids_AS: Tensor


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
    grid: tuple[int, int] | None = None,
) -> Places:
    """Slots and position IDs of a choice.

    Args:
        layout: Token counts.
        order: Kept tokens in the pruner's order, int64 [B, K] or a constant.
        mode: One of the modes above.
        extra_rule: One of the rules above, None where there is no extra token.
        centroid_B: Mean index of the extra token, int64, where the rule asks for it.
        grid: Rows and columns of the picture where tokens have three IDs; None where one counts.
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
        position_ids_AS=_number(layout, visual_BV, mode, extra_rule, grid),
    )


def _number(
    layout: TokenLayout,
    visual_BV: Tensor,
    mode: str,
    extra_rule: str | None,
    grid: tuple[int, int] | None,
) -> Tensor:
    """Position IDs of all slots [A, S], from the ascending indices of the visual ones."""
    axes = 1 if grid is None else AXES
    if mode in _COMPACT:
        return torch.cat([torch.arange(layout.prompt)[None]] * axes)
    visual_AV, end = visual_BV, layout.patches
    if grid is not None:
        end = max(grid)
        visual_AV = torch.index_select(torch.tensor(_lay_cells(*grid)), 1, visual_BV[0])
    start: Tensor | int = layout.prefix + end + (extra_rule == "append")
    if mode == GRID_MODE:
        visual_AV, start = _close_up(layout, visual_AV, extra_rule)
    return torch.cat(
        [
            torch.cat([torch.arange(layout.prefix)[None]] * axes),
            layout.prefix + visual_AV,
            torch.cat([start + torch.arange(layout.suffix)[None]] * axes),
        ],
        dim=1,
    )


def _close_up(
    layout: TokenLayout, visual_AV: Tensor, extra_rule: str | None
) -> tuple[Tensor, Tensor]:
    """Visual IDs from the picture's start with text right behind the largest, and its first ID."""
    if extra_rule != "append":
        return visual_AV, layout.prefix + 1 + visual_AV.flatten().amax(dim=0)
    cells_AK = visual_AV[:, : layout.kept]
    behind = 1 + cells_AK.flatten().amax(dim=0)
    extra_A1 = behind.expand(AXES, 1)
    return torch.cat([cells_AK, extra_A1], dim=1), layout.prefix + 1 + behind


def _lay_cells(rows: int, columns: int) -> list[list[int]]:
    """Time, row and column of every visual token from the picture's start, and of one behind."""
    count, behind = rows * columns, max(rows, columns)
    return [
        [0] * count + [behind],
        [k // columns for k in range(count)] + [behind],
        [k % columns for k in range(count)] + [behind],
    ]


def _sort(order: Tensor | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Indices ascending and where each stood, int64 [B, K]; at once where they are a constant.

    ONNX has no sort, so the K smallest of K are taken; float32 holds indices up to 2**24.
    """
    if isinstance(order, tuple):
        rank = sorted(range(len(order)), key=order.__getitem__)
        return torch.tensor([sorted(order)]), torch.tensor([rank])
    values, rank_BK = torch.topk(order.to(torch.float32), order.shape[1], largest=False)
    return values.to(torch.int64), rank_BK
