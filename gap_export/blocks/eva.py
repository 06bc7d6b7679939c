"""EVA-CLIP's vision tower as LAVIS stores it, run on pictures larger than it was trained on.

Parameter names are those of the file below `visual_encoder`. Its fused projection has biases for
queries and values only; here it has one bias with zeros between (see
`gap_export.checkpoint.sources`).

References:
    EVA: Exploring the Limits of Masked Visual Representation Learning, arXiv:2211.07636.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from gap_export.blocks.scores import give_features
from gap_export.blocks.vit import Mlp, attend_fully
from gap_export.interfaces.features import Feature

# B batch (1), P patches, T P + CLS, C width, H heads, d head width.

BLOCK_EPSILON: Final = 1e-6
OUTPUT_EPSILON: Final = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaShape:
    """The sizes of the tower; `side` and `patch` in pixels."""

    layers: int
    width: int
    heads: int
    mlp: int
    side: int
    patch: int

    @property
    def patches(self) -> int:
        """Patches of a picture."""
        return (self.side // self.patch) ** 2


class EvaTower(nn.Module):
    """All blocks and the norm behind them; `strip` neighbouring patches make one token."""

    def __init__(self, shape: EvaShape, strip: int, needs: frozenset[Feature]) -> None:
        """Declare the parameters."""
        super().__init__()
        self.visual_encoder = _Encoder(shape)
        self.ln_vision = nn.LayerNorm(shape.width, eps=OUTPUT_EPSILON)
        self.heads, self.strip, self.needs = shape.heads, strip, needs

    def forward(self, pixels: Tensor) -> tuple[Tensor, dict[Feature, Tensor]]:
        """Tokens of whole strips [B, P / strip, C * strip], and the by-products asked for."""
        encoder = self.visual_encoder
        patches_BPC = encoder.patch_embed(pixels)
        states_BTC = torch.cat([encoder.cls_token, patches_BPC], dim=1) + encoder.pos_embed
        before_BTC = states_BTC
        for block in encoder.blocks:
            before_BTC, states_BTC = states_BTC, block(states_BTC)
        states_BTC = self.ln_vision(states_BTC)
        query_BTC, key_BTC, _ = encoder.blocks[-1].project(before_BTC)
        last = query_BTC, key_BTC
        values = give_features(self.needs, states_BTC, last, last, self.heads)
        batch, tokens, width = states_BTC[:, 1:].shape
        strips = states_BTC[:, 1:].reshape(batch, tokens // self.strip, width * self.strip)
        return strips, values


class _Encoder(nn.Module):
    def __init__(self, shape: EvaShape) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, shape.width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + shape.patches, shape.width))
        self.patch_embed = _PatchEmbedding(shape)
        self.blocks: Any = nn.ModuleList(_Block(shape) for _ in range(shape.layers))


class _PatchEmbedding(nn.Module):
    def __init__(self, shape: EvaShape) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, shape.width, kernel_size=shape.patch, stride=shape.patch)

    def forward(self, pixels: Tensor) -> Tensor:
        grid = self.proj(pixels.to(self.proj.weight.dtype))
        patches_BPC: Tensor = grid.flatten(2).transpose(1, 2)
        return patches_BPC


class _Block(nn.Module):
    def __init__(self, shape: EvaShape) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(shape.width, eps=BLOCK_EPSILON)
        self.attn = _Attention(shape)
        self.norm2 = nn.LayerNorm(shape.width, eps=BLOCK_EPSILON)
        self.mlp = Mlp(shape.width, shape.mlp, functional.gelu)

    def project(self, x_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, T, C] of the block's input."""
        return self.attn.project(self.norm1(x_BTC))

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTC = x_BTC + self.attn(self.norm1(x_BTC))
        output: Tensor = x_BTC + self.mlp(self.norm2(x_BTC))
        return output


class _Attention(nn.Module):
    def __init__(self, shape: EvaShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.proj = nn.Linear(shape.width, shape.width)

    def project(self, x_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, T, C]."""
        fused_BTC = self.qkv(x_BTC)
        width = fused_BTC.shape[-1] // 3
        return (
            fused_BTC[..., :width],
            fused_BTC[..., width : 2 * width],
            fused_BTC[..., 2 * width :],
        )

    def forward(self, x_BTC: Tensor) -> Tensor:
        output: Tensor = self.proj(attend_fully(*self.project(x_BTC), self.heads))
        return output
