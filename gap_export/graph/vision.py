"""The vision graph, in two parts that are traced apart and joined.

The tower is the same for all ratios; the pruning stage is small.

    name           dtype    shape           meaning
    in
    pixels         float32  [1, 3, H, W]    normalized picture
    between
    patches        model's  [1, N, C]       patch features before the projector
    <feature>      float32  [1, N]          by-products that the pruner needs
    out
    visual_tokens  float32  [1, K, D]       tokens of the kept patches, in slot order
    kept_index     int64    [1, K]          patch that each visual slot holds
    position_ids   int64    [1, s+K+T]      position of every slot of the longest prompt
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gap_export.config import PruneConfig
from gap_export.features import Feature, Pruner, VisionFeatures
from gap_export.graph.positions import keeps_raster_order, map_positions, sort_ascending
from gap_runtime.layout import TokenLayout

# B batch (1), N patches, K kept, C vision width, D decoder width, S prompt slots.


class TowerStage(nn.Module):
    """A family's tower with its by-products as a flat list, in the order of their names."""

    def __init__(self, tower: nn.Module, needs: frozenset[Feature]) -> None:
        """Wrap a tower that gives (patches, by-products)."""
        super().__init__()
        self.tower = tower
        self.needs = sorted(needs, key=lambda feature: feature.value)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Patches [B, N, C], then the by-products."""
        patches_BNC, extras = self.tower(pixels)
        return patches_BNC, *(extras[feature] for feature in self.needs)


class PruneStage(nn.Module):
    """The shared tail that every pruner ends in: order, gather, projector, position IDs."""

    def __init__(
        self,
        pruner: Pruner,
        projector: nn.Module,
        *,
        config: PruneConfig,
        layout: TokenLayout,
        grid: tuple[int, int],
    ) -> None:
        """Fix the kept count and the position mode."""
        super().__init__()
        self.pruner, self.projector = pruner, projector
        self.config, self.layout, self.grid = config, layout, grid
        self.needs = sorted(pruner.NEEDS, key=lambda feature: feature.value)

    def forward(self, patches_BNC: Tensor, extras: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Visual tokens, kept index and position IDs; see the table above."""
        features = VisionFeatures(
            patches_BNC=patches_BNC,
            grid=self.grid,
            extras=dict(zip(self.needs, extras, strict=True)),
        )
        mode, kept = self.config.positions, self.layout.kept
        if kept == self.layout.patches and keeps_raster_order(mode):
            raster_BK = order_BK = torch.arange(kept)[None]
            chosen_BKC = patches_BNC
        else:
            order_BK, raster_BK = _both_orders(
                self.pruner.prune(features, kept, self.config).order
            )
            if keeps_raster_order(mode):
                order_BK = raster_BK
            chosen_BKC = torch.index_select(patches_BNC, 1, order_BK[0])
        # Projecting after the choice spares the removed patches' work.
        tokens_BKD = self.projector(chosen_BKC).float()
        return tokens_BKD, order_BK, map_positions(self.layout, raster_BK, mode)


def _both_orders(order: Tensor | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The pruner's order and raster order, int64 [B, K]; sorted now where it is a constant."""
    if isinstance(order, tuple):
        return torch.tensor([order]), torch.tensor([sorted(order)])
    return order, sort_ascending(order)
