"""SigLIP's tower, Hugging Face's own module, with the projector and the packing behind it.

There is no CLS token: every token of a view is a patch. The projector comes before the packing, as
a mosaic that is shrunk is a mean of projected patches; scores are shrunk like them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from gap_export.blocks.scores import column_attention, mean_keys
from gap_export.checkpoint.sources import expected_shapes
from gap_export.interfaces.features import Feature

# B batch (1), V views, P patches of a view, N removable tokens, M of them in the mosaic, R its
# patches before it is shrunk, C vision width, D decoder width.

UNUSED: Final = (r"post_layernorm\.", r"vision_tower\.(vision_model\.)?head\.")
"""Patterns of keys behind the blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How patches of all views, one view after another, become the removable tokens.

    The first `whole` of them stay; then come those of `mosaic` (indices), a grid of `cut` (rows,
    columns) that is shrunk bilinearly to `left`.
    """

    whole: int
    mosaic: tuple[int, ...]
    cut: tuple[int, int]
    left: tuple[int, int]


class SiglipTower(nn.Module):
    """The tower up to the block whose output is projected, the projector, and by-products."""

    def __init__(
        self,
        config: SiglipVisionConfig,
        layer: int,
        needs: frozenset[Feature],
        *,
        projector: nn.Module,
        packing: Packing,
    ) -> None:
        """Declare the used blocks, and no parameter that is not used.

        Args:
            config: Of the whole tower.
            layer: Index of the hidden state that is wanted.
            needs: By-products to compute.
            projector: Its parameters lie under `multi_modal_projector`.
            packing: Of the bucket.
        """
        super().__init__()
        self.vision_tower: Any = _make_tower(config, layer)
        self.multi_modal_projector = projector
        self.needs, self.packing, self.heads = needs, packing, config.num_attention_heads

    def fill_constants(self) -> None:
        """Give a value to the position indices, which no checkpoint holds."""
        embeddings = self.vision_tower.embeddings
        embeddings.position_ids = torch.arange(embeddings.num_positions)[None]

    def forward(self, pixels: Tensor) -> tuple[Tensor, dict[Feature, Tensor]]:
        """Visual tokens [B, N, D], and the by-products asked for."""
        tower = self.vision_tower
        states_VPC = tower.embeddings(pixels.flatten(0, -4))
        before_VPC = states_VPC
        for block in tower.encoder.layers:
            before_VPC, states_VPC = states_VPC, block(states_VPC, None)
        values: dict[Feature, Tensor] = {}
        if self.needs:
            last = tower.encoder.layers[-1]
            normed = last.layer_norm1(before_VPC)
            # The same products as inside the block, which then stand in the graph once.
            key = last.self_attn.k_proj(normed)
            if Feature.COLUMN_ATTENTION in self.needs:
                query = last.self_attn.q_proj(normed)
                values[Feature.COLUMN_ATTENTION] = column_attention(
                    query, key, self.heads, leading=0
                )
            if Feature.KEYS in self.needs:
                values[Feature.KEYS] = mean_keys(key, self.heads, leading=0)
        tokens_VPD = self.multi_modal_projector(states_VPC)
        return self._pack(tokens_VPD), {
            feature: self._pack(value) for feature, value in values.items()
        }

    def _pack(self, value_VP: Tensor) -> Tensor:
        """[V, P, ...] to [B, N, ...]."""
        packing, flat = self.packing, value_VP.flatten(0, 1)
        mosaic_R = torch.index_select(flat, 0, torch.tensor(packing.mosaic))
        if packing.left != packing.cut:
            mosaic_R = _shrink(mosaic_R, packing)
        return torch.cat([flat[: packing.whole], mosaic_R])[None]


def _shrink(mosaic_R: Tensor, packing: Packing) -> Tensor:
    """[R, ...] to [M, ...]: rows, then columns, each as a product with a constant."""
    (rows, columns), (less_rows, less_columns) = packing.cut, packing.left
    down = torch.tensor(_weigh(rows, less_rows), dtype=torch.float32)
    across = torch.tensor(_weigh(columns, less_columns), dtype=torch.float32)
    fewer = down @ mosaic_R.float().reshape(rows, -1)
    small = across @ fewer.reshape(less_rows, columns, -1)
    return small.reshape(-1, *mosaic_R.shape[1:]).to(mosaic_R.dtype)


def _weigh(size: int, less: int) -> list[list[float]]:
    """Weights [less, size] of bilinear shrinking, with pixels as areas and no smoothing."""
    table = []
    for k in range(less):
        place = max((k + 0.5) * size / less - 0.5, 0.0)
        first, row = int(place), [0.0] * size
        row[first] += 1.0 - (place - first)
        row[min(first + 1, size - 1)] += place - first
        table.append(row)
    return table


class _Siglip(SiglipVisionModel):  # type: ignore[misc]  # the library gives it no type
    """The library's tower, whose parameters may have no values when it is made."""

    def _init_weights(self, module: nn.Module) -> None:
        del module


def _make_tower(config: SiglipVisionConfig, layers: int) -> nn.Module:
    """The first blocks, without what comes behind the last one."""
    used = copy.deepcopy(config)
    used.num_hidden_layers, used.vision_use_head = layers, False
    used._attn_implementation = "sdpa"  # noqa: SLF001 - the library's own switch
    tower = _Siglip(used)
    del tower.post_layernorm
    return tower


class _Tower(nn.Module):
    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__()
        self.vision_tower = _make_tower(config, config.num_hidden_layers)


def tower_shapes(config: SiglipVisionConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of a whole tower's blocks."""
    return expected_shapes(lambda: _Tower(config))
