"""What the Qwen-VL families share besides graphs: sizes of pictures, names, prompt and boxes.

References:
    Technical reports of Qwen's, arXiv:2502.13923 and arXiv:2511.21631;
    Qwen's own checkpoints and cookbooks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gap_export.blocks.hf_config import (
    find_image_token,
    find_stop_ids,
    processor_config,
    read_normalization,
)
from gap_export.blocks.hf_weights import match_merged
from gap_export.blocks.qwen_vision import MERGE, STRIP
from gap_export.checkpoint.index import Checkpoint
from gap_export.checkpoint.sources import TensorSource
from gap_export.checkpoint.tokenizer_files import TokenizerFiles
from gap_export.config.records import ExportConfig
from gap_export.errors import CheckpointError
from gap_export.interfaces.decoder import DecoderSpec
from gap_export.interfaces.family import ModelSpec
from gap_export.interfaces.features import Feature
from gap_runtime.errors import ConfigError
from gap_runtime.pictures.boxes import BoxFormat, Frame
from gap_runtime.pictures.preprocess import Bucket, Preprocess

AXES: Final = 3
"""Position IDs of a token: time, row and column."""
QUESTION: Final = (
    "<|im_start|>user\n<|vision_start|><image><|vision_end|>Locate {phrase} in the image and "
    "output its bounding box in JSON format.<|im_end|>\n<|im_start|>assistant\n"
)
_IGNORED: Final = (r"rotary_pos_emb\.inv_freq$",)
"""Patterns of keys of buffers that the tower makes itself."""
_CANVAS: Final = re.compile(r"(\d+)x(\d+)")
_NUMBER: Final = r"\s*(\d+(?:\.\d+)?)\s*"
_FORM: Final = '```json\n[\n\t{"bbox_2d": [###, ###, ###, ###], "label": "{phrase}"}\n]\n```'
_NAMES: Final = (
    (re.compile(r"^model\.(?=(visual|language_model)\.)"), ""),
    (re.compile(r"^model\."), "language_model."),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What all published checkpoints of a family have in common.

    `canvases` are sizes of pictures as `image.canvas` lists them, `prefix` is the count of tokens
    before the picture, `normalization` mean and deviation of the channels (None: CLIP's).
    """

    canvases: str
    template: str
    prefix: int
    box: BoxFormat
    normalization: tuple[float, float, float] | None = None


def make_spec(
    checkpoint: Checkpoint,
    config: ExportConfig,
    published: Published,
    *,
    data: dict[str, Any],
    library: Any,
    decoder: DecoderSpec,
    step: int,
    why: str,
    features: dict[Feature, tuple[int, ...]],
) -> ModelSpec:
    """What is known of a model, once its decoder was read and its tower looked at.

    Args:
        checkpoint: The files.
        config: What the user asked for.
        published: What holds where neither says anything else.
        data: config.json.
        library: The library's config of it.
        decoder: The language model.
        step: Both sides of a picture have to be multiples of so many pixels.
        why: Ends the message about sides that are not.
        features: What the tower can tell pruners, each with its sizes.

    Raises:
        CheckpointError: A config describes something that this family does not have.
        ConfigError: `image.canvas` cannot be read, or a side is no such multiple.
    """
    vision, canvases = library.vision_config, config.image.canvas
    return ModelSpec(
        buckets=read_buckets(
            published.canvases if canvases is None else canvases,
            vision.patch_size * MERGE,
            step,
            why,
        ),
        vision_width=STRIP * vision.hidden_size * (1 + decoder.planes),
        features=features,
        text=None,
        decoder=decoder,
        tokenizer=TokenizerFiles(folder=checkpoint.folder),
        image_text=None,
        image_token_id=find_image_token(data, library.image_token_id),
        stop_ids=find_stop_ids(
            checkpoint, getattr(library.text_config, "eos_token_id", None), decoder.vocabulary
        ),
        preprocess=read_preprocess(checkpoint, vision, published.normalization),
        box=published.box,
        template=config.prompt.template or published.template,
        prefix=published.prefix,
        library_config=library,
    )


def match_weights(
    checkpoint: Checkpoint, decoder: DecoderSpec, expected: dict[str, tuple[int, ...]]
) -> dict[str, TensorSource]:
    """Where the tensors of a model lie; see match_merged.

    Args:
        checkpoint: The files, and an adapter among the parts or none.
        decoder: What the language model is made of.
        expected: Shapes by name, without the decoder's.

    Raises:
        CheckpointError: As match_merged does.
    """
    return match_merged(checkpoint, decoder, expected, _IGNORED, rename=canonical_name)


def canonical_name(key: str) -> str:
    """Name of a tensor in the modules here, from its key by any version of the library."""
    for pattern, replacement in _NAMES:
        key = pattern.sub(replacement, key)
    return key


def json_boxes(scale: float, frame: Frame) -> BoxFormat:
    """Boxes in Qwen's JSON, whose values are of a scale in a frame; see BoxFormat."""
    return BoxFormat(
        attempt=r'"bbox_2d":\s*\[[^\[\]]*\]?',
        pattern=rf'"bbox_2d":\s*\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]',
        scale=scale,
        frame=frame,
        form=_FORM,
    )


def require_tower(vision: Any, wanted: dict[str, Any], width: int, where: str) -> None:
    """Refuse a tower of other parts than its family builds.

    Args:
        vision: The library's config of it.
        wanted: Values by name, beside those that all of these families have.
        width: Of the language model.
        where: The file that the config is from.

    Raises:
        CheckpointError: The config has other values.
    """
    common = {"spatial_merge_size": MERGE, "temporal_patch_size": 2, "in_channels": 3}
    for name, value in (common | wanted).items():
        found = getattr(vision, name)
        if found != value:
            raise CheckpointError(f"{where}: vision_config.{name} {found!r}, expected {value!r}")
    if not isinstance(vision.patch_size, int):
        raise CheckpointError(
            f"{where}: vision_config.patch_size {vision.patch_size}, expected one number"
        )
    if vision.out_hidden_size != width:
        raise CheckpointError(
            f"{where}: vision_config.out_hidden_size {vision.out_hidden_size}, but the language "
            f"model is {width} wide"
        )


def read_preprocess(
    checkpoint: Checkpoint, vision: Any, usual: tuple[float, float, float] | None = None
) -> Preprocess:
    """How pictures become pixels.

    Args:
        checkpoint: With or without a config of the image processor.
        vision: The library's config of the tower.
        usual: Mean and deviation of the channels where there is none; CLIP's by default.

    Raises:
        CheckpointError: The processor does something else than the tower takes.
    """
    data = processor_config(checkpoint)
    for name, value in (("patch_size", vision.patch_size), ("merge_size", MERGE)):
        if data.get(name, value) != value:
            raise CheckpointError(
                f"{checkpoint.folder}: image processor: {name} {data[name]}, but the vision tower "
                f"takes {value}"
            )
    mean, std = read_normalization(checkpoint, None)
    if usual is not None:
        mean = mean if data.get("image_mean") else usual
        std = std if data.get("image_std") else usual
    return Preprocess(
        mode="resize",
        side=vision.patch_size * MERGE,
        fill=(0, 0, 0),
        mean=mean,
        std=std,
        canvases=(),
    )


def find_processor(checkpoint: Checkpoint) -> Path | None:
    """The folder with the config of the image processor; None where there is none."""
    return checkpoint.folder if processor_config(checkpoint) else None


def read_buckets(text: str, token: int, step: int, why: str) -> tuple[Bucket, ...]:
    """The buckets that `image.canvas` lists.

    Args:
        text: WIDTHxHEIGHT, several with commas between.
        token: Pixels to a side of a visual token.
        step: Both sides have to be multiples of so many pixels.
        why: Ends the message about sides that are not.

    Raises:
        ConfigError: It cannot be read, or a side is no such multiple.
    """
    buckets = {}
    for item in (each.strip() for each in text.split(",")):
        match = _CANVAS.fullmatch(item)
        if match is None:
            raise ConfigError(
                f"image.canvas '{item}': expected WIDTHxHEIGHT, for example 1008x1008"
            )
        canvas = (int(match[1]), int(match[2]))
        if any(side % step or not side for side in canvas):
            near = "x".join(str(max(step, round(side / step) * step)) for side in canvas)
            raise ConfigError(
                f"image.canvas '{item}': both sides have to be multiples of {step}, {why}; "
                f"use {near}"
            )
        buckets[item] = Bucket(
            name=item,
            canvas=canvas,
            grids=((canvas[1] // token, canvas[0] // token),),
            strip=STRIP,
            fixed=(),
        )
    return tuple(buckets.values())
