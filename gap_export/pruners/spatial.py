"""Keep patches spread evenly over the grid, the same ones for every picture.

The paper names a spatial baseline without its formula; this definition is ours: a square grid of
m x m patches at the middles of m equal parts where the kept count is m squared and fits, else
even steps along the raster. Its own order is the raster, so `permuted` changes nothing here.
"""

from __future__ import annotations

import math
from typing import Final

from gap_export.config import PruneConfig
from gap_export.features import EagerChoice, EagerVision, Feature, Kept, VisionFeatures

NEEDS: Final[frozenset[Feature]] = frozenset()


def prune(features: VisionFeatures, kept: int, config: PruneConfig) -> Kept:
    """The spread patches in raster order, a constant."""
    del config
    return Kept(order=_spread(features.grid, kept))


def prune_eagerly(vision: EagerVision, kept: int, config: PruneConfig) -> EagerChoice:
    """The same constant."""
    del config
    return EagerChoice(order=_spread(vision.grid, kept), scores=None)


def _spread(grid: tuple[int, int], kept: int) -> tuple[int, ...]:
    rows, columns = grid
    side = math.isqrt(kept)
    if side * side == kept and side <= min(rows, columns):
        return tuple(
            r * columns + c for r in _middles(rows, side) for c in _middles(columns, side)
        )
    return tuple(_middles(rows * columns, kept))


def _middles(length: int, parts: int) -> list[int]:
    """Middles of equal parts of a range, rounded down: floor((j + 0.5) * length / parts)."""
    return [(2 * j + 1) * length // (2 * parts) for j in range(parts)]
