"""Qwen2.5-VL: a tower with windows, four patches to a token, three position IDs, boxes in pixels.

Pictures are resized to the sizes that are settled when the bundle is exported (`image.canvas`).
Both sides are multiples of a window's, so that all windows are equal. The library's own rule
rounds a picture's sides to whole tokens instead; the model was trained on pictures of any size.

The tower has no CLS token, and its attention is by windows in most blocks; `divprune`, which asks
for neither, is the pruner by default.

References:
    Qwen2.5-VL Technical Report, arXiv:2502.13923; Qwen's own checkpoints.
"""

from __future__ import annotations

from typing import Any, Final

from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

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
from gap_export.blocks.qwen_vision import (
    MERGE,
    QwenMerger,
    QwenTower,
    find_scored_block,
)
from gap_export.checkpoint.adapter import read_adapters
from gap_export.checkpoint.index import Checkpoint
from gap_export.checkpoint.sources import TensorSource, expected_shapes
from gap_export.config.records import ExportConfig
from gap_export.errors import CheckpointError
from gap_export.interfaces.family import EagerModel, ModelSpec, no_parts
from gap_export.interfaces.features import Feature
from gap_export.reference.llama import EagerLlama
from gap_export.reference.loader import open_loader
from gap_export.reference.model import EagerGrounder
from gap_export.reference.qwen_vision import OLDER_NAMES, EagerQwenVision, load_qwen_processor
from gap_runtime.pictures.preprocess import Bucket

# B batch (1), K kept, C width of the tower, D decoder width.

DECODER: Final = llama
TOWER_LAYERS: Final = "visual.blocks"
PARTS: Final = {"adapter": "adapter"}
PRUNER: Final = "divprune"
_PUBLISHED: Final = Published(
    canvases="1008x1008,1120x896,896x1120",
    template="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + QUESTION,
    prefix=15,
    box=json_boxes(1.0, "resized"),
)
find_parts = no_parts


def read_spec(checkpoint: Checkpoint, config: ExportConfig) -> ModelSpec:
    """Read config.json and the preprocessing config, and settle the buckets.

    Raises:
        CheckpointError: The config describes something that this family does not have.
        ConfigError: `image.canvas` cannot be read, or windows would not be equal.
    """
    data, library, where = read_library_config(
        checkpoint, "qwen2_5_vl", Qwen2_5_VLConfig.from_dict, "Qwen2.5-VL"
    )
    vision = library.vision_config
    decoder = llama.read_decoder(
        library.text_config, where, is_tied=library.tie_word_embeddings, axes=AXES
    )
    require_tower(vision, {"hidden_act": "silu"}, decoder.width, where)
    token, window = vision.patch_size * MERGE, vision.window_size
    if window < token or window % token:
        raise CheckpointError(
            f"{where}: vision_config.window_size {window}, expected a multiple of {token}"
        )
    return make_spec(
        checkpoint,
        config,
        _PUBLISHED,
        data=data,
        library=library,
        decoder=decoder,
        step=window,
        why="so that the tower's windows are equal",
        features={} if find_scored_block(vision) is None else {Feature.COLUMN_ATTENTION: ()},
    )


def find_weights(checkpoint: Checkpoint, spec: ModelSpec) -> dict[str, TensorSource]:
    """Every tensor, in the key names of any version of the library, an adapter merged."""
    tower = expected_shapes(lambda: build_tower(spec, spec.buckets[0], frozenset()))
    expected = tower | expected_shapes(lambda: build_projector(spec))
    return match_weights(checkpoint, spec.decoder, expected)


def build_tower(spec: ModelSpec, bucket: Bucket, needs: frozenset[Feature]) -> nn.Module:
    """The tower for pictures of the bucket's size, and the by-products asked for."""
    ((rows, columns),) = bucket.grids
    return QwenTower(spec.library_config.vision_config, (rows * MERGE, columns * MERGE), needs)


def build_projector(spec: ModelSpec) -> nn.Module:
    """The merger."""
    return QwenMerger(spec.library_config.vision_config)


def load_eager(
    checkpoint: Checkpoint, spec: ModelSpec, dtype: str, *, memory: int | None = None
) -> EagerModel:
    """Hugging Face's Qwen2_5_VLForConditionalGeneration with the checkpoint's weights."""
    config = spec.library_config
    with open_loader(checkpoint, dtype, memory) as loader:
        adapters = read_adapters(checkpoint, canonical_name)
        model: Any = loader.load(
            Qwen2_5_VLForConditionalGeneration, config, names=OLDER_NAMES, adapters=adapters
        )
        visual, width = model.model.visual, config.vision_config.hidden_size
        return EagerGrounder(
            tower=EagerQwenVision(visual, config.vision_config),
            project=lambda rows: visual.merger(rows.reshape(-1, width)),
            language=EagerLlama(
                model.model.language_model,
                model.lm_head,
                spec.tokenizer,
                image_token_id=spec.image_token_id,
            ),
            process=load_qwen_processor(find_processor(checkpoint), spec),
        )
