"""CLIP's vision tower, Hugging Face's own module, run as far as its features are needed."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from gap_export.errors import CheckpointError
from gap_export.features import Feature

# B batch (1), N patches, C vision width, H heads, d head width.


class ClipTower(nn.Module):
    """The tower up to the block whose output the projector takes, and its by-products."""

    def __init__(self, config: CLIPVisionConfig, layer: int, needs: frozenset[Feature]) -> None:
        """Declare the used blocks.

        Args:
            config: Of the whole tower.
            layer: Index of the hidden state that is wanted, as in `resolve_layer`.
            needs: By-products to compute.
        """
        super().__init__()
        used = copy.deepcopy(config)
        used.num_hidden_layers = layer
        used._attn_implementation = "sdpa"  # noqa: SLF001 - the library's own switch
        self.vision_tower = CLIPVisionModel(used)
        self.needs = needs

    def fill_constants(self) -> None:
        """Give a value to the position indices, which no checkpoint holds."""
        embeddings = self.vision_tower.embeddings
        embeddings.position_ids = torch.arange(embeddings.num_positions)[None]

    def forward(self, pixels: Tensor) -> tuple[Tensor, dict[Feature, Tensor]]:
        """Patch features [B, N, C] without CLS, and the by-products asked for."""
        tower = self.vision_tower
        hidden = tower.pre_layrnorm(tower.embeddings(pixels))
        block_input = hidden
        for block in tower.encoder.layers:
            block_input, hidden = hidden, block(hidden, None)
        extras = {}
        if Feature.CLS_ATTENTION in self.needs:
            extras[Feature.CLS_ATTENTION] = cls_attention(tower.encoder.layers[-1], block_input)
        return hidden[:, 1:], extras


def cls_attention(block: Any, hidden_BTC: Tensor) -> Tensor:
    """[B, N] float32: a block's attention from CLS to each patch, mean over heads.

    One row of the attention map is computed here; the block itself runs fused.
    """
    attention = block.self_attn
    normed = block.layer_norm1(hidden_BTC)
    heads = (attention.num_heads, attention.head_dim)
    query_BHd = attention.q_proj(normed[:, 0]).unflatten(-1, heads).float()
    key_BTHd = attention.k_proj(normed).unflatten(-1, heads).float()
    logits_BHT = (key_BTHd.permute(0, 2, 1, 3) @ query_BHd[..., None])[..., 0] * attention.scale
    weights_BHT = torch.softmax(logits_BHT, dim=-1)
    scores_BN: Tensor = weights_BHT.mean(dim=1)[:, 1:]
    return scores_BN


def resolve_layer(config: CLIPVisionConfig, layer: int, where: str) -> int:
    """Index of a hidden state counted from 0 (the embeddings), from a possibly negative one.

    Raises:
        CheckpointError: There is no such hidden state, or no block before it.
    """
    states = config.num_hidden_layers + 1
    index = layer + states if layer < 0 else layer
    if not 1 <= index < states:
        raise CheckpointError(
            f"{where}: vision_feature_layer {layer}, expected one of the {states - 1} blocks"
        )
    return index
