"""Keep patches spread evenly over the grid, the same ones for every picture.

The paper names a spatial baseline without its formula; this definition is ours: a square grid of
m x m patches at the middles of m equal parts where the kept count is m squared and fits, else
even steps along the raster, as where tokens are missing that stay anyway. Several grids (the views
of a tiled picture) share the count by their sizes, largest remainders first. Its own order is the
raster, so `permuted` changes nothing here.
"""

from __future__ import annotations

import math
from typing import Final

from gap_export.config.records import PruneConfig
from gap_export.interfaces.features import (
    EagerChoice,
    EagerVision,
    Feature,
    Geometry,
    Kept,
    VisionFeatures,
)

NEEDS: Final[frozenset[Feature]] = frozenset()
EXTRA: Final = 0


def prune(features: VisionFeatures, kept: int, config: PruneConfig) -> Kept:
    """The spread patches in raster order, a constant."""
    del config
    return Kept(order=_spread_all(features.geometry, kept))


def prune_eagerly(vision: EagerVision, kept: int, config: PruneConfig) -> EagerChoice:
    """The same constant."""
    del config
    return EagerChoice(order=_spread_all(vision.geometry, kept), scores=None)


def _spread_all(geometry: Geometry, kept: int) -> tuple[int, ...]:
    if geometry.missing:
        return tuple(_middles(geometry.tokens, kept))
    sizes = [rows * columns for rows, columns in geometry.grids]
    shares = [kept * size // sum(sizes) for size in sizes]
    remainders = [kept * size % sum(sizes) for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda k: -remainders[k])
    for k in by_remainder[: kept - sum(shares)]:
        shares[k] += 1
    return tuple(
        sum(sizes[:k]) + index
        for k, grid in enumerate(geometry.grids)
        for index in _spread(grid, shares[k])
    )


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
