"""Qwen2.5-VL's vision tower as a graph: windows in most blocks, full attention in a few.

Patches lie window by window while the blocks run, and the 2 x 2 that make one visual token lie one
behind the other; the order is undone before anything is scored or kept. Where both sides of the
picture are multiples of a window's, all windows are equal, and attention within them is attention
of a batch. Parameter names are those of a Hugging Face checkpoint below `visual`.

References:
    Qwen2.5-VL Technical Report, arXiv:2502.13923.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from gap_export.blocks.vit import RmsNorm
from gap_export.interfaces.features import Feature

# B batch (1), N patches, M visual tokens (N / 4), W windows, n patches of a window, C width,
# D decoder width, H heads, d head width.

MERGE: Final = 2
"""Patches to a side of a visual token."""
STRIP: Final = MERGE * MERGE
EPSILON: Final = 1e-6
_FRAMES: Final = 2
"""A still picture stands twice, as patches span two frames."""


class QwenTower(nn.Module):
    """All blocks for pictures of one size; the norm behind them is the merger's."""

    def __init__(self, config: Any, grid: tuple[int, int], needs: frozenset[Feature]) -> None:
        """Declare the parameters.

        Args:
            config: The library's, of the tower.
            grid: Rows and columns of patches, multiples of a window's.
            needs: By-products to compute.
        """
        super().__init__()
        side = config.window_size // config.patch_size
        self.config, self.grid, self.needs = config, grid, needs
        self.order = order_patches(grid, side)
        windows = grid[0] * grid[1] // side**2
        full = set(config.fullatt_block_indexes)
        self.scored = find_scored_block(config)
        self.visual = nn.Module()
        self.visual.patch_embed = QwenPatchEmbedding(config, has_bias=False)
        self.visual.blocks = nn.ModuleList(
            QwenBlock(config, RmsNorm, _Mlp(config), 1 if k in full else windows)
            for k in range(config.depth)
        )
        shape = (grid[0] * grid[1], config.hidden_size // config.num_heads // 2)
        self.register_buffer("cosine", torch.empty(shape), persistent=False)
        self.register_buffer("sine", torch.empty(shape), persistent=False)

    cosine: Tensor
    sine: Tensor

    def fill_constants(self) -> None:
        """Give values to the cosines and sines of every patch, which no checkpoint holds."""
        self.cosine, self.sine = rotary_tables(self.config, self.order, self.grid[1])

    def forward(self, pixels: Tensor) -> tuple[Tensor, dict[Feature, Tensor]]:
        """Tokens before the merger [B, M, 4 C] in raster order, and the by-products asked for."""
        visual: Any = self.visual
        back_M = torch.tensor(undo_order(self.order, self.grid))
        states_NC = torch.index_select(visual.patch_embed(pixels), 0, torch.tensor(self.order))
        values = {}
        for k, block in enumerate(visual.blocks):
            if Feature.COLUMN_ATTENTION in self.needs and k == self.scored:
                score_N = block.attn.score_columns(block.norm1(states_NC), self.cosine, self.sine)
                score_M4 = torch.index_select(score_N.reshape(-1, STRIP), 0, back_M)
                values[Feature.COLUMN_ATTENTION] = score_M4.reshape(1, -1)
            states_NC = block(states_NC, self.cosine, self.sine)
        tokens_MC = states_NC.reshape(len(self.order) // STRIP, -1)
        return torch.index_select(tokens_MC, 0, back_M)[None], values


class QwenMerger(nn.Module):
    """What makes a visual token of four patches: their norm and two linear layers."""

    def __init__(self, config: Any) -> None:
        """Declare the parameters."""
        super().__init__()
        wide = config.hidden_size * STRIP
        merger = nn.Module()
        merger.ln_q = RmsNorm(config.hidden_size, EPSILON)
        merger.mlp = nn.Sequential(
            nn.Linear(wide, wide), nn.GELU(), nn.Linear(wide, config.out_hidden_size)
        )
        self.visual = nn.Module()
        self.visual.merger = merger
        self.width = config.hidden_size

    def forward(self, patches_BKC: Tensor) -> Tensor:
        """Visual tokens [B, K, D] of tokens [B, K, 4 C]."""
        merger: Any = self.visual.merger
        batch, tokens, wide = patches_BKC.shape
        normed = merger.ln_q(patches_BKC.reshape(batch, tokens, STRIP, self.width))
        output_BKD: Tensor = merger.mlp(normed.reshape(batch, tokens, wide))
        return output_BKD


def order_patches(grid: tuple[int, int], window: int) -> tuple[int, ...]:
    """Patches in the order of the blocks, as places in the raster.

    Window by window, in each token by token, in each of those its 2 x 2 patches, all by rows.

    Args:
        grid: Rows and columns of patches.
        window: Patches to a side of a window.
    """
    rows, columns = grid
    tokens = window // MERGE
    return tuple(
        (top + MERGE * y + dy) * columns + left + MERGE * x + dx
        for top in range(0, rows, window)
        for left in range(0, columns, window)
        for y in range(tokens)
        for x in range(tokens)
        for dy in range(MERGE)
        for dx in range(MERGE)
    )


def undo_order(order: tuple[int, ...], grid: tuple[int, int]) -> list[int]:
    """Where each visual token of the raster lies in the order of the blocks."""
    columns = grid[1]
    places = [
        first // columns // MERGE * (columns // MERGE) + first % columns // MERGE
        for first in order[::STRIP]
    ]
    back = [0] * len(places)
    for k, place in enumerate(places):
        back[place] = k
    return back


def find_scored_block(config: Any) -> int | None:
    """Number of the block whose attention scores patches: the last that sees the whole picture."""
    return max((k for k in config.fullatt_block_indexes if k < config.depth), default=None)


def rotary_tables(config: Any, order: tuple[int, ...], columns: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of patches by row and column, float32 [N, d / 2].

    Args:
        config: The library's, of the tower.
        order: Places of the patches in the raster.
        columns: Of the raster.
    """
    width = config.hidden_size // config.num_heads // 2
    base = config.rope_parameters["rope_theta"]
    frequency = 1.0 / (base ** (torch.arange(0, width, 2, dtype=torch.float) / width))
    place_N = torch.tensor(order)
    row_N, column_N = place_N // columns, place_N % columns
    angle_Nd = torch.cat([row_N[:, None] * frequency, column_N[:, None] * frequency], dim=1)
    return angle_Nd.cos(), angle_Nd.sin()


class QwenPatchEmbedding(nn.Module):
    """A convolution whose steps are as wide as its kernel: one product for every patch."""

    def __init__(self, config: Any, *, has_bias: bool) -> None:
        """Declare the parameters."""
        super().__init__()
        size = (_FRAMES, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(3, config.hidden_size, kernel_size=size, stride=size, bias=has_bias)

    def forward(self, pixels: Tensor) -> Tensor:
        """Patches [N, C] in raster order of pixels [1, 3, height, width]."""
        weight = self.proj.weight
        side = weight.shape[-1]
        rows, columns = pixels.shape[-2] // side, pixels.shape[-1] // side
        cut = pixels.to(weight.dtype).reshape(3, rows, side, columns, side)
        frame = cut.permute(1, 3, 0, 2, 4).reshape(rows * columns, 3, 1, side, side)
        both_NP = torch.cat([frame] * _FRAMES, dim=2).flatten(1)
        return functional.linear(both_NP, weight.flatten(1), self.proj.bias)


class QwenBlock(nn.Module):
    """One block; attention within `windows` equal runs of patches."""

    def __init__(
        self,
        config: Any,
        norm: Callable[[int, float], nn.Module],
        mlp: nn.Module,
        windows: int = 1,
    ) -> None:
        """Declare the parameters.

        Args:
            config: The library's, of the tower.
            norm: Makes one, of a width and an epsilon.
            mlp: What comes behind the attention.
            windows: How many.
        """
        super().__init__()
        self.norm1 = norm(config.hidden_size, EPSILON)
        self.norm2 = norm(config.hidden_size, EPSILON)
        self.attn = QwenAttention(config, windows)
        self.mlp = mlp

    def forward(self, x_NC: Tensor, cosine_Nd: Tensor, sine_Nd: Tensor) -> Tensor:
        """Patches [N, C] to the same shape."""
        x_NC = x_NC + self.attn(self.norm1(x_NC), cosine_Nd, sine_Nd)
        output: Tensor = x_NC + self.mlp(self.norm2(x_NC))
        return output


class QwenAttention(nn.Module):
    """Attention of patches that are turned by row and column, within equal windows of them."""

    def __init__(self, config: Any, windows: int = 1) -> None:
        """Declare the parameters."""
        super().__init__()
        self.heads, self.windows = config.num_heads, windows
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x_NC: Tensor, cosine_Nd: Tensor, sine_Nd: Tensor) -> Tensor:
        """What patches take of those of their window [N, C]."""
        patches, width = x_NC.shape
        parts = self._project(x_NC, cosine_Nd, sine_Nd)
        query_WHnd, key_WHnd, value_WHnd = (
            each.reshape(self.windows, patches // self.windows, self.heads, -1).transpose(1, 2)
            for each in parts
        )
        mixed_WHnd = functional.scaled_dot_product_attention(query_WHnd, key_WHnd, value_WHnd)
        output: Tensor = self.proj(mixed_WHnd.transpose(1, 2).reshape(patches, width))
        return output

    def score_columns(self, x_NC: Tensor, cosine_Nd: Tensor, sine_Nd: Tensor) -> Tensor:
        """Attention that each patch receives [N], float32, mean over heads and over all patches.

        Head by head, as the map of all heads would take gigabytes.
        """
        query_NHd, key_NHd, _ = self._project(x_NC, cosine_Nd, sine_Nd)
        scale = query_NHd.shape[-1] ** -0.5
        columns = []
        for head in range(self.heads):
            query_Nd, key_Nd = query_NHd[:, head].float(), key_NHd[:, head].float()
            weights_NN = torch.softmax(query_Nd @ key_Nd.transpose(0, 1) * scale, dim=-1)
            columns.append(weights_NN.mean(dim=0))
        return torch.stack(columns).mean(dim=0)

    def _project(
        self, x_NC: Tensor, cosine_Nd: Tensor, sine_Nd: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Turned queries and keys, and values, [N, H, d]."""
        patches, width = x_NC.shape
        query, key, value = self.qkv(x_NC).split(width, dim=1)
        query_NHd, key_NHd = (self._rotate(each, cosine_Nd, sine_Nd) for each in (query, key))
        return query_NHd, key_NHd, value.reshape(patches, self.heads, -1)

    def _rotate(self, x_NC: Tensor, cosine_Nd: Tensor, sine_Nd: Tensor) -> Tensor:
        """Rotary embedding by row and column, in float32."""
        wide_NHd = x_NC.reshape(x_NC.shape[0], self.heads, -1).float()
        half = wide_NHd.shape[-1] // 2
        first, second = wide_NHd[..., :half], wide_NHd[..., half:]
        cosine, sine = cosine_Nd[:, None], sine_Nd[:, None]
        turned = (first * cosine - second * sine, second * cosine + first * sine)
        return torch.cat(turned, dim=-1).to(x_NC.dtype)


class _Mlp(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, inner)
        self.up_proj = nn.Linear(width, inner)
        self.down_proj = nn.Linear(inner, width)

    def forward(self, x_NC: Tensor) -> Tensor:
        output: Tensor = self.down_proj(functional.silu(self.gate_proj(x_NC)) * self.up_proj(x_NC))
        return output
