"""A vision transformer with layer scale, whose square cells of patches make one visual token.

Parameter names are those of Hugging Face's checkpoints below `vision_tower`. The patches of a cell
lie behind one another, row by row, as the pixel shuffle in front of the projector puts them side
by side.

References:
    InternViT, arXiv:2504.10479; transformers 5.24.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from gap_export.blocks.scores import give_features
from gap_export.blocks.vit import Mlp, RmsNorm, attend_fully
from gap_export.interfaces.features import Feature

# B batch (1), V views, P patches of a view, T P + CLS, N tokens of all views, C width, H heads,
# d head width, c patches along a cell's side.

_HEAD_EPSILON: Final = 1e-6
_MERGES: Final = frozenset({Feature.MERGE_ATTENTION, Feature.MERGE_KEYS})


@dataclass(frozen=True, slots=True, kw_only=True)
class InternVitShape:
    """The sizes of the tower; `side` and `patch` in pixels, `cell` in patches along its side.

    `has_head_norms`: queries and keys are normed, all heads as one. `is_rms` says of which kind
    the norms of a block are. `is_normed`: the patches go through a last norm.
    """

    layers: int
    width: int
    heads: int
    mlp: int
    side: int
    patch: int
    cell: int
    epsilon: float
    activation: str
    has_bias: bool
    has_positions: bool
    has_head_norms: bool
    is_rms: bool
    is_normed: bool

    @property
    def grid(self) -> int:
        """Patches along a view's side."""
        return self.side // self.patch


class InternVitTower(nn.Module):
    """The tower up to the block whose output the projector takes, and its by-products."""

    def __init__(self, shape: InternVitShape, needs: frozenset[Feature], layer: int) -> None:
        """Declare the parameters that are used, and no more.

        Args:
            shape: Of the whole tower.
            needs: By-products to compute.
            layer: Index of the hidden state that is wanted; merging pruners look at the block
                after it.
        """
        super().__init__()
        merges = bool(needs & _MERGES) and layer < shape.layers
        self.vision_tower = _Model(shape, layer, merges=merges)
        self.shape, self.needs, self.depth = shape, needs, layer

    def forward(self, pixels: Tensor) -> tuple[Tensor, dict[Feature, Tensor]]:
        """Tokens of whole cells [B, N, C * c * c], and the by-products asked for."""
        tower, heads = self.vision_tower, self.shape.heads
        blocks = tower.encoder.layer
        states_VTC = tower.embeddings(pixels.flatten(0, -4))
        before_VTC = states_VTC
        for block in blocks[: self.depth]:
            before_VTC, states_VTC = states_VTC, block(states_VTC)
        if self.shape.is_normed:
            states_VTC = tower.layernorm(states_VTC)
        last = merging = blocks[self.depth - 1].project(before_VTC)
        if self.depth < len(blocks):
            merging = blocks[self.depth].project(states_VTC)
        values = give_features(self.needs, states_VTC, last, merging, heads)
        patches_BPC = self._arrange(states_VTC[:, 1:])
        return patches_BPC.reshape(1, -1, patches_BPC.shape[-1] * self.shape.cell**2), {
            feature: self._arrange(value) for feature, value in values.items()
        }

    def _arrange(self, value_VP: Tensor) -> Tensor:
        """[V, P, ...] to [B, V * P, ...], the patches of a cell one after another."""
        cell, cells, rest = self.shape.cell, self.shape.grid // self.shape.cell, value_VP.shape[2:]
        cut = value_VP.reshape(-1, cells, cell, cells, cell, *rest)
        return cut.transpose(2, 3).reshape(1, -1, *rest)


class _Model(nn.Module):
    def __init__(self, shape: InternVitShape, depth: int, *, merges: bool) -> None:
        super().__init__()
        self.embeddings = _Embeddings(shape)
        self.encoder = _Encoder(shape, depth, merges=merges)
        if shape.is_normed:
            self.layernorm = nn.LayerNorm(shape.width, eps=shape.epsilon)


class _Embeddings(nn.Module):
    def __init__(self, shape: InternVitShape) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, shape.width))
        self.patch_embeddings = _PatchEmbeddings(shape)
        self.position_embeddings: nn.Parameter | None = None
        if shape.has_positions:
            tokens = shape.grid**2 + 1
            self.position_embeddings = nn.Parameter(torch.empty(1, tokens, shape.width))

    def forward(self, pixels: Tensor) -> Tensor:
        patches_VPC = self.patch_embeddings(pixels)
        cls_V1C = self.cls_token.expand(patches_VPC.shape[0], -1, -1)
        states_VTC = torch.cat([cls_V1C, patches_VPC], dim=1)
        if self.position_embeddings is None:
            return states_VTC
        return states_VTC + self.position_embeddings


class _PatchEmbeddings(nn.Module):
    def __init__(self, shape: InternVitShape) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, shape.width, kernel_size=shape.patch, stride=shape.patch)

    def forward(self, pixels: Tensor) -> Tensor:
        grid = self.projection(pixels.to(self.projection.weight.dtype))
        patches_VPC: Tensor = grid.flatten(2).transpose(1, 2)
        return patches_VPC


class _Encoder(nn.Module):
    def __init__(self, shape: InternVitShape, depth: int, *, merges: bool) -> None:
        super().__init__()
        blocks = [_Block(shape) for _ in range(depth)]
        # Of the block after the patches only what makes queries and keys is run.
        self.layer: Any = nn.ModuleList([*blocks, *([_Scores(shape)] if merges else [])])


class _Scores(nn.Module):
    """The part of a block that makes queries and keys."""

    def __init__(self, shape: InternVitShape) -> None:
        super().__init__()
        self.attention = _Projections(shape)
        self.layernorm_before = _make_norm(shape)

    def project(self, x_VTC: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys [V, T, C] of the block's input."""
        return self.attention.project(self.layernorm_before(x_VTC))


class _Block(nn.Module):
    def __init__(self, shape: InternVitShape) -> None:
        super().__init__()
        self.attention = _Attention(shape)
        self.mlp = Mlp(shape.width, shape.mlp, ACT2FN[shape.activation])
        self.layernorm_before = _make_norm(shape)
        self.layernorm_after = _make_norm(shape)
        self.lambda_1 = nn.Parameter(torch.empty(shape.width))
        self.lambda_2 = nn.Parameter(torch.empty(shape.width))

    def project(self, x_VTC: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys [V, T, C] of the block's input."""
        return self.attention.project(self.layernorm_before(x_VTC))

    def forward(self, x_VTC: Tensor) -> Tensor:
        x_VTC = x_VTC + self.lambda_1 * self.attention(self.layernorm_before(x_VTC))
        output: Tensor = x_VTC + self.lambda_2 * self.mlp(self.layernorm_after(x_VTC))
        return output


class _Projections(nn.Module):
    def __init__(self, shape: InternVitShape) -> None:
        super().__init__()
        self.q_proj = nn.Linear(shape.width, shape.width, bias=shape.has_bias)
        self.k_proj = nn.Linear(shape.width, shape.width, bias=shape.has_bias)
        self.has_head_norms = shape.has_head_norms
        if shape.has_head_norms:
            self.q_norm = RmsNorm(shape.width, _HEAD_EPSILON)
            self.k_norm = RmsNorm(shape.width, _HEAD_EPSILON)

    def project(self, x_VTC: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys [V, T, C]."""
        query_VTC, key_VTC = self.q_proj(x_VTC), self.k_proj(x_VTC)
        if not self.has_head_norms:
            return query_VTC, key_VTC
        return self.q_norm(query_VTC), self.k_norm(key_VTC)


class _Attention(_Projections):
    def __init__(self, shape: InternVitShape) -> None:
        super().__init__(shape)
        self.heads = shape.heads
        self.v_proj = nn.Linear(shape.width, shape.width, bias=shape.has_bias)
        self.projection_layer = nn.Linear(shape.width, shape.width)

    def forward(self, x_VTC: Tensor) -> Tensor:
        query_VTC, key_VTC = self.project(x_VTC)
        mixed_VTC = attend_fully(query_VTC, key_VTC, self.v_proj(x_VTC), self.heads)
        output: Tensor = self.projection_layer(mixed_VTC)
        return output


def _make_norm(shape: InternVitShape) -> nn.Module:
    if shape.is_rms:
        return RmsNorm(shape.width, shape.epsilon)
    return nn.LayerNorm(shape.width, eps=shape.epsilon)
