"""What is kept of a picture, and where it lies: written out plainly, as lists.

A second form of the graphs' places and position IDs, straight from the definitions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from gap_export.config.records import PruneConfig

EXTRA_INDEX: Final = -1
"""Stands for the extra token where visual tokens are given by index."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Visual tokens by index, their order, and where the extra one lies.

    The extra token's index is EXTRA_INDEX. `scores` are by visual token; those that are never
    removed have the best.
    """

    order: list[int]
    tokens: dict[int, Tensor]
    extra_place: float | None
    scores: tuple[float, ...] | None


def find_extra_place(
    config: PruneConfig, patches: int, removable: list[int], weights: Tensor
) -> float:
    """Where the extra token lies among the visual ones; a half is behind the one before it.

    Args:
        config: Says which rule.
        patches: Visual tokens before pruning.
        removable: Those that may be removed.
        weights: What the extra token is made of, by removable token.
    """
    if config.extra_token == "append":
        return patches
    if config.extra_token == "last-visual":
        return patches - 0.5
    heavy: list[float] = weights.double().tolist()
    mean = sum(w * k for w, k in zip(heavy, removable, strict=True)) / sum(heavy)
    return float(math.floor(mean + 0.5)) + 0.5


def place_tokens(
    before: int,
    patches: int,
    after: int,
    order: list[int],
    mode: str,
    *,
    extra_place: float | None = None,
    grid: tuple[int, int] | None = None,
) -> tuple[list[int], list[list[int]]]:
    """Visual tokens by slot, and position IDs of all slots on each axis, as plain lists.

    Args:
        before: Tokens before the picture.
        patches: Visual tokens before pruning.
        after: Tokens after the picture.
        order: Kept tokens in the pruner's own order.
        mode: Position mode.
        extra_place: Where the extra token lies among the visual ones, None without one.
        grid: Rows and columns of the picture where a token has three IDs, by time, row and
            column; None where it has one.

    References:
        Grounding-Aware Token Pruning, arXiv:2506.21873; cells as in `get_rope_index` of
        transformers' Qwen2-VL.
    """
    marks = sorted(order) if extra_place is None else sorted([*order, extra_place])
    raster = [EXTRA_INDEX if mark == extra_place else int(mark) for mark in marks]
    own = list(order) if extra_place is None else [*order, EXTRA_INDEX]
    if mode in {"gap", "permuted", "compact-grid"}:
        cells = [_find_cell(math.floor(mark), patches, grid) for mark in marks]
        text_start = _find_cell(patches, patches, grid)[0] + (extra_place == patches)
        if mode == "compact-grid":
            kept_cells = [cell for cell, mark in zip(cells, marks, strict=True) if mark != patches]
            text_start = 1 + max(max(cell) for cell in kept_cells)
            if extra_place == patches:
                cells, text_start = [*kept_cells, (text_start,) * 3], text_start + 1
    else:
        cells = [(rank,) * (1 if grid is None else 3) for rank in range(len(marks))]
        text_start = len(marks)
    slots = own if mode.startswith("permuted") else raster
    ids = [
        [
            *range(before),
            *(before + place for place in axis),
            *(before + text_start + j for j in range(after)),
        ]
        for axis in zip(*cells, strict=True)
    ]
    return slots, ids


def _find_cell(index: int, patches: int, grid: tuple[int, int] | None) -> tuple[int, ...]:
    """How far a visual token lies behind the picture's start, on each axis."""
    if grid is None:
        return (index,)
    if index == patches:
        return (max(grid),) * 3
    row, column = divmod(index, grid[1])
    return 0, row, column
