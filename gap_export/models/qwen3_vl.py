"""Qwen3-VL: DeepStack, four patches to a token, three position IDs, boxes in thousandths.

Pictures are resized to the sizes that are settled when the bundle is exported (`image.canvas`),
of whole visual tokens each, as the library's own rule has them. What DeepStack adds behind the
decoder's first layers lies behind each visual token in its row, so that pruning takes both.

The tower has no CLS token; `divprune`, which needs none, is the pruner by default.

References:
    Qwen3-VL Technical Report, arXiv:2511.21631; DeepStack, arXiv:2406.04334; Qwen's own
    checkpoints.
"""

from __future__ import annotations

import math
from typing import Any, Final

from torch import nn
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from gap_export.blocks import llama
from gap_export.blocks.hf_config import read_library_config
from gap_export.blocks.qwen import (
    AXES,
    QUESTION,
    Published,
    canonical_name,
    find_processor,
    json_boxes,
    make_spec,
    match_weights,
    require_tower,
)
from gap_export.blocks.qwen3_vision import Qwen3Mergers, Qwen3Tower
from gap_export.blocks.qwen_vision import MERGE
from gap_export.checkpoint.adapter import read_adapters
from gap_export.checkpoint.index import Checkpoint
from gap_export.checkpoint.sources import TensorSource, expected_shapes
from gap_export.config.records import ExportConfig
from gap_export.errors import CheckpointError
from gap_export.interfaces.family import EagerModel, ModelSpec, no_parts
from gap_export.interfaces.features import Feature
from gap_export.reference.loader import open_loader
from gap_export.reference.model import EagerGrounder
from gap_export.reference.qwen3 import EagerQwen3Text, EagerQwen3Vision
from gap_export.reference.qwen_vision import OLDER_NAMES, load_qwen_processor
from gap_runtime.pictures.preprocess import Bucket

DECODER: Final = llama
TOWER_LAYERS: Final = "visual.blocks"
PARTS: Final = {"adapter": "adapter"}
PRUNER: Final = "divprune"
_PUBLISHED: Final = Published(
    canvases="1024x1024,1184x896,896x1184",
    # Without a system line.
    template=QUESTION,
    prefix=4,
    box=json_boxes(1000.0, "original"),
    normalization=(0.5, 0.5, 0.5),
)
find_parts = no_parts


def read_spec(checkpoint: Checkpoint, config: ExportConfig) -> ModelSpec:
    """Read config.json and the preprocessing config, and settle the buckets.

    Raises:
        CheckpointError: The config describes something that this family does not have.
        ConfigError: `image.canvas` cannot be read, or is not of whole visual tokens.
    """
    data, library, where = read_library_config(
        checkpoint, "qwen3_vl", Qwen3VLConfig.from_dict, "Qwen3-VL"
    )
    vision = library.vision_config
    _require_stack(vision, where)
    decoder = llama.read_decoder(
        library.text_config,
        where,
        is_tied=library.tie_word_embeddings,
        axes=AXES,
        planes=len(vision.deepstack_visual_indexes),
    )
    require_tower(vision, {"hidden_act": "gelu_pytorch_tanh"}, decoder.width, where)
    return make_spec(
        checkpoint,
        config,
        _PUBLISHED,
        data=data,
        library=library,
        decoder=decoder,
        step=vision.patch_size * MERGE,
        why="the pixels of a visual token",
        features={Feature.COLUMN_ATTENTION: ()},
    )


def find_weights(checkpoint: Checkpoint, spec: ModelSpec) -> dict[str, TensorSource]:
    """Every tensor, in the key names of any version of the library, an adapter merged."""
    tower = expected_shapes(lambda: build_tower(spec, spec.buckets[0], frozenset()))
    expected = tower | expected_shapes(lambda: build_projector(spec))
    return match_weights(checkpoint, spec.decoder, expected)


def build_tower(spec: ModelSpec, bucket: Bucket, needs: frozenset[Feature]) -> nn.Module:
    """The tower for pictures of the bucket's size, and the by-products asked for."""
    ((rows, columns),) = bucket.grids
    return Qwen3Tower(spec.library_config.vision_config, (rows * MERGE, columns * MERGE), needs)


def build_projector(spec: ModelSpec) -> nn.Module:
    """The mergers of the tokens and of their planes."""
    return Qwen3Mergers(spec.library_config.vision_config)


def load_eager(
    checkpoint: Checkpoint, spec: ModelSpec, dtype: str, *, memory: int | None = None
) -> EagerModel:
    """Hugging Face's Qwen3VLForConditionalGeneration with the checkpoint's weights."""
    config = spec.library_config
    with open_loader(checkpoint, dtype, memory) as loader:
        adapters = read_adapters(checkpoint, canonical_name)
        model: Any = loader.load(
            Qwen3VLForConditionalGeneration, config, names=OLDER_NAMES, adapters=adapters
        )
        tower = EagerQwen3Vision(model.model.visual, config.vision_config)
        return EagerGrounder(
            tower=tower,
            project=tower.project,
            language=EagerQwen3Text(
                model.model.language_model,
                model.lm_head,
                spec.tokenizer,
                image_token_id=spec.image_token_id,
                planes=spec.decoder.planes,
            ),
            process=load_qwen_processor(find_processor(checkpoint), spec),
        )


def _require_stack(vision: Any, where: str) -> None:
    """Refuse blocks of DeepStack that are not there or twice, and positions of no square."""
    stacked = list(vision.deepstack_visual_indexes)
    if len(set(stacked)) != len(stacked) or any(not 0 <= k < vision.depth for k in stacked):
        raise CheckpointError(
            f"{where}: vision_config.deepstack_visual_indexes {stacked}, expected different "
            f"blocks of 0 to {vision.depth - 1}"
        )
    count = vision.num_position_embeddings
    if math.isqrt(count) ** 2 != count:
        raise CheckpointError(
            f"{where}: vision_config.num_position_embeddings {count}, expected a square number"
        )
