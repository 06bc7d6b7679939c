"""Qwen3's vision tower as a graph, with the states that DeepStack takes from within.

Every block sees the whole picture. Patches lie token by token, the 2 x 2 of each one behind the
other; tokens are in raster order. A learned square grid of positions is stretched to the picture's
bilinearly, corner to corner. Parameter names are those of a checkpoint below `visual`.

References:
    Its technical report, arXiv:2511.21631; DeepStack, arXiv:2406.04334.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from gap_export.blocks.qwen_vision import (
    EPSILON,
    MERGE,
    STRIP,
    QwenBlock,
    QwenPatchEmbedding,
    order_patches,
    rotary_tables,
)
from gap_export.interfaces.features import Feature

# B batch (1), N patches, M visual tokens (N / 4), K of these, C width, D decoder width, S side of
# the learned grid, d head width, p planes.

_CORNERS: Final = 4
"""Points of the learned grid around a patch."""


class Qwen3Tower(nn.Module):
    """All blocks for pictures of one size; norms and products behind them are the mergers'."""

    def __init__(self, config: Any, grid: tuple[int, int], needs: frozenset[Feature]) -> None:
        """Declare the parameters.

        Args:
            config: The library's, of the tower.
            grid: Rows and columns of patches, both even.
            needs: By-products to compute.
        """
        super().__init__()
        self.config, self.grid, self.needs = config, grid, needs
        self.order = order_patches(grid, MERGE)
        self.stacked = frozenset(config.deepstack_visual_indexes)
        visual = nn.Module()
        visual.patch_embed = QwenPatchEmbedding(config, has_bias=True)
        visual.pos_embed = nn.Embedding(config.num_position_embeddings, config.hidden_size)
        visual.blocks = nn.ModuleList(
            QwenBlock(config, nn.LayerNorm, _Mlp(config)) for _ in range(config.depth)
        )
        self.visual = visual
        patches = grid[0] * grid[1]
        shape = (patches, config.hidden_size // config.num_heads // 2)
        self.register_buffer("cosine", torch.empty(shape), persistent=False)
        self.register_buffer("sine", torch.empty(shape), persistent=False)
        self.register_buffer("shares", torch.empty(patches, _CORNERS), persistent=False)

    cosine: Tensor
    sine: Tensor
    shares: Tensor

    def fill_constants(self) -> None:
        """Give values to the tables that no checkpoint holds."""
        self.cosine, self.sine = rotary_tables(self.config, self.order, self.grid[1])
        _, shares = self._corners
        self.shares = torch.tensor(shares)

    def forward(self, pixels: Tensor) -> tuple[Tensor, dict[Feature, Tensor]]:
        """Tokens [B, M, (1 + p) * 4 C] before the mergers, and the by-products asked for.

        Behind the last states of a token's patches lie their states behind the blocks that
        DeepStack names.
        """
        visual: Any = self.visual
        states_NC = torch.index_select(visual.patch_embed(pixels), 0, torch.tensor(self.order))
        states_NC = states_NC + self._find_positions().to(states_NC.dtype)
        planes, values = [], {}
        for k, block in enumerate(visual.blocks):
            if Feature.COLUMN_ATTENTION in self.needs and k == len(visual.blocks) - 1:
                score_N = block.attn.score_columns(block.norm1(states_NC), self.cosine, self.sine)
                values[Feature.COLUMN_ATTENTION] = score_N[None]
            states_NC = block(states_NC, self.cosine, self.sine)
            if k in self.stacked:
                planes.append(states_NC)
        tokens = [each.reshape(len(self.order) // STRIP, -1) for each in (states_NC, *planes)]
        return torch.cat(tokens, dim=1)[None], values

    def _find_positions(self) -> Tensor:
        """The learned grid at every patch, float32 [N, C]."""
        corners, _ = self._corners
        visual: Any = self.visual
        found_NC: Tensor | None = None
        for k in range(_CORNERS):
            corner_NC = functional.embedding(
                torch.tensor([each[k] for each in corners]), visual.pos_embed.weight
            )
            part_NC = corner_NC.float() * self.shares[:, k : k + 1]
            found_NC = part_NC if found_NC is None else found_NC + part_NC
        assert found_NC is not None
        return found_NC

    @cached_property
    def _corners(self) -> tuple[list[list[int]], list[list[float]]]:
        """For every patch the points of the learned grid around it, and their shares of it."""
        side = math.isqrt(self.config.num_position_embeddings)
        rows, columns = (_find_taps(count, side) for count in self.grid)
        corners, shares = [], []
        for place in self.order:
            around = [
                (row * side + column, down * across)
                for row, down in rows[place // self.grid[1]]
                for column, across in columns[place % self.grid[1]]
            ]
            corners.append([corner for corner, _ in around])
            shares.append([share for _, share in around])
        return corners, shares


class Qwen3Mergers(nn.Module):
    """What makes a visual token of four patches, and each of its planes."""

    def __init__(self, config: Any) -> None:
        """Declare the parameters."""
        super().__init__()
        stacked = config.deepstack_visual_indexes
        self.wide = STRIP * config.hidden_size
        # Planes are in the order of the blocks, mergers in that of the config.
        self.mergers = [list(stacked).index(k) for k in sorted(stacked)]
        visual = nn.Module()
        visual.merger = _Merger(config, is_shuffled=False)
        visual.deepstack_merger_list = nn.ModuleList(
            _Merger(config, is_shuffled=True) for _ in stacked
        )
        self.visual = visual

    def forward(self, patches_BKC: Tensor) -> Tensor:
        """Visual tokens [B, K, D] of tokens [B, K, 4 C], with as many planes as those have."""
        visual: Any = self.visual
        own, *planes = (
            torch.split(patches_BKC, self.wide, 2)
            if patches_BKC.shape[2] > self.wide
            else (patches_BKC,)
        )
        merged = [visual.merger(own)]
        for k, plane in zip(self.mergers, planes, strict=False):
            merged.append(visual.deepstack_merger_list[k](plane))
        return merged[0] if len(merged) == 1 else torch.cat(merged, dim=2)


class _Merger(nn.Module):
    """A norm and two linear layers; the norm is of patches, or of the token's four together."""

    def __init__(self, config: Any, *, is_shuffled: bool) -> None:
        super().__init__()
        wide = STRIP * config.hidden_size
        self.width = wide if is_shuffled else config.hidden_size
        self.norm = nn.LayerNorm(self.width, eps=EPSILON)
        self.linear_fc1 = nn.Linear(wide, wide)
        self.linear_fc2 = nn.Linear(wide, config.out_hidden_size)

    def forward(self, x_BKC: Tensor) -> Tensor:
        batch, tokens, wide = x_BKC.shape
        normed = self.norm(x_BKC.reshape(batch, -1, self.width)).reshape(batch, tokens, wide)
        output: Tensor = self.linear_fc2(functional.gelu(self.linear_fc1(normed)))
        return output


class _Mlp(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.linear_fc1 = nn.Linear(width, inner)
        self.linear_fc2 = nn.Linear(inner, width)

    def forward(self, x_NC: Tensor) -> Tensor:
        inner = functional.gelu(self.linear_fc1(x_NC), approximate="tanh")
        output: Tensor = self.linear_fc2(inner)
        return output


def _find_taps(count: int, side: int) -> list[list[tuple[int, float]]]:
    """For each of so many evenly spaced points the two of a side around it, with their shares."""
    taps = []
    for k in range(count):
        place = k * (side - 1) / max(count - 1, 1)
        low = math.floor(place)
        high = min(low + 1, side - 1)
        taps.append([(low, low + 1 - place), (high, place - low)])
    return taps
