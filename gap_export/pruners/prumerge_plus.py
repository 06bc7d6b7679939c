"""PruMerge with the patches of a strided grid kept first, whatever their attention.

The rest of the budget goes to the patches that CLS attends to most; see `prumerge` for the
attention and the merging. Order: the grid, best first, then the others, best first.

References:
    PruMerge+ (arXiv:2403.15388), whose stride follows from the adaptive count and whose grid
    comes on top of it. A constant count is ours: it is shared by both. The stride is the one that
    the authors' rule gives to a quarter of the count, and wider where the grid would leave less
    than a twelfth of the count to attention, so that the picture always has a say. The authors'
    own constant count (`if_adaptive=False`) keeps some tokens twice.
"""

from __future__ import annotations

from typing import Final

import torch

from gap_export.blocks.selection import merge_nearest
from gap_export.config.records import PruneConfig
from gap_export.interfaces.features import EagerChoice, EagerVision, Feature, Kept, VisionFeatures
from gap_export.reference.selection import attend_as_one, count_outliers, merge_nearest_eagerly

PUBLISHED_AS: Final = "PruMerge+"
NEEDS: Final = frozenset({Feature.MERGE_ATTENTION, Feature.MERGE_KEYS})
EXTRA: Final = 1


def prune(features: VisionFeatures, kept: int, config: PruneConfig) -> Kept:
    """Grid tokens and others, each best first, merged."""
    del config
    attention_BN = features.by_token(Feature.MERGE_ATTENTION)
    tokens = attention_BN.shape[1]
    # Ranked apart: attention plus a bonus for the grid would round to ties in float32.
    grid = _place_grid(tokens, kept)
    if not grid:
        return merge_nearest(features, torch.topk(attention_BN, kept, dim=-1).indices)
    grid_G = torch.tensor(grid)
    rank_BG = torch.topk(torch.index_select(attention_BN, 1, grid_G), len(grid), dim=-1).indices
    on_grid_BG = torch.index_select(grid_G, 0, rank_BG[0])[None]
    is_grid_N = torch.tensor([index in set(grid) for index in range(tokens)])
    others_BN = torch.where(is_grid_N, -1.0, attention_BN)
    best_BR = torch.topk(others_BN, kept - len(grid), dim=-1).indices
    return merge_nearest(features, torch.cat([on_grid_BG, best_BR], dim=1))


def prune_eagerly(vision: EagerVision, kept: int, config: PruneConfig) -> EagerChoice:
    """The same by one sort; grid tokens score above all others, so none of them nearly ties."""
    del config
    attention = attend_as_one(vision)
    scores = attention.clone()
    for index in _place_grid(len(attention), kept):
        scores[index] += 2 * attention.max()
    order = torch.sort(scores, descending=True, stable=True).indices[:kept]
    return merge_nearest_eagerly(vision, tuple(order.tolist()), attention, scores)


def count_adaptively(vision: EagerVision) -> int:
    """Outliers of the attention together with the grid whose stride they give; 0 without any."""
    attention = attend_as_one(vision)
    tokens, outliers = len(attention), count_outliers(attention)
    if outliers == 0:
        return 0
    best = torch.sort(attention, descending=True, stable=True).indices[:outliers]
    stride = max(1, int(1 / (outliers / tokens)) // 3)
    return len({*best.tolist(), *range(0, tokens - 1, stride)})


def _place_grid(tokens: int, kept: int) -> list[int]:
    """Every stride-th token without the last one; none where a single one of several is kept."""
    stride = max(1, int(4 * tokens / kept) // 3)
    if stride == 1 and kept >= tokens - 1:
        # What the authors keep where more than a sixth are outliers.
        return list(range(max(tokens - 1, 1)))
    most = kept * 11 // 12
    while most and len(grid := list(range(0, tokens - 1, stride))) > most:
        stride += 1
    return grid if most else []
