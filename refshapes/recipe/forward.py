"""The forward pass of the training, which computes nothing twice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from recipe.base import EPSILON, HEAD_DIM
from recipe.sizes import HEADS


def see(tower: nn.Module, patches: Tensor) -> tuple[Tensor, Tensor]:
    """The tower's hidden state -2 [B, 1 + N, C], and the attention of CLS there [B, N].

    The last block, which nothing reads, is left out.
    """
    kernel = tower.embeddings.patch_embedding.weight
    hidden = functional.linear(patches, kernel.flatten(1))
    begin = tower.embeddings.class_embedding.expand(len(patches), 1, -1)
    hidden = tower.pre_layrnorm(torch.cat([begin, hidden], dim=1))
    blocks = tower.encoder.layers[:-1]
    attention = hidden
    for block in blocks:
        inner = block.self_attn
        normed = block.layer_norm1(hidden)
        query, key, value = (
            project(normed).unflatten(-1, (inner.num_heads, -1)).transpose(1, 2)
            for project in (inner.q_proj, inner.k_proj, inner.v_proj)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value)
        hidden = hidden + inner.out_proj(mixed.transpose(1, 2).flatten(2))
        wide = block.mlp.fc1(block.layer_norm2(hidden))
        hidden = hidden + block.mlp.fc2(wide * torch.sigmoid(1.702 * wide))
        attention = (key @ query[:, :, 0, :, None])[..., 0] * query.shape[-1] ** -0.5
    return hidden, attention.softmax(dim=-1).mean(dim=1)[:, 1:]


class Hidden:
    """Which patches a head of one layer does not see: a draw for every picture and head."""

    def __init__(self, pictures: int, patches: int, most: float) -> None:
        self.share = torch.rand(pictures, HEADS, 1, 1) * most
        self.patches = patches

    def __call__(self, total: int) -> Tensor:
        """True where hidden, [B, H, 1, S]; the text before the picture never is."""
        drawn = torch.rand(*self.share.shape[:2], 1, self.patches) < self.share
        return functional.pad(drawn, (total - self.patches, 0))


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [..., L, d]; cos and sin [L, d / 2]."""
    first, second = states.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def norm(states: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm as Llama's."""
    return functional.rms_norm(states, (states.shape[-1],), weight, EPSILON)


def think(
    layers: nn.ModuleList,
    seen: Tensor,
    said: Tensor,
    frequencies: Tensor,
    dropout: float = 0.0,
    hidden: Hidden | None = None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Llama's layers over pictures and the questions behind each, every question by itself.

    Args:
        layers: Of the language model.
        seen: Embeddings before and of the picture, [B, S, D], at positions from 0.
        said: Embeddings of the questions, [B, Q, T, D], each at positions from S.
        frequencies: Of the rotary pairs, [d / 2].
        dropout: Of the attention.
        hidden: Which patches each head does not see.

    Returns:
        The states after each layer, of pictures and of questions, and the attention of each
        layer's first head from the questions to the picture, [B, Q, T, S]. The last layer's
        states of pictures, which nothing reads, are left out.
    """
    start = seen.shape[1]
    _, questions, slots, _ = said.shape
    angles = torch.arange(start + slots)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    cos_seen, sin_seen, cos_said, sin_said = cos[:start], sin[:start], cos[start:], sin[start:]
    later = torch.full((slots, slots), float("-inf")).triu(1)
    own = torch.eye(start, dtype=torch.bool)
    causal = torch.ones(start, start, dtype=torch.bool).tril()
    scale = HEAD_DIM**-0.5
    all_seen, all_said, all_focus = [], [], []
    for index, layer in enumerate(layers):
        attend, mlp = layer.self_attn, layer.mlp
        packed = torch.cat([attend.q_proj.weight, attend.k_proj.weight, attend.v_proj.weight])
        gates = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])

        def heads(states: Tensor, weight: Tensor = packed, of: Any = layer) -> list[Tensor]:
            """Queries, keys and values [..., H, L, d]."""
            normed = norm(states, of.input_layernorm.weight)
            out = functional.linear(normed, weight).unflatten(-1, (3, HEADS, HEAD_DIM))
            return list(out.movedim(-3, 0).transpose(-2, -3).unbind(0))

        def finish(
            states: Tensor, mixed: Tensor, weight: Tensor = gates, of: Any = layer
        ) -> Tensor:
            """Add the attention's output and the MLP's."""
            states = states + of.self_attn.o_proj(mixed.transpose(-2, -3).flatten(-2))
            normed = norm(states, of.post_attention_layernorm.weight)
            gate, up = functional.linear(normed, weight).chunk(2, dim=-1)
            return states + of.mlp.down_proj(functional.silu(gate) * up)

        query, key, value = heads(seen)
        key = rotate(key, cos_seen, sin_seen)
        asked, own_key, own_value = heads(said)
        asked = rotate(asked, cos_said, sin_said) * scale
        own_key = rotate(own_key, cos_said, sin_said)
        # All questions of a picture against it at once: [B, H, Q * T, S].
        flat = asked.transpose(1, 2).flatten(2, 3)
        outside = flat @ key.transpose(-1, -2)
        unseen = None if hidden is None else hidden(start)
        if unseen is not None:
            outside = outside.masked_fill(unseen, float("-inf"))
        inside = (asked @ own_key.transpose(-1, -2) + later).transpose(1, 2).flatten(2, 3)
        weights = torch.cat([outside, inside], dim=-1).softmax(dim=-1)
        all_focus.append(weights[:, 0, :, :start].unflatten(1, (questions, slots)))
        if dropout:
            weights = functional.dropout(weights, dropout)
        outside, inside = weights.split([start, slots], dim=-1)
        inside = inside.unflatten(2, (questions, slots)).transpose(1, 2)
        mixed = (outside @ value).unflatten(2, (questions, slots)).transpose(1, 2)
        said = finish(said, mixed + inside @ own_value)
        all_said.append(said)
        if index < len(layers) - 1:
            query = rotate(query, cos_seen, sin_seen)
            # A patch always sees itself.
            mask = None if unseen is None else (~unseen | own) & causal
            mixed = functional.scaled_dot_product_attention(
                query, key, value, mask, is_causal=mask is None, dropout_p=dropout
            )
            seen = finish(seen, mixed)
            all_seen.append(seen)
    return all_seen, all_said, all_focus
