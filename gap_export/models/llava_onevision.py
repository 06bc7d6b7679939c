"""LLaVA-OneVision: SigLIP tower on tiles of the picture, Qwen2 decoder.

Pictures are cut as for LLaVA-NeXT: a view of the whole and a mosaic of tiles without the padding
of their canvas, a newline token behind each row. A mosaic of much more than nine views' patches is
shrunk bilinearly behind the projector (`anyres_max_9`), so the projector belongs to the tower
here and tokens are pruned behind it. Each canvas and aspect has graphs of its own.

The tower has no CLS token; `column_attention` is the pruner by default. Its boxes are published
nowhere. It was trained on the grounding data of LLaVA-1.5, whose form and frame are taken.

References:
    LLaVA-OneVision: Easy Visual Task Transfer, arXiv:2408.03326; llava-hf checkpoints.
"""

from __future__ import annotations

import re
from typing import Any, Final

from torch import nn
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration
from transformers import LlavaOnevisionImageProcessorPil as OnevisionProcessor
from transformers.models.llava_onevision.modeling_llava_onevision import (
    LlavaOnevisionMultiModalProjector,
)

from gap_export.blocks import llama
from gap_export.blocks.chat import REGION_QUESTION, choose_prompt
from gap_export.blocks.clip import resolve_layer
from gap_export.blocks.hf_config import (
    FRACTION_BOX,
    find_image_token,
    find_stop_ids,
    library_name,
    processor_config,
    read_library_config,
    read_normalization,
    require_tower,
    untie_stored_head,
)
from gap_export.blocks.hf_weights import match_merged
from gap_export.blocks.mosaic import NEWLINE, Newlines, read_buckets, read_canvases
from gap_export.blocks.projector import Projector
from gap_export.blocks.siglip import UNUSED, Packing, SiglipTower, tower_shapes
from gap_export.checkpoint.adapter import read_adapters
from gap_export.checkpoint.index import Checkpoint
from gap_export.checkpoint.sources import TensorSource, expected_shapes
from gap_export.checkpoint.tokenizer_files import TokenizerFiles
from gap_export.config.records import ExportConfig
from gap_export.errors import CheckpointError
from gap_export.interfaces.family import EagerModel, ModelSpec, no_parts
from gap_export.interfaces.features import Feature
from gap_export.reference.clip import EagerClip
from gap_export.reference.llama import EagerLlama
from gap_export.reference.loader import open_loader
from gap_export.reference.model import EagerGrounder, load_processor
from gap_export.reference.mosaic import pack_views
from gap_runtime.pictures.modes.anyres import choose_canvas, mosaic_index
from gap_runtime.pictures.modes.anyres_max import read_mosaic, shrink_mosaic
from gap_runtime.pictures.preprocess import Bucket, Preprocess

# B batch (1), V views, P patches of a view, N removable tokens, D decoder width.

DECODER: Final = llama
TOWER_LAYERS: Final = "vision_tower.encoder.layers"
PARTS: Final = {"adapter": "adapter"}
PRUNER: Final = "column_attention"
_TEMPLATES: Final = {
    "qwen2": f"<|im_start|>user <image>\n{REGION_QUESTION}<|im_end|><|im_start|>assistant\n"
}
"""What the published chat template makes of it."""
_PREFIX: Final = 3
_MAX_VIEWS: Final = re.compile(r"anyres_max_([1-9]\d*)")
_USUAL_ASPECTS: Final = ((4, 3), (3, 4))
_USUAL_SIDE: Final = 5 / 12
"""Of a part of those, in sides of a view: photographs of 640 x 480 pixels before views of 384."""
find_parts = no_parts


def read_spec(checkpoint: Checkpoint, config: ExportConfig) -> ModelSpec:
    """Read config.json and the preprocessing config, and settle the buckets.

    Raises:
        CheckpointError: The config describes something that this family does not have.
        ConfigError: `image.canvas` cannot be read or names a canvas that the model has not.
    """
    data, library, where = read_library_config(
        checkpoint, "llava_onevision", LlavaOnevisionConfig.from_dict, "LLaVA-OneVision"
    )
    vision, text = library.vision_config, library.text_config
    require_tower(vision, where, "siglip_vision_model")
    _require_all_patches(library, where)
    resolve_layer(vision, library.vision_feature_layer, where)
    untie_stored_head(checkpoint, library, llama.HEAD)
    decoder = llama.read_decoder(text, where, is_tied=library.tie_word_embeddings)
    side, grid = vision.image_size, vision.image_size // vision.patch_size
    mean, std = read_normalization(checkpoint, side)
    preprocess = Preprocess(
        mode="anyres_max",
        side=side,
        fill=(0, 0, 0),
        mean=mean,
        std=std,
        canvases=read_canvases(library.image_grid_pinpoints, side, where),
    )
    views = _count_views(library, where)
    image_token_id = find_image_token(data, library.image_token_id)
    prompt = choose_prompt(
        checkpoint,
        question=REGION_QUESTION,
        templates=_TEMPLATES,
        text=text,
        image_token_id=image_token_id,
        config=config.prompt,
    )
    return ModelSpec(
        buckets=read_buckets(
            _usual_canvases(preprocess) if config.image.canvas is None else config.image.canvas,
            preprocess,
            grid,
            lambda mosaic: shrink_mosaic(mosaic, grid, views),
        ),
        vision_width=decoder.width,
        features={
            Feature.COLUMN_ATTENTION: (),
            Feature.KEYS: (vision.hidden_size // vision.num_attention_heads,),
        },
        text=None,
        decoder=decoder,
        tokenizer=TokenizerFiles(folder=checkpoint.folder),
        image_text=None,
        image_token_id=image_token_id,
        stop_ids=find_stop_ids(checkpoint, text.eos_token_id, decoder.vocabulary),
        preprocess=preprocess,
        box=FRACTION_BOX,
        template=prompt.template,
        prefix=_PREFIX,
        library_config=library,
        notes=prompt.notes,
    )


def find_weights(checkpoint: Checkpoint, spec: ModelSpec) -> dict[str, TensorSource]:
    """Every tensor, all in the checkpoint, with an adapter merged."""
    config = spec.library_config
    projector = expected_shapes(lambda: _make_projector(config))
    expected = tower_shapes(config.vision_config) | projector
    expected |= {NEWLINE: (spec.decoder.width,)}
    return match_merged(checkpoint, spec.decoder, expected, UNUSED)


def build_tower(spec: ModelSpec, bucket: Bucket, needs: frozenset[Feature]) -> nn.Module:
    """SigLIP on every view, its patches projected, in the packed order without newlines."""
    config = spec.library_config
    whole, left = bucket.grids
    mosaic = read_mosaic(bucket)
    assert bucket.canvas is not None
    tiles = mosaic_index(bucket.canvas, mosaic, whole[0], spec.preprocess.side)
    return SiglipTower(
        config.vision_config,
        resolve_layer(config.vision_config, config.vision_feature_layer, "config.json"),
        needs,
        projector=LlavaOnevisionMultiModalProjector(config),
        packing=Packing(
            whole=whole[0] * whole[1],
            mosaic=tuple(int(index) for index in tiles),
            cut=mosaic,
            left=left,
        ),
    )


def build_projector(spec: ModelSpec) -> nn.Module:
    """Nothing more: the tower has projected its patches."""
    del spec
    return nn.Identity()


def build_fixed_tokens(spec: ModelSpec, bucket: Bucket) -> nn.Module:
    """The newline, once for each row of the mosaic."""
    return Newlines(spec.decoder.width, len(bucket.fixed))


def load_eager(
    checkpoint: Checkpoint, spec: ModelSpec, dtype: str, *, memory: int | None = None
) -> EagerModel:
    """Hugging Face's LlavaOnevisionForConditionalGeneration with the checkpoint's weights."""
    config, side = spec.library_config, spec.preprocess.side
    with open_loader(checkpoint, dtype, memory) as loader:
        adapters = read_adapters(checkpoint, library_name)
        model: Any = loader.load(LlavaOnevisionForConditionalGeneration, config, adapters=adapters)
        canvases = [[height, width] for width, height in spec.preprocess.canvases]
        parts = model.model
        return EagerGrounder(
            tower=EagerClip(
                parts.vision_tower,
                resolve_layer(config.vision_config, config.vision_feature_layer, "config.json"),
                leading=0,
                behind=parts.multi_modal_projector,
            ),
            project=lambda tokens: tokens,
            language=EagerLlama(
                parts.language_model,
                model.lm_head,
                spec.tokenizer,
                image_token_id=spec.image_token_id,
            ),
            process=load_processor(
                OnevisionProcessor,
                checkpoint.folder if processor_config(checkpoint) else None,
                side,
                usual={"image_grid_pinpoints": canvases},
            ),
            arrange=lambda bucket: pack_views(bucket, side, read_mosaic(bucket)),
            fixed_token=parts.image_newline,
        )


def _make_projector(config: LlavaOnevisionConfig) -> nn.Module:
    """The library's, under its name in the checkpoint."""
    return Projector("multi_modal_projector", LlavaOnevisionMultiModalProjector(config))


def _require_all_patches(library: LlavaOnevisionConfig, where: str) -> None:
    """Refuse a config whose visual tokens are not all patches of one layer.

    Raises:
        CheckpointError: The projector takes something else.
    """
    if library.vision_feature_select_strategy != "full":
        raise CheckpointError(
            f"{where}: vision_feature_select_strategy '{library.vision_feature_select_strategy}' "
            "leaves the first patch out, as this tower has no CLS token; expected 'full'"
        )
    if not isinstance(library.vision_feature_layer, int):
        raise CheckpointError(
            f"{where}: vision_feature_layer {library.vision_feature_layer}, expected one layer"
        )


def _count_views(library: LlavaOnevisionConfig, where: str) -> int:
    """Views whose patches a mosaic may have before it is shrunk.

    Raises:
        CheckpointError: `vision_aspect_ratio` is another rule.
    """
    match = _MAX_VIEWS.fullmatch(library.vision_aspect_ratio)
    if match is None:
        raise CheckpointError(
            f"{where}: vision_aspect_ratio '{library.vision_aspect_ratio}', expected anyres_max_9 "
            "or another number"
        )
    return int(match[1])


def _usual_canvases(spec: Preprocess) -> str:
    """Those of usual photographs, upright and lying."""
    found = []
    for across, down in _USUAL_ASPECTS:
        size = (round(across * _USUAL_SIDE * spec.side), round(down * _USUAL_SIDE * spec.side))
        width, height = choose_canvas(size, spec.canvases)
        found.append(f"{width}x{height}/{across}:{down}")
    return ",".join(found)
