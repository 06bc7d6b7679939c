"""LLaVA-NeXT (1.6): CLIP tower on tiles of the picture, Llama or Mistral decoder.

A picture gives a view of the whole and a mosaic of tiles without the padding of their canvas; a
newline token ends each row of the mosaic and is never removed. The number of tokens follows from
canvas and aspect, so each such bucket has graphs of its own. Visual tokens are counted in the
packed sequence: the whole view, then the mosaic's rows with their newlines.

The frame of its boxes is published nowhere. It was trained on LLaVA-1.5's boxes, which are on the
padded square; `--set box.frame=original` chooses the other one.

References:
    LLaVA-NeXT: Improved reasoning, OCR, and world knowledge (2024); llava-hf checkpoints.
"""

from __future__ import annotations

from typing import Final

from torch import nn
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration
from transformers import LlavaNextImageProcessorPil as NextProcessor
from transformers.models.llava_next.modeling_llava_next import LlavaNextMultiModalProjector

from gap_export.blocks import llama
from gap_export.blocks.chat import REGION_QUESTION, choose_prompt
from gap_export.blocks.clip import (
    ClipTower,
    build_clip_text,
    clip_features,
    find_clip_weights,
    read_text_spec,
    resolve_layer,
    tower_shapes,
)
from gap_export.blocks.hf_config import (
    FRACTION_BOX,
    find_image_token,
    find_stop_ids,
    library_name,
    processor_config,
    read_library_config,
    read_normalization,
    require_clip_tower,
    require_patches_alone,
)
from gap_export.blocks.hf_weights import match_merged
from gap_export.blocks.mosaic import NEWLINE, Newlines, read_buckets, read_canvases
from gap_export.blocks.projector import Projector
from gap_export.checkpoint.adapter import read_adapters
from gap_export.checkpoint.index import Checkpoint
from gap_export.checkpoint.sources import TensorSource, expected_shapes
from gap_export.checkpoint.tokenizer_files import TokenizerFiles
from gap_export.config.records import ExportConfig
from gap_export.interfaces.family import EagerModel, ModelSpec
from gap_export.interfaces.features import Feature
from gap_export.reference.loader import open_loader
from gap_export.reference.model import join_parts, load_processor
from gap_export.reference.mosaic import pack_views
from gap_runtime.pictures.modes.anyres import mosaic_index
from gap_runtime.pictures.preprocess import Bucket, Preprocess

# B batch (1), V views, P patches of a view, N removable tokens, K kept, F newlines, D width.

DECODER: Final = llama
TOWER_LAYERS: Final = "vision_tower.encoder.layers"
PARTS: Final = {"clip": "openai/clip-vit-large-patch14-336", "adapter": "adapter"}
build_text_tower = build_clip_text
NEIGHBOURS: Final = {
    r"^llava_mistral$": "it is LLaVA-NeXT in its authors' layout; give Hugging Face's: "
    "llava-hf/llava-v1.6-mistral-7b-hf",
    r"onevision|qwen|gemma|idefics|mllama|phi|pixtral|vipllava|minicpm|deepseek|mpt": (
        "its towers are of another kind; of the models that are here llava-next-vicuna-7b and "
        "llava-next-mistral-7b are the nearest, and CONTRIBUTING.md says how a family is added"
    ),
}
_TEMPLATES: Final = {
    "llama": f"USER: <image>\n{REGION_QUESTION} ASSISTANT:",
    "mistral": f"[INST] <image>\n{REGION_QUESTION} [/INST]",
}
_PREFIX: Final = 5


def find_parts(checkpoint: Checkpoint, *, text: bool) -> dict[str, str]:
    """CLIP, for its text tower; the vision tower was trained and is inside."""
    del checkpoint
    return {"clip": PARTS["clip"]} if text else {}


def read_spec(checkpoint: Checkpoint, config: ExportConfig) -> ModelSpec:
    """Read config.json and the preprocessing config, and settle the buckets.

    Raises:
        CheckpointError: The config describes something that this family does not have.
        ConfigError: `image.canvas` cannot be read or names a canvas that the model has not.
    """
    data, library, where = read_library_config(
        checkpoint, "llava_next", LlavaNextConfig.from_dict, "LLaVA-NeXT"
    )
    vision, text = library.vision_config, library.text_config
    require_clip_tower(vision, where)
    require_patches_alone(library, where)
    resolve_layer(vision, library.vision_feature_layer, where)
    decoder = llama.read_decoder(text, where, is_tied=library.tie_word_embeddings)
    clip = checkpoint.parts.get("clip")
    text_spec = None if clip is None else read_text_spec(clip, vision.hidden_size)
    mean, std = read_normalization(checkpoint, vision.image_size)
    side = vision.image_size
    canvases = read_canvases(library.image_grid_pinpoints, side, where)
    preprocess = Preprocess(
        mode="anyres", side=side, fill=(0, 0, 0), mean=mean, std=std, canvases=canvases
    )
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
            _usual_canvas(preprocess) if config.image.canvas is None else config.image.canvas,
            preprocess,
            side // vision.patch_size,
        ),
        vision_width=vision.hidden_size,
        features=clip_features(vision, text_spec),
        text=text_spec,
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
    """Every tensor, all in the checkpoint but CLIP's text tower, with an adapter merged."""
    config = spec.library_config
    expected = expected_shapes(lambda: build_projector(spec))
    expected |= tower_shapes(config.vision_config) | {NEWLINE: (spec.decoder.width,)}
    sources = match_merged(checkpoint, spec.decoder, expected)
    if spec.text is not None:
        sources |= find_clip_weights(checkpoint.parts["clip"], vision=False, text=True)
    return sources


def build_tower(spec: ModelSpec, bucket: Bucket, needs: frozenset[Feature]) -> nn.Module:
    """CLIP on every view, its patches in the packed order without newlines."""
    config = spec.library_config
    layer = resolve_layer(config.vision_config, config.vision_feature_layer, "config.json")
    whole, mosaic = bucket.grids
    assert bucket.canvas is not None
    tiles = mosaic_index(bucket.canvas, mosaic, whole[0], spec.preprocess.side)
    return ClipTower(
        config.vision_config,
        layer,
        needs,
        arrange=(*range(whole[0] * whole[1]), *(int(index) for index in tiles)),
        text_width=spec.text.width if spec.text else None,
    )


def build_projector(spec: ModelSpec) -> nn.Module:
    """Hugging Face's projector, under its name in the checkpoint."""
    return Projector("multi_modal_projector", LlavaNextMultiModalProjector(spec.library_config))


def build_fixed_tokens(spec: ModelSpec, bucket: Bucket) -> nn.Module:
    """The newline, once for each row of the mosaic."""
    return Newlines(spec.decoder.width, len(bucket.fixed))


def load_eager(
    checkpoint: Checkpoint, spec: ModelSpec, dtype: str, *, memory: int | None = None
) -> EagerModel:
    """Hugging Face's LlavaNextForConditionalGeneration with the checkpoint's weights."""
    config, side = spec.library_config, spec.preprocess.side
    with open_loader(checkpoint, dtype, memory) as loader:
        adapters = read_adapters(checkpoint, library_name)
        model = loader.load(LlavaNextForConditionalGeneration, config, adapters=adapters)
        canvases = [[height, width] for width, height in spec.preprocess.canvases]
        process = load_processor(
            NextProcessor,
            checkpoint.folder if processor_config(checkpoint) else None,
            side,
            usual={"image_grid_pinpoints": canvases},
        )
        layer = resolve_layer(config.vision_config, config.vision_feature_layer, "config.json")
        return join_parts(
            model,
            loader,
            spec,
            layer=layer,
            process=process,
            arrange=lambda bucket: pack_views(bucket, side),
        )


def _usual_canvas(spec: Preprocess) -> str:
    """The squarest large one, for pictures of its own aspect."""
    width, height = max(spec.canvases, key=lambda size: (min(size), size[0] * size[1]))
    return f"{width}x{height}"
