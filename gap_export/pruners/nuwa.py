"""Keep the strongest tokens of each 2 x 2 cell of the picture; the weaker take in neighbours.

Of each cell as few tokens stand as the count allows, those with the most attention; of all that
stand the strongest stay. Of these 45 of 100 stay as they are. To each of the others the tokens
around it are added, weighted by likeness and nearness. Own order: raster.

References:
    Nuwa (arXiv:2602.02951), its first stage. Likeness is the cosine of the patches' states,
    where the authors take the mean of states 16 to 24 of CLIP: one of them lies behind the
    patches, and here the tower ends with them. Ours: grids with an odd side have smaller cells at
    the end, and views share one count.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from gap_export.blocks.selection import mark, sort_ascending
from gap_export.config.records import PruneConfig
from gap_export.interfaces.features import (
    EagerChoice,
    EagerVision,
    Feature,
    Geometry,
    Kept,
    VisionFeatures,
)
from gap_export.reference.selection import read_attention

# B batch (1), N visual tokens, C patch width, K kept.

PUBLISHED_AS: Final = "Nuwa"
NEEDS: Final = frozenset({Feature.ATTENTION})
EXTRA: Final = 0
_REACH: Final = 280**0.5
"""Distance in tokens from which on one adds nothing."""
_CELL: Final = 2
_Place = tuple[int, int, int]


def prune(features: VisionFeatures, kept: int, config: PruneConfig) -> Kept:
    """The strongest of the cells in raster order, and what the weaker ones take in."""
    del config
    scores_BN = features.by_token(Feature.ATTENTION)
    tokens = scores_BN.shape[1]
    cells = _find_cells(features.geometry)
    # A token stands if fewer than so many of its cell are ahead of it.
    ahead_BN = torch.zeros_like(scores_BN)
    for place in range(_CELL * _CELL - 1):
        mates = [_find_mate(cells[cell], index, place) for index, cell in _by_token(cells)]
        is_earlier_N = torch.tensor([mate < index for index, mate in enumerate(mates)]).float()
        other_BN = torch.index_select(scores_BN, 1, torch.tensor(mates))
        ahead_BN = ahead_BN + (other_BN > scores_BN).float()
        ahead_BN = ahead_BN + (other_BN == scores_BN).float() * is_earlier_N
    standing_BN = torch.where(ahead_BN < _count_standing(cells, kept), scores_BN, -1.0)
    order_BK = sort_ascending(torch.topk(standing_BN, kept, dim=-1).indices)
    if kept == tokens:
        return Kept(order=order_BK)
    return Kept(order=order_BK, mix_BKN=_mix(features, scores_BN, order_BK))


def _mix(features: VisionFeatures, scores_BN: Tensor, order_BK: Tensor) -> Tensor:
    """What each kept token is made of [B, K, N]: itself, and if it is weak its neighbours."""
    kept, tokens = order_BK.shape[1], scores_BN.shape[1]
    own_BKN = mark(order_BK, tokens)
    weak = _count_weak(kept)
    if not weak:
        return own_BKN
    kept_scores_BK = torch.index_select(scores_BN, 1, order_BK[0])
    weak_BW = torch.topk(kept_scores_BK, weak, dim=-1, largest=False).indices
    is_weak_BK1 = mark(weak_BW, kept).amax(dim=1)[..., None]
    unit_NC = functional.normalize(features.patches_BNC[0].float(), dim=-1)
    likeness_KN = torch.index_select(unit_NC, 0, order_BK[0]) @ unit_NC.T
    grid_N, row_N, column_N = torch.tensor(features.geometry.places).T
    place_N2 = torch.stack([row_N, column_N], dim=1).float()
    apart_KN2 = torch.index_select(place_N2, 0, order_BK[0])[:, None] - place_N2
    distance_KN = (apart_KN2 * apart_KN2).sum(dim=-1).sqrt()
    nearness_KN = (1.0 - distance_KN / _REACH).clamp(min=0.0)
    is_same_grid_KN = torch.index_select(grid_N, 0, order_BK[0])[:, None] == grid_N
    weights_KN = likeness_KN.clamp(min=0.0) * nearness_KN * is_same_grid_KN.float()
    weights_KN = weights_KN / (weights_KN.sum(dim=-1, keepdim=True) + 1e-8)
    mix_BKN: Tensor = own_BKN + (1.0 - own_BKN) * weights_KN[None] * is_weak_BK1
    return mix_BKN


def prune_eagerly(vision: EagerVision, kept: int, config: PruneConfig) -> EagerChoice:
    """The same from the tower's own attention map; ties go to the lower index."""
    del config
    scores = read_attention(vision).tolist()
    cells = _find_cells(vision.geometry)
    most = _count_standing(cells, kept)
    standing = [
        index
        for cell in cells
        for index in sorted(cell, key=lambda index: (-scores[index], index))[:most]
    ]
    strongest = sorted(standing, key=lambda index: (-scores[index], index))[:kept]
    order = tuple(sorted(strongest))
    if kept == len(scores):
        return EagerChoice(order=order, scores=None)
    patches = vision.patches.double()
    directions = torch.stack([patch / patch.norm().clamp(min=1e-12) for patch in patches])
    places = vision.geometry.places
    rows = patches[list(order)]
    by_strength = sorted(range(kept), key=lambda k: (scores[order[k]], order[k]))
    for k in by_strength[: _count_weak(kept)]:
        center = order[k]
        grid, row, column = places[center]
        weights = (directions @ directions[center]).clamp(min=0)
        for index, place in enumerate(places):
            distance = ((place[1] - row) ** 2 + (place[2] - column) ** 2) ** 0.5
            weights[index] *= max(0.0, 1 - distance / _REACH) if place[0] == grid else 0.0
        weights /= weights.sum() + 1e-8
        weights[center] = 1
        rows[k] = weights @ patches
    return EagerChoice(order=order, scores=None, rows=rows.to(vision.patches.dtype))


def _count_weak(kept: int) -> int:
    """Kept tokens whose attention lies below the 55th percentile, interpolated linearly."""
    return -(-11 * (kept - 1) // 20)


def _count_standing(cells: list[list[int]], kept: int) -> int:
    """The fewest tokens of every cell that are enough together."""
    most = 1
    while sum(min(most, len(cell)) for cell in cells) < kept:
        most += 1
    return most


def _find_cells(geometry: Geometry) -> list[list[int]]:
    """Tokens of each cell of neighbouring ones, four but at the end of an odd side."""
    cells: dict[_Place, list[int]] = {}
    for index, (grid, row, column) in enumerate(geometry.places):
        cell = (grid, row // _CELL, column // _CELL)
        cells.setdefault(cell, []).append(index)
    return list(cells.values())


def _by_token(cells: list[list[int]]) -> list[tuple[int, int]]:
    """Every token with the number of its cell, in raster order."""
    return sorted((index, number) for number, cell in enumerate(cells) for index in cell)


def _find_mate(cell: list[int], index: int, place: int) -> int:
    """Another token of a cell; the token itself where the cell has fewer."""
    mates = [other for other in cell if other != index]
    return mates[place] if place < len(mates) else index
