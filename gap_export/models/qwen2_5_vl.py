"""Qwen2.5-VL: a tower with windows, four patches to a token, three position IDs, boxes in pixels.

Pictures are resized to the sizes that are settled when the bundle is exported (`image.canvas`).
Both sides are multiples of a window's, so that all windows are equal. The library's own rule
rounds a picture's sides to whole tokens instead; the model was trained on pictures of any size.

References:
    Qwen2.5-VL Technical Report, arXiv:2502.13923; Qwen's own checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

from PIL import Image
from torch import Tensor, nn
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from gap_export.blocks import llama
from gap_export.blocks.hf_config import (
    find_image_token,
    find_stop_ids,
    processor_config,
    read_library_config,
    read_normalization,
)
from gap_export.blocks.qwen_vision import MERGE, STRIP, QwenMerger, QwenTower
from gap_export.checkpoint.index import Checkpoint
from gap_export.checkpoint.packed import match_sources, read_packing
from gap_export.checkpoint.sources import TensorSource, expected_shapes
from gap_export.checkpoint.tokenizer_files import TokenizerFiles
from gap_export.config.records import ExportConfig
from gap_export.errors import CheckpointError
from gap_export.interfaces.family import EagerModel, ModelSpec
from gap_export.interfaces.features import Feature
from gap_export.reference.llama import EagerLlama
from gap_export.reference.loader import open_loader
from gap_export.reference.model import EagerGrounder
from gap_export.reference.qwen_vision import EagerQwenVision
from gap_runtime.errors import ConfigError
from gap_runtime.pictures.boxes import BoxFormat
from gap_runtime.pictures.preprocess import Bucket, Preprocess, find_mode

# B batch (1), K kept, C width of the tower, D decoder width.

DECODER: Final = llama
TOWER_LAYERS: Final = "visual.blocks"
PARTS: Final[dict[str, str]] = {}
_AXES: Final = 3
_PREFIX: Final = 15
_CANVASES: Final = "1008x1008,1120x896,896x1120"
_CANVAS: Final = re.compile(r"(\d+)x(\d+)")
_TEMPLATE: Final = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "<|vision_start|><image><|vision_end|>Locate {phrase} in the image and output its bounding "
    "box in JSON format.<|im_end|>\n<|im_start|>assistant\n"
)
_NUMBER: Final = r"\s*(\d+(?:\.\d+)?)\s*"
_BOX: Final = BoxFormat(
    attempt=r'"bbox_2d":\s*\[[^\[\]]*\]?',
    pattern=rf'"bbox_2d":\s*\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]',
    scale=1.0,
    frame="resized",
)
_NAMES: Final = (
    (re.compile(r"^model\.(?=(visual|language_model)\.)"), ""),
    (re.compile(r"^model\."), "language_model."),
)
_IGNORED: Final = (r"rotary_emb\.inv_freq$", r"rotary_pos_emb\.inv_freq$")


def find_parts(checkpoint: Checkpoint, *, text: bool) -> dict[str, str]:
    """Nothing lies elsewhere."""
    del checkpoint, text
    return {}


def read_spec(checkpoint: Checkpoint, config: ExportConfig) -> ModelSpec:
    """Read config.json and the preprocessing config, and settle the buckets.

    Raises:
        CheckpointError: The config describes something that this family does not have.
        ConfigError: `image.canvas` cannot be read, or windows would not be equal.
    """
    data, library, where = read_library_config(
        checkpoint, "qwen2_5_vl", Qwen2_5_VLConfig.from_dict, "Qwen2.5-VL"
    )
    vision, text = library.vision_config, library.text_config
    _require_tower(vision, where)
    decoder = llama.read_decoder(text, where, is_tied=library.tie_word_embeddings, axes=_AXES)
    if vision.out_hidden_size != decoder.width:
        raise CheckpointError(
            f"{where}: vision_config.out_hidden_size {vision.out_hidden_size}, but the language "
            f"model is {decoder.width} wide"
        )
    mean, std = read_normalization(checkpoint, None)
    return ModelSpec(
        buckets=_read_buckets(config.image.canvas or _CANVASES, vision),
        vision_width=STRIP * vision.hidden_size,
        features={},
        text=None,
        decoder=decoder,
        tokenizer=TokenizerFiles(folder=checkpoint.folder),
        image_text=None,
        image_token_id=find_image_token(data, library.image_token_id),
        stop_ids=find_stop_ids(checkpoint, text.eos_token_id),
        preprocess=Preprocess(
            mode="resize",
            side=vision.patch_size * MERGE,
            fill=(0, 0, 0),
            mean=mean,
            std=std,
            canvases=(),
        ),
        box=_BOX,
        template=config.prompt.template or _TEMPLATE,
        prefix=_PREFIX,
        library_config=library,
    )


def find_weights(checkpoint: Checkpoint, spec: ModelSpec) -> dict[str, TensorSource]:
    """Every tensor, all in the checkpoint, in the key names of any version of the library."""
    tower = expected_shapes(lambda: build_tower(spec, spec.buckets[0], frozenset()))
    sources = match_sources(
        checkpoint,
        tower | expected_shapes(lambda: build_projector(spec)) | llama.tensor_shapes(spec.decoder),
        packing=read_packing(checkpoint.require_json("config.json"), "config.json"),
        packable=llama.linear_layers(spec.decoder),
        rename=_canonical_name,
        ignored=_IGNORED,
        optional=llama.optional_tensors(spec.decoder),
    )
    llama.tie_head(sources)
    return sources


def build_tower(spec: ModelSpec, bucket: Bucket, needs: frozenset[Feature]) -> nn.Module:
    """The tower for pictures of the bucket's size; it has no by-products."""
    assert not needs
    ((rows, columns),) = bucket.grids
    return QwenTower(spec.library_config.vision_config, (rows * MERGE, columns * MERGE))


def build_projector(spec: ModelSpec) -> nn.Module:
    """The merger."""
    return QwenMerger(spec.library_config.vision_config)


def load_eager(
    checkpoint: Checkpoint, spec: ModelSpec, dtype: str, *, memory: int | None = None
) -> EagerModel:
    """Hugging Face's Qwen2_5_VLForConditionalGeneration with the checkpoint's weights."""
    config = spec.library_config
    with open_loader(checkpoint, dtype, memory) as loader:
        model: Any = loader.load(Qwen2_5_VLForConditionalGeneration, config)
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
            process=_load_processor(checkpoint, spec),
        )


def _require_tower(vision: Any, where: str) -> None:
    """Refuse a tower of other parts than this family builds."""
    for name, wanted in (
        ("hidden_act", "silu"),
        ("spatial_merge_size", MERGE),
        ("temporal_patch_size", 2),
        ("in_channels", 3),
    ):
        found = getattr(vision, name)
        if found != wanted:
            raise CheckpointError(f"{where}: vision_config.{name} {found!r}, expected {wanted!r}")
    token = vision.patch_size * MERGE
    if vision.window_size < token or vision.window_size % token:
        raise CheckpointError(
            f"{where}: vision_config.window_size {vision.window_size}, expected a multiple of "
            f"{token}"
        )


def _read_buckets(text: str, vision: Any) -> tuple[Bucket, ...]:
    """The buckets that `image.canvas` lists."""
    token, window = vision.patch_size * MERGE, vision.window_size
    buckets = {}
    for item in (each.strip() for each in text.split(",")):
        match = _CANVAS.fullmatch(item)
        if match is None:
            raise ConfigError(
                f"image.canvas '{item}': expected WIDTHxHEIGHT, for example 1008x1008"
            )
        canvas = (int(match[1]), int(match[2]))
        if any(side % window or not side for side in canvas):
            near = "x".join(str(max(window, round(side / window) * window)) for side in canvas)
            raise ConfigError(
                f"image.canvas '{item}': both sides have to be multiples of {window}, so that the "
                f"tower's windows are equal; use {near}"
            )
        buckets[item] = Bucket(
            name=item,
            canvas=canvas,
            grids=((canvas[1] // token, canvas[0] // token),),
            strip=1,
            fixed=(),
        )
    return tuple(buckets.values())


def _load_processor(checkpoint: Checkpoint, spec: ModelSpec) -> Callable[[Image.Image], Tensor]:
    """The library's processor for pictures that have a bucket's size already."""
    kind = Qwen2VLImageProcessorPil
    processor: Any = (
        kind.from_pretrained(checkpoint.folder, local_files_only=True)
        if processor_config(checkpoint)
        else kind()
    )
    vision, mode = spec.library_config.vision_config, find_mode(spec.preprocess)
    size = vision.patch_size

    def process(picture: Image.Image) -> Tensor:
        canvas = mode.find_bucket(picture.size, spec.preprocess, spec.buckets).canvas
        assert canvas is not None
        resized = picture.resize(canvas, Image.Resampling.BICUBIC)
        area = canvas[0] * canvas[1]
        # So many pixels and no others: the library's own rule leaves the size as it is.
        flat = processor(
            resized,
            size={"shortest_edge": area, "longest_edge": area},
            return_tensors="pt",
        )["pixel_values"]
        rows, columns = canvas[1] // size // MERGE, canvas[0] // size // MERGE
        cut: Tensor = flat.reshape(rows, columns, MERGE, MERGE, 3, -1, size, size)[..., 0, :, :]
        return cut.permute(4, 0, 2, 5, 1, 3, 6).reshape(1, 3, canvas[1], canvas[0])

    return process


def _canonical_name(key: str) -> str:
    """Name of a tensor in the modules here, from its key in any version of the library."""
    for pattern, replacement in _NAMES:
        key = pattern.sub(replacement, key)
    return key
