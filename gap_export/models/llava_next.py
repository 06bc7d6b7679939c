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

import re
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration
from transformers import LlavaNextImageProcessorPil as NextProcessor
from transformers.models.llava_next.modeling_llava_next import LlavaNextMultiModalProjector

from gap_export.blocks import llama
from gap_export.blocks.chat import choose_prompt
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
    IGNORED,
    find_image_token,
    find_stop_ids,
    library_name,
    processor_config,
    read_library_config,
    read_normalization,
    require_clip_tower,
    require_patches_alone,
)
from gap_export.blocks.projector import Projector
from gap_export.checkpoint.adapter import (
    add_adapters,
    describe_unmerged,
    read_adapters,
    replace_values,
)
from gap_export.checkpoint.index import Checkpoint
from gap_export.checkpoint.packed import match_sources, read_packing
from gap_export.checkpoint.sources import TensorSource, expected_shapes
from gap_export.checkpoint.tokenizer_files import TokenizerFiles
from gap_export.config.records import ExportConfig
from gap_export.errors import CheckpointError
from gap_export.interfaces.family import EagerModel, ModelSpec
from gap_export.interfaces.features import Feature
from gap_export.reference.loader import open_loader
from gap_export.reference.model import join_parts, load_processor
from gap_runtime.errors import BundleError, ConfigError
from gap_runtime.pictures.load import fitting_size
from gap_runtime.pictures.modes.anyres import (
    choose_canvas,
    mosaic_grid,
    mosaic_index,
    newline_index,
)
from gap_runtime.pictures.preprocess import Bucket, Preprocess

# B batch (1), V views, P patches of a view, N removable tokens, K kept, F newlines, D width.

DECODER: Final = llama
TOWER_LAYERS: Final = "vision_tower.encoder.layers"
PARTS: Final = {"clip": "openai/clip-vit-large-patch14-336", "adapter": "adapter"}
build_text_tower = build_clip_text
NEIGHBOURS: Final = {
    r"^llava_mistral$": "it is LLaVA-NeXT in its authors' layout; give Hugging Face's: "
    "llava-hf/llava-v1.6-mistral-7b-hf",
    r"onevision|qwen|gemma|idefics|mllama|phi|pixtral|vipllava|minicpm|deepseek": (
        "its towers are of another kind; of the models that are here llava-next-vicuna-7b and "
        "llava-next-mistral-7b are the nearest, and CONTRIBUTING.md says how a family is added"
    ),
}
_NEWLINE: Final = "image_newline"
_QUESTION: Final = (
    "Please provide the bounding box coordinate of the region this sentence describes: {phrase}"
)
_TEMPLATES: Final = {
    "llama": f"USER: <image>\n{_QUESTION} ASSISTANT:",
    "mistral": f"[INST] <image>\n{_QUESTION} [/INST]",
}
_PREFIX: Final = 5
_BUCKET: Final = re.compile(r"(\d+)x(\d+)(?:/(\d+):(\d+))?")


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
    # The library writes (height, width).
    canvases = tuple((int(width), int(height)) for height, width in library.image_grid_pinpoints)
    side = vision.image_size
    if not canvases or any(size % side or size <= 0 for canvas in canvases for size in canvas):
        raise CheckpointError(
            f"{where}: image_grid_pinpoints {list(canvases)}, expected multiples of {side}"
        )
    preprocess = Preprocess(
        mode="anyres", side=side, fill=(0, 0, 0), mean=mean, std=std, canvases=canvases
    )
    image_token_id = find_image_token(data, library.image_token_id)
    prompt = choose_prompt(
        checkpoint,
        question=_QUESTION,
        templates=_TEMPLATES,
        text=text,
        image_token_id=image_token_id,
        config=config.prompt,
    )
    return ModelSpec(
        buckets=_read_buckets(config.image.canvas, preprocess, vision.patch_size),
        vision_width=vision.hidden_size,
        features=clip_features(vision, text_spec),
        text=text_spec,
        decoder=decoder,
        tokenizer=TokenizerFiles(folder=checkpoint.folder),
        image_text=None,
        image_token_id=image_token_id,
        stop_ids=find_stop_ids(checkpoint, text.eos_token_id),
        preprocess=preprocess,
        box=FRACTION_BOX,
        template=prompt.template,
        prefix=_PREFIX,
        library_config=library,
        notes=(*prompt.notes, *describe_unmerged(checkpoint)),
    )


def find_weights(checkpoint: Checkpoint, spec: ModelSpec) -> dict[str, TensorSource]:
    """Every tensor, all in the checkpoint but CLIP's text tower, with an adapter merged."""
    config = spec.library_config
    expected = expected_shapes(lambda: build_projector(spec)) | llama.tensor_shapes(spec.decoder)
    expected |= tower_shapes(config.vision_config) | {_NEWLINE: (spec.decoder.width,)}
    adapters = read_adapters(checkpoint, library_name)
    sources = match_sources(
        replace_values(checkpoint, adapters, library_name),
        expected,
        packing=read_packing(checkpoint.require_json("config.json"), "config.json"),
        packable=llama.linear_layers(spec.decoder),
        rename=library_name,
        ignored=IGNORED,
        optional=llama.optional_tensors(spec.decoder),
    )
    llama.tie_head(sources)
    if spec.text is not None:
        sources |= find_clip_weights(checkpoint.parts["clip"], vision=False, text=True)
    add_adapters(sources, adapters)
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
    return _Newlines(spec.decoder.width, len(bucket.fixed))


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
            arrange=lambda bucket: _pack_views(bucket, side),
        )


class _Newlines(nn.Module):
    def __init__(self, width: int, rows: int) -> None:
        super().__init__()
        self.image_newline = nn.Parameter(torch.empty(width))
        self.rows = rows

    def forward(self) -> Tensor:
        return self.image_newline.expand(1, self.rows, -1)


def _read_buckets(text: str | None, spec: Preprocess, patch: int) -> tuple[Bucket, ...]:
    """The buckets that `image.canvas` lists; one for the squarest large canvas by default."""
    if text is None:
        width, height = max(spec.canvases, key=lambda size: (min(size), size[0] * size[1]))
        text = f"{width}x{height}"
    buckets = [_read_bucket(item.strip(), spec, spec.side // patch) for item in text.split(",")]
    return tuple({bucket.name: bucket for bucket in buckets}.values())


def _read_bucket(item: str, spec: Preprocess, tile_grid: int) -> Bucket:
    match = _BUCKET.fullmatch(item)
    if match is None:
        raise ConfigError(
            f"image.canvas '{item}': expected WIDTHxHEIGHT or WIDTHxHEIGHT/ASPECT, for example "
            "672x672/4:3"
        )
    canvas = (int(match[1]), int(match[2]))
    if canvas not in spec.canvases:
        have = ", ".join(f"{width}x{height}" for width, height in spec.canvases)
        raise ConfigError(f"image.canvas '{item}': the model has no such canvas; have {have}")
    aspect = (int(match[3]), int(match[4])) if match[3] else canvas
    if min(aspect) == 0:
        raise ConfigError(f"image.canvas '{item}': an aspect of 0; expected one like 4:3")
    mosaic = mosaic_grid(aspect, canvas, tile_grid, spec.side)
    if 0 in mosaic:
        raise ConfigError(f"image.canvas '{item}': so thin a picture leaves no tile; crop it")
    bucket = Bucket(
        name=f"{canvas[0]}x{canvas[1]}-{mosaic[0]}x{mosaic[1]}",
        canvas=canvas,
        grids=((tile_grid, tile_grid), mosaic),
        strip=1,
        fixed=newline_index(mosaic, tile_grid),
    )
    try:
        fitting_size(bucket, spec)
    except BundleError as error:
        scale = -(-max(max(size) for size in spec.canvases) // min(aspect))
        best = choose_canvas((aspect[0] * scale, aspect[1] * scale), spec.canvases)
        raise ConfigError(
            f"image.canvas '{item}': pictures of {aspect[0]}:{aspect[1]} go on other canvases, "
            f"large ones on {best[0]}x{best[1]}; use {best[0]}x{best[1]}/{aspect[0]}:{aspect[1]}"
        ) from error
    return bucket


def _pack_views(bucket: Bucket, side: int) -> Callable[[Tensor], Tensor]:
    """How patches [V, P, ...] become one row: the whole view, then the mosaic without padding."""
    (grid, _), (rows, columns) = bucket.grids
    assert bucket.canvas is not None
    across, down = bucket.canvas[0] // side, bucket.canvas[1] // side
    top, left = (down * grid - rows) // 2, (across * grid - columns) // 2

    def pack(values: Tensor) -> Tensor:
        tiles = values[1:].reshape(down, across, grid, grid, *values.shape[2:])
        bands = [torch.cat(list(band), dim=1) for band in tiles]
        canvas = torch.cat(bands, dim=0)
        mosaic = canvas[top : top + rows, left : left + columns]
        return torch.cat([values[0], mosaic.flatten(0, 1)])

    return pack
