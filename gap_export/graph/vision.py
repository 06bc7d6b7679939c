"""The vision graph, in two parts that are traced apart and joined.

The tower is the same for all ratios; the pruning stage is small.

    name           dtype    shape            meaning
    in
    pixels         float32  [1, 3, H, W]     normalized picture; [1, views, 3, H, W] of tiles
    text_features  float32  [1, W]           the phrase, only where the pruner reads it
    between
    patches        model's  [1, N, C]        tokens before the projector, with all planes
    <feature>      float32  [1, P, ...]      by-products that the pruner needs
    out
    visual_tokens  float32  [1, K+E, D]      kept and extra tokens, in slot order; the decoder's
                                             rows, with planes behind each where it takes them
    kept_index     int64    [1, K]           visual token that each kept slot holds
    position_ids   int64    [axes, s+K+E+T]  position of every slot of the longest prompt
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from gap_export.config.records import PruneConfig
from gap_export.graph import coordinates as ivc
from gap_export.graph.positions import CENTROID, keeps_raster_order, place_tokens
from gap_export.interfaces.decoder import DecoderSpec
from gap_export.interfaces.family import ModelSpec, geometry_of
from gap_export.interfaces.features import (
    Feature,
    Geometry,
    Kept,
    Pruner,
    VisionFeatures,
    settle_needs,
)
from gap_runtime.bundle.layout import TokenLayout
from gap_runtime.bundle.tensors import Dtype, TensorSpec
from gap_runtime.pictures.preprocess import Bucket

# B batch (1), N visual tokens but fixed ones, F fixed tokens, K kept, V visual slots, C patch
# width, D decoder width, P patches, W text width.

_TILED: Final = 5
"""Dimensions of pixels that have views, [1, views, 3, side, side]."""


def tower_inputs(spec: ModelSpec, bucket: Bucket) -> list[TensorSpec]:
    """What the tower takes: the first part of the table above."""
    pixels = spec.preprocess.pixel_shape(bucket)
    return [
        TensorSpec(
            name="pixels",
            dtype="float32",
            shape=pixels,
            meaning="views of the picture" if len(pixels) == _TILED else "normalized picture",
        )
    ]


def tower_outputs(
    spec: ModelSpec, bucket: Bucket, needs: frozenset[Feature], dtype: Dtype
) -> list[TensorSpec]:
    """What the tower hands to the pruning stage: the part between."""
    tokens = geometry_of(bucket).tokens
    patches = TensorSpec(
        name="patches",
        dtype=dtype,
        shape=(1, tokens, spec.vision_width),
        meaning="tokens before the projector",
    )
    features = [
        TensorSpec(
            name=feature.value,
            dtype="float32",
            shape=(1, tokens * bucket.strip, *spec.features[feature]),
            meaning="by-product of the tower",
        )
        for feature in sort_features(needs)
    ]
    return [patches, *features]


def prune_outputs(spec: DecoderSpec, layout: TokenLayout) -> list[TensorSpec]:
    """What the pruning stage gives: the last part. The phrase comes from `text_outputs`."""
    return [
        TensorSpec(
            name="visual_tokens",
            dtype="float32",
            shape=(1, layout.visual, spec.row_width),
            meaning="tokens of the kept patches, in slot order",
        ),
        TensorSpec(
            name="kept_index",
            dtype="int64",
            shape=(1, layout.kept),
            meaning="visual token that each kept slot holds",
        ),
        TensorSpec(
            name="position_ids",
            dtype="int64",
            shape=(spec.axes, layout.prompt),
            meaning="position of every slot of the longest prompt",
        ),
    ]


class TowerStage(nn.Module):
    """A family's tower with its by-products as a flat list, in the order of their names."""

    def __init__(self, tower: nn.Module, needs: frozenset[Feature]) -> None:
        """Wrap a tower that gives (patches, by-products)."""
        super().__init__()
        self.tower = tower
        self.needs = sort_features(needs)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Patches [B, N, C], then the by-products."""
        patches_BNC, values = self.tower(pixels)
        return patches_BNC, *(values[feature].float() for feature in self.needs)


class PruneStage(nn.Module):
    """The shared tail that every pruner ends in: order, gather, projector, position IDs."""

    def __init__(
        self,
        pruner: Pruner,
        projector: nn.Module,
        fixed_tokens: nn.Module | None,
        *,
        config: PruneConfig,
        layout: TokenLayout,
        geometry: Geometry,
        fixed: tuple[int, ...],
        given: list[Feature],
        text_sign: int,
        grid: tuple[int, int] | None,
        planes: int,
        coordinates: tuple[int, ...] = (),
    ) -> None:
        """Fix the kept count and the position mode.

        Args:
            pruner: Chooses.
            projector: Patches to visual tokens.
            fixed_tokens: Gives the tokens that are never removed, None where there are none.
            config: Position mode and the pruner's settings.
            layout: Token counts.
            geometry: Of the tokens that may be removed.
            fixed: Indices of those that may not.
            given: Features that come as inputs, in order.
            text_sign: See VisionFeatures.
            grid: Rows and columns that give tokens their positions; see `place_tokens`.
            planes: How many lie behind each token, before and behind the projector.
            coordinates: Tokens that stay whatever the pruner chooses.
        """
        super().__init__()
        self.pruner, self.projector, self.fixed_tokens = pruner, projector, fixed_tokens
        self.config, self.layout, self.geometry = config, layout, geometry
        self.given, self.text_sign = given, text_sign
        self.fixed, self.grid, self.planes = fixed, grid, planes
        self.coordinates = coordinates
        kept_always = set(fixed)
        self.removable = [k for k in range(layout.patches) if k not in kept_always]

    def forward(self, patches_BNC: Tensor, values: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Visual tokens, kept index and position IDs; see the table above."""
        mode, kept = self.config.positions, self.layout.kept - len(self.fixed)
        if kept == self.geometry.tokens and keeps_raster_order(mode):
            choice, features = Kept(order=tuple(range(kept))), None
        else:
            features = self._features(patches_BNC, values)
            choice = ivc.choose(self.pruner, features, kept, self.config, self.coordinates)
        rows_BKC, extra_BN = self._mix(patches_BNC, choice, kept)
        tokens_BVD = self._project(rows_BKC, choice, features)
        if self.fixed_tokens is not None:
            fixed_BFD = self.fixed_tokens()
            tokens_BVD = torch.cat([tokens_BVD[:, :kept], fixed_BFD, tokens_BVD[:, kept:]], dim=1)
        places = place_tokens(
            self.layout,
            self._full_order(choice.order),
            mode,
            extra_rule=None if extra_BN is None else self.config.extra_token,
            centroid_B=self._centroid(extra_BN),
            grid=self.grid,
        )
        visual_BVD = torch.index_select(tokens_BVD, 1, places.slots_BV[0])
        return visual_BVD.float(), places.kept_BK, places.position_ids_AS

    def _features(self, patches_BNC: Tensor, values: list[Tensor]) -> VisionFeatures:
        """What came in, and what follows from it."""
        found = dict(zip(self.given, values, strict=True))
        needs = self.pruner.NEEDS
        if Feature.ATTENTION in needs:
            (found[Feature.ATTENTION],) = (
                found[feature] for feature in settle_needs(needs, found) if feature in found
            )
        by_embeddings = Feature.TEXT_PATCHES in needs and Feature.TEXT_PATCHES not in found
        if Feature.TOKENS in needs or by_embeddings:
            width = patches_BNC.shape[-1] // (1 + self.planes)
            found[Feature.TOKENS] = self.projector(patches_BNC[..., :width]).float()
        if by_embeddings:
            found[Feature.TEXT_PATCHES] = nn.functional.normalize(found[Feature.TOKENS], dim=-1)
        return VisionFeatures(
            patches_BNC=patches_BNC,
            geometry=self.geometry,
            values=found,
            text_sign=self.text_sign,
        )

    def _mix(self, patches_BNC: Tensor, choice: Kept, kept: int) -> tuple[Tensor, Tensor | None]:
        """Kept tokens and the extra one behind them [B, K+E, C], and the extra one's weights."""
        dtype = patches_BNC.dtype
        order = choice.order
        order_BK = torch.tensor([order]) if isinstance(order, tuple) else order
        if isinstance(order, tuple) and order == tuple(range(self.geometry.tokens)):
            return patches_BNC, None
        if choice.mix_BKN is None or kept == self.geometry.tokens:
            rows_BKC = torch.index_select(patches_BNC, 1, order_BK[0])
        else:
            rows_BKC = (choice.mix_BKN.float() @ patches_BNC.float()).to(dtype)
        if not self.layout.extra:
            return rows_BKC, None
        extra_BN = choice.extra_BN
        assert extra_BN is not None
        extra_B1C = extra_BN.float()[:, None] @ patches_BNC.float() / choice.extra_divisor
        extra_B1C = extra_B1C.to(dtype)
        return torch.cat([rows_BKC, extra_B1C], dim=1), extra_BN

    def _project(self, rows_BKC: Tensor, choice: Kept, features: VisionFeatures | None) -> Tensor:
        """Visual tokens; picked where all were projected for the pruner already."""
        ready = None if features is None else features.values.get(Feature.TOKENS)
        if ready is None or choice.mix_BKN is not None or self.layout.extra or self.planes:
            # Projecting after the choice spares the removed patches' work, and their planes'.
            tokens_BKD: Tensor = self.projector(rows_BKC)
            return tokens_BKD
        order = choice.order
        order_BK = torch.tensor([order]) if isinstance(order, tuple) else order
        return torch.index_select(ready, 1, order_BK[0]).to(rows_BKC.dtype)

    def _full_order(self, order: Tensor | tuple[int, ...]) -> Tensor | tuple[int, ...]:
        """The pruner's order as indices among all visual tokens, fixed ones last."""
        if not self.fixed:
            return order
        if isinstance(order, tuple):
            return (*(self.removable[index] for index in order), *self.fixed)
        full_BK = torch.tensor(self.removable)[order]
        return torch.cat([full_BK, torch.tensor([self.fixed])], dim=1)

    def _centroid(self, extra_BN: Tensor | None) -> Tensor | None:
        """Mean index of what the extra token is made of, weighted and rounded half up."""
        if extra_BN is None or self.config.extra_token != CENTROID:
            return None
        index_N = torch.tensor(self.removable, dtype=torch.float32)
        weights_BN = extra_BN.float()
        mean_B = (weights_BN * index_N).sum(dim=1) / weights_BN.sum(dim=1)
        return torch.floor(mean_B + 0.5).to(torch.int64)


def sort_features(features: frozenset[Feature]) -> list[Feature]:
    """Features in the order of their names."""
    return sorted(features, key=lambda feature: feature.value)
