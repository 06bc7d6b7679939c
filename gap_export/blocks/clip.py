"""CLIP's towers, Hugging Face's own modules, run as far as their features are needed."""

from __future__ import annotations

import copy
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
)

from gap_export.blocks.hf_config import parse_config, require_clip_tower
from gap_export.blocks.scores import (
    cls_attention,
    cls_features,
    cls_similarity,
    column_attention,
    mean_keys,
    merge_attention,
)
from gap_export.checkpoint.index import Checkpoint
from gap_export.checkpoint.sources import TensorSource, expected_shapes, match_tensors, stored
from gap_export.config.families import NO_WAY
from gap_export.errors import CheckpointError
from gap_export.interfaces.family import ModelSpec, TextSpec
from gap_export.interfaces.features import Feature

# B batch (1), V views (1 but for tiles), N patches of all views, P patches of one, T P + CLS,
# C vision width, W text width, L text tokens.

_CLIP_NAMES: Final = {
    "vision_model.": "vision_tower.",
    "text_model.": "text.text_model.",
    "text_projection.": "text.text_projection.",
}


class ClipTower(nn.Module):
    """The tower up to the block whose output the projector takes, and its by-products."""

    def __init__(
        self,
        config: CLIPVisionConfig,
        layer: int,
        needs: frozenset[Feature],
        *,
        arrange: tuple[int, ...] | None = None,
        text_width: int | None = None,
    ) -> None:
        """Declare the used blocks, and no parameter that is not used.

        Args:
            config: Of the whole tower.
            layer: Index of the hidden state that is wanted, as in `resolve_layer`.
            needs: By-products to compute.
            arrange: Which patches, of all views one after another, to give and in which order.
            text_width: Of CLIP's text features, where TEXT_PATCHES are needed.
        """
        super().__init__()
        used = copy.deepcopy(config)
        merges = bool(needs & {Feature.MERGE_ATTENTION, Feature.MERGE_KEYS})
        # Of the block after the patches only the norm and two projections are run.
        used.num_hidden_layers = layer + (merges and layer < config.num_hidden_layers)
        used._attn_implementation = "sdpa"  # noqa: SLF001 - the library's own switch
        self.vision_tower = CLIPVisionModel(used)
        self.depth, self.needs = layer, needs
        self.order = arrange
        for block in self.vision_tower.encoder.layers[layer:]:
            del block.layer_norm2, block.mlp, block.self_attn.v_proj, block.self_attn.out_proj
        if Feature.TEXT_PATCHES in needs:
            assert text_width is not None
            self.visual_projection = nn.Linear(config.hidden_size, text_width, bias=False)
        else:
            del self.vision_tower.post_layernorm

    def fill_constants(self) -> None:
        """Give a value to the position indices, which no checkpoint holds."""
        embeddings = self.vision_tower.embeddings
        embeddings.position_ids = torch.arange(embeddings.num_positions)[None]

    def forward(self, pixels: Tensor) -> tuple[Tensor, dict[Feature, Tensor]]:
        """Patches [B, N, C] without CLS, and the by-products asked for."""
        tower, blocks = self.vision_tower, self.vision_tower.encoder.layers
        states_VTC = tower.pre_layrnorm(tower.embeddings(pixels.flatten(0, -4)))
        before_VTC = states_VTC
        for block in blocks[: self.depth]:
            before_VTC, states_VTC = states_VTC, block(states_VTC, None)
        values: dict[Feature, Tensor] = {}
        last = blocks[self.depth - 1]
        heads = last.self_attn.num_heads
        if Feature.CLS_ATTENTION in self.needs:
            query, key = _project(last, before_VTC)
            values[Feature.CLS_ATTENTION] = cls_attention(query, key, heads)
        if Feature.COLUMN_ATTENTION in self.needs:
            normed = last.layer_norm1(before_VTC)
            values[Feature.COLUMN_ATTENTION] = column_attention(
                last.self_attn.q_proj(normed), last.self_attn.k_proj(normed), heads
            )
        if Feature.KEYS in self.needs:
            _, key = _project(last, before_VTC)
            values[Feature.KEYS] = mean_keys(key, heads)
        if Feature.CLS_SIMILARITY in self.needs:
            values[Feature.CLS_SIMILARITY] = cls_similarity(states_VTC)
        if self.needs & {Feature.MERGE_ATTENTION, Feature.MERGE_KEYS}:
            follows = self.depth < len(blocks)
            merging = blocks[self.depth] if follows else last
            query, key = _project(merging, states_VTC if follows else before_VTC)
            values[Feature.MERGE_ATTENTION] = merge_attention(query, key)
            values[Feature.MERGE_KEYS] = key[:, 1:].float()
        if Feature.TEXT_PATCHES in self.needs:
            normed = tower.post_layernorm(states_VTC[:, 1:])
            values[Feature.TEXT_PATCHES] = self.visual_projection(normed).float()
        return self._arrange(states_VTC[:, 1:]), {
            feature: self._arrange(value) for feature, value in values.items()
        }

    def _arrange(self, value_VP: Tensor) -> Tensor:
        """[V, P, ...] to [B, N, ...]."""
        flat_BN = value_VP.flatten(0, 1)[None]
        if self.order is None:
            return flat_BN
        return torch.index_select(flat_BN, 1, torch.tensor(self.order))


class ClipTextTower(nn.Module):
    """CLIP's text tower: the phrase as one vector in the space that its patches share."""

    def __init__(self, spec: TextSpec) -> None:
        """Declare the parameters; the features are taken from the first end token."""
        super().__init__()
        used = copy.deepcopy(spec.library_config)
        used._attn_implementation = "sdpa"  # noqa: SLF001 - the library's own switch
        self.text = CLIPTextModelWithProjection(used)
        self.end_id, self.length = spec.end_id, spec.length

    def fill_constants(self) -> None:
        """Give a value to the position indices, which no checkpoint holds."""
        self.text.text_model.embeddings.position_ids = torch.arange(self.length)[None]

    def forward(self, text_ids_BL: Tensor) -> Tensor:
        """Text features float32 [B, W]."""
        tower = self.text.text_model
        states_BLC = tower.embeddings(text_ids_BL)
        place_L = torch.arange(self.length)
        # Finite, so that float16 holds it.
        mask = torch.where(place_L[None] > place_L[:, None], -1e4, 0.0)
        for block in tower.encoder.layers:
            states_BLC = block(states_BLC, mask[None, None].to(states_BLC.dtype))
        states_BLC = tower.final_layer_norm(states_BLC)
        # Old parsers find the largest of floats only.
        end_B = (text_ids_BL == self.end_id).float().argmax(dim=1)
        pooled_BC = torch.index_select(states_BLC, 1, end_B)[:, 0]
        features_BW: Tensor = self.text.text_projection(pooled_BC).float()
        return features_BW


def build_clip_text(spec: ModelSpec) -> nn.Module:
    """The text tower of a family that has CLIP's; see gap_export.interfaces.family."""
    assert spec.text is not None
    return ClipTextTower(spec.text)


def _project(block: Any, states_VTC: Tensor) -> tuple[Tensor, Tensor]:
    """Query of CLS [V, C] and keys [V, T, C] of a block, which itself runs fused."""
    normed = block.layer_norm1(states_VTC)
    # The same products as inside the block, which then stand in the graph once.
    return block.self_attn.q_proj(normed)[:, 0], block.self_attn.k_proj(normed)


def read_clip(part: Checkpoint) -> tuple[CLIPVisionConfig, CLIPTextConfig | None]:
    """The configs of a CLIP checkpoint's towers; of the text tower where it has one.

    Raises:
        CheckpointError: It is no CLIP checkpoint.
    """
    data = part.require_json("config.json")
    where = str(part.folder / "config.json")
    if data.get("model_type") == "clip":
        whole = parse_config(lambda: CLIPConfig(**data), where, "CLIP")
        vision, text = whole.vision_config, whole.text_config
        text.projection_dim = vision.projection_dim = whole.projection_dim
    elif data.get("model_type") in {None, "clip_vision_model"}:
        vision = parse_config(lambda: CLIPVisionConfig(**data), where, "CLIP")
        text = None
    else:
        raise CheckpointError(
            f"{where}: model_type '{data['model_type']}', expected clip; {NO_WAY}"
        )
    require_clip_tower(vision, where)
    return vision, text


def read_text_spec(part: Checkpoint, vision_width: int) -> TextSpec | None:
    """CLIP's text tower of a checkpoint, None where it has none.

    Raises:
        CheckpointError: Its vision tower is not as wide as the patches that it is to compare.
    """
    vision, text = read_clip(part)
    if vision.hidden_size != vision_width:
        raise CheckpointError(
            f"{part.folder / 'config.json'}: a vision tower {vision.hidden_size} wide, expected "
            f"{vision_width}; give the CLIP checkpoint that the model was trained with: "
            "--set parts.clip=DIR, or compare with the language model's own embeddings: "
            "--set prune.phrase=embeddings"
        )
    if text is None:
        return None
    # The first configs name a wrong one; the end token is the last of the vocabulary.
    end = text.vocab_size - 1 if text.eos_token_id == 2 else text.eos_token_id
    return TextSpec(
        tokenizer=part.folder,
        length=text.max_position_embeddings,
        end_id=end,
        width=text.projection_dim,
        library_config=text,
    )


def clip_features(
    vision: CLIPVisionConfig, text: TextSpec | None
) -> dict[Feature, tuple[int, ...]]:
    """By-products that a CLIP tower gives, with their sizes behind the patches."""
    features = cls_features(vision.hidden_size, vision.num_attention_heads)
    if text is not None:
        features[Feature.TEXT_PATCHES] = (text.width,)
    return features


def find_clip_weights(part: Checkpoint, *, vision: bool, text: bool) -> dict[str, TensorSource]:
    """Tensors of a CLIP checkpoint by their names in the modules here.

    Args:
        part: The checkpoint.
        vision: Whether its vision tower is wanted; another one is used otherwise.
        text: Whether the text tower and the common space are.
    """
    vision_config, text_config = read_clip(part)
    expected: dict[str, tuple[int, ...]] = {}
    ignored = ["logit_scale", r"position_ids$"]
    if vision:
        expected |= tower_shapes(vision_config)
    else:
        ignored.append(r"^vision_model\.")
    if text and text_config is not None:
        expected |= expected_shapes(lambda: _Text(text_config))
        shape = (text_config.projection_dim, vision_config.hidden_size)
        expected["visual_projection.weight"] = shape
    else:
        ignored.append(r"^text_|^visual_projection\.")
    found = match_tensors(part, expected, rename=clip_name, ignored=ignored)
    return {name: stored(tensor) for name, tensor in found.items()}


def clip_name(key: str) -> str:
    """Name of a tensor in the modules here, from its key in a CLIP checkpoint."""
    for old, new in _CLIP_NAMES.items():
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key


class _Tower(nn.Module):
    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.vision_tower = CLIPVisionModel(config)


class _Text(nn.Module):
    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.text = CLIPTextModelWithProjection(config)


def tower_shapes(config: CLIPVisionConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of a whole tower."""
    return expected_shapes(lambda: _Tower(config))


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
