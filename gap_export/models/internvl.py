"""InternVL3 and 3.5: InternViT on tiles, 2x2 patches to a token, Qwen2 or Qwen3 decoder.

Reads Hugging Face's layout (`-hf`). A picture is stretched to the grid of tiles whose aspect is
nearest, and the whole of it is looked at once more behind them. The number of tokens follows from
the tiles, so each such canvas has graphs of its own; `--set image.tiles=1` takes every picture as
one tile. Visual tokens are counted in the packed sequence: tile after tile, then the whole.

The tower has a CLS token, so every pruner serves it; `cls_attention` is the one by default.

References:
    InternVL3, arXiv:2504.10479; OpenGVLab/InternVL3-*-hf; internvl_chat/eval/refcoco.
"""

from __future__ import annotations

import re
from typing import Any, Final

from PIL import Image
from torch import Tensor, nn
from transformers import GotOcr2ImageProcessorPil as TileProcessor
from transformers import InternVLConfig, InternVLForConditionalGeneration
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector

from gap_export.blocks import llama
from gap_export.blocks.chat import REGION_QUESTION, choose_prompt
from gap_export.blocks.clip import resolve_layer
from gap_export.blocks.hf_config import (
    find_image_token,
    find_stop_ids,
    library_name,
    processor_config,
    read_library_config,
    read_normalization,
    require_patches_alone,
    untie_stored_head,
)
from gap_export.blocks.hf_weights import match_merged
from gap_export.blocks.internvit import InternVitShape, InternVitTower
from gap_export.blocks.projector import Projector
from gap_export.blocks.scores import cls_features
from gap_export.checkpoint.adapter import read_adapters
from gap_export.checkpoint.index import Checkpoint
from gap_export.checkpoint.sources import TensorSource, expected_shapes
from gap_export.checkpoint.tokenizer_files import TokenizerFiles
from gap_export.config.records import ExportConfig
from gap_export.errors import CheckpointError
from gap_export.interfaces.family import EagerModel, ModelSpec, no_parts
from gap_export.interfaces.features import Feature
from gap_export.reference.internvit import EagerInternVit, pack_cells
from gap_export.reference.llama import EagerLlama
from gap_export.reference.loader import open_loader
from gap_export.reference.model import EagerGrounder
from gap_runtime.errors import BundleError, ConfigError
from gap_runtime.pictures.boxes import BoxFormat
from gap_runtime.pictures.load import fitting_size
from gap_runtime.pictures.modes.tiles import choose_tiles, count_views, list_canvases
from gap_runtime.pictures.preprocess import Bucket, Preprocess

# B batch (1), V views, N visual tokens, K kept, C width of a cell of patches, D decoder width.

DECODER: Final = llama
TOWER_LAYERS: Final = "vision_tower.encoder.layer"
PARTS: Final = {"adapter": "adapter"}
NEIGHBOURS: Final = {
    r"^internvl_chat$": "it is InternVL in its authors' layout; give Hugging Face's: "
    "OpenGVLab/InternVL3-1B-hf",
}
_MEAN: Final = (0.485, 0.456, 0.406)
_STD: Final = (0.229, 0.224, 0.225)
_LEAST_TILES: Final = 1
_MOST_TILES: Final = 12
"""Of the library's processor, where the checkpoint's own does not say."""
_USUAL_ASPECTS: Final = ((4, 3), (3, 4))
"""Of most photographs: their canvases where none is asked for."""
_QUESTION: Final = REGION_QUESTION.replace("{phrase}", "<ref>{phrase}</ref>")
_TEMPLATES: Final = dict.fromkeys(
    ("qwen2", "qwen3"),
    f"<|im_start|>user\n<image>\n{_QUESTION}<|im_end|>\n<|im_start|>assistant\n",
)
_PREFIX: Final = 4
_NUMBER: Final = r"\s*(-?\d+(?:\.\d+)?)\s*"
_BOX: Final = BoxFormat(
    attempt=r"\[[^\[\]]+\]?",
    pattern=rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]",
    scale=1000.0,
    frame="original",
    form="<ref>{phrase}</ref><box>[[###, ###, ###, ###]]</box>",
)
_LAST_NORM: Final = r"vision_tower\.layernorm\."
"""Of a tower whose patches are taken before it."""
_CANVAS: Final = re.compile(r"(\d+)x(\d+)")
find_parts = no_parts


def read_spec(checkpoint: Checkpoint, config: ExportConfig) -> ModelSpec:
    """Read config.json and the preprocessing config, and settle the buckets.

    Raises:
        CheckpointError: The config describes something that this family does not have.
        ConfigError: `image.canvas` cannot be read or names a canvas that the model has not.
    """
    data, library, where = read_library_config(
        checkpoint, "internvl", InternVLConfig.from_dict, "InternVL"
    )
    require_patches_alone(library, where)
    resolve_layer(library.vision_config, library.vision_feature_layer, where)
    tower = _read_tower(library, where)
    text = library.text_config
    untie_stored_head(checkpoint, library, llama.HEAD)
    preprocess = _read_preprocess(checkpoint, config, tower.side)
    image_token_id = find_image_token(data, library.image_token_id)
    prompt = choose_prompt(
        checkpoint,
        question=_QUESTION,
        templates=_TEMPLATES,
        text=text,
        image_token_id=image_token_id,
        config=config.prompt,
    )
    decoder = llama.read_decoder(text, where, is_tied=library.tie_word_embeddings)
    return ModelSpec(
        buckets=_read_buckets(config.image.canvas, preprocess, tower),
        vision_width=tower.width * tower.cell**2,
        features=cls_features(tower.width, tower.heads),
        text=None,
        decoder=decoder,
        tokenizer=TokenizerFiles(folder=checkpoint.folder),
        image_text=_find_image_text(checkpoint),
        image_token_id=image_token_id,
        stop_ids=find_stop_ids(checkpoint, text.eos_token_id, decoder.vocabulary),
        preprocess=preprocess,
        box=_BOX,
        template=prompt.template,
        prefix=_PREFIX,
        library_config=library,
        notes=prompt.notes,
    )


def find_weights(checkpoint: Checkpoint, spec: ModelSpec) -> dict[str, TensorSource]:
    """Every tensor, all in the checkpoint, with an adapter merged.

    Its mask token is for training alone.
    """
    tower = _read_tower(spec.library_config, "config.json")
    expected = expected_shapes(lambda: build_projector(spec))
    expected |= expected_shapes(lambda: InternVitTower(tower, frozenset(), tower.layers))
    ignored = [*([] if tower.is_normed else [_LAST_NORM]), r"embeddings\.mask_token$"]
    return match_merged(checkpoint, spec.decoder, expected, ignored)


def build_tower(spec: ModelSpec, bucket: Bucket, needs: frozenset[Feature]) -> nn.Module:
    """InternViT on every view, its patches cell by cell."""
    del bucket
    config = spec.library_config
    layer = resolve_layer(config.vision_config, config.vision_feature_layer, "config.json")
    return InternVitTower(_read_tower(config, "config.json"), needs, layer)


def build_projector(spec: ModelSpec) -> nn.Module:
    """Hugging Face's projector, under its name in the checkpoint."""
    return Projector("multi_modal_projector", InternVLMultiModalProjector(spec.library_config))


def load_eager(
    checkpoint: Checkpoint, spec: ModelSpec, dtype: str, *, memory: int | None = None
) -> EagerModel:
    """Hugging Face's InternVLForConditionalGeneration with the checkpoint's weights."""
    config = spec.library_config
    tower = _read_tower(config, "config.json")
    with open_loader(checkpoint, dtype, memory) as loader:
        adapters = read_adapters(checkpoint, library_name)
        model = loader.load(InternVLForConditionalGeneration, config, adapters=adapters)
        processor = _load_processor(checkpoint, spec.preprocess)
        parts = model.model

        def process(picture: Image.Image) -> Tensor:
            pixels: Tensor = processor(picture, return_tensors="pt")["pixel_values"]
            return pixels[None]

        return EagerGrounder(
            tower=EagerInternVit(
                parts.vision_tower,
                resolve_layer(config.vision_config, config.vision_feature_layer, "config.json"),
                parts.pixel_shuffle,
                cell=tower.cell,
                is_normed=tower.is_normed,
            ),
            project=parts.multi_modal_projector,
            language=EagerLlama(
                parts.language_model,
                model.lm_head,
                spec.tokenizer,
                image_token_id=spec.image_token_id,
            ),
            process=process,
            arrange=lambda _: pack_cells(tower.cell),
        )


def _read_tower(library: InternVLConfig, where: str) -> InternVitShape:
    """The sizes of the tower.

    Raises:
        CheckpointError: They are not those of such a tower.
    """
    vision = library.vision_config
    if vision.model_type != "internvl_vision":
        raise CheckpointError(
            f"{where}: vision_config.model_type '{vision.model_type}', expected internvl_vision"
        )
    sides: list[int] = []
    for name in ("image_size", "patch_size"):
        values = {int(value) for value in getattr(vision, name)}
        if len(values) != 1 or min(values) < 1:
            raise CheckpointError(
                f"{where}: vision_config.{name} {[*getattr(vision, name)]}, expected a square"
            )
        sides += values
    if vision.num_channels != 3:
        raise CheckpointError(f"{where}: vision_config.num_channels is not 3")
    if vision.norm_type not in {"layer_norm", "rms_norm"}:
        raise CheckpointError(
            f"{where}: vision_config.norm_type '{vision.norm_type}', expected layer_norm or "
            "rms_norm"
        )
    side, patch = sides
    ratio = library.downsample_ratio
    cell = round(1 / ratio) if ratio > 0 else 0
    # In floats, as the library does it: a third is refused there too.
    if cell < 1 or cell * ratio != 1 or side % patch or side // patch % ratio:
        raise CheckpointError(
            f"{where}: downsample_ratio {ratio} of {side / patch:g} patches a side, expected a "
            "half or a quarter that divides them"
        )
    if side // patch % cell:
        raise CheckpointError(
            f"{where}: downsample_ratio {ratio} of {side // patch} patches a side, expected a "
            f"multiple of {cell} patches"
        )
    return InternVitShape(
        layers=vision.num_hidden_layers,
        width=vision.hidden_size,
        heads=vision.num_attention_heads,
        mlp=vision.intermediate_size,
        side=side,
        patch=patch,
        cell=cell,
        epsilon=vision.layer_norm_eps,
        activation=vision.hidden_act,
        has_bias=vision.attention_bias,
        has_positions=vision.use_absolute_position_embeddings,
        has_head_norms=vision.use_qk_norm,
        is_rms=vision.norm_type == "rms_norm",
        # The library takes the tower's own output for -1, and inner states for all else.
        is_normed=not vision.use_mean_pooling and library.vision_feature_layer == -1,
    )


def _read_preprocess(checkpoint: Checkpoint, config: ExportConfig, side: int) -> Preprocess:
    """How pictures are cut, and into how many tiles at most."""
    data = processor_config(checkpoint)
    mean, std = read_normalization(checkpoint, side) if data else (_MEAN, _STD)
    least = _count_tiles(data, "min_patches", _LEAST_TILES, checkpoint)
    most = _count_tiles(data, "max_patches", _MOST_TILES, checkpoint)
    if config.image.tiles is not None:
        most = config.image.tiles
        least = min(least, most)
    if least > most:
        raise CheckpointError(
            f"{checkpoint.folder}: image processor: min_patches {least} is more than max_patches "
            f"{most}"
        )
    return Preprocess(
        mode="tiles",
        side=side,
        fill=(0, 0, 0),
        mean=mean,
        std=std,
        canvases=list_canvases(least, most, side),
    )


def _count_tiles(data: dict[str, Any], name: str, usual: int, checkpoint: Checkpoint) -> int:
    value = data.get(name, usual)
    if type(value) is not int or value < 1:
        raise CheckpointError(
            f"{checkpoint.folder}: image processor: {name} {value!r}, expected a number of tiles"
        )
    return value


def _read_buckets(text: str | None, spec: Preprocess, tower: InternVitShape) -> tuple[Bucket, ...]:
    """The buckets that `image.canvas` lists; those of usual photographs where it is not set."""
    if text is None:
        # So large that the most tiles win.
        sizes = [[100 * tower.side * part for part in aspect] for aspect in _USUAL_ASPECTS]
        chosen = [choose_tiles((width, height), spec.canvases) for width, height in sizes]
        text = ",".join(f"{width}x{height}" for width, height in chosen)
    buckets = [_read_bucket(item.strip(), spec, tower) for item in text.split(",")]
    return tuple({bucket.name: bucket for bucket in buckets}.values())


def _read_bucket(item: str, spec: Preprocess, tower: InternVitShape) -> Bucket:
    match = _CANVAS.fullmatch(item)
    canvas = (int(match[1]), int(match[2])) if match else None
    if canvas not in spec.canvases:
        tiles = len(spec.canvases)
        largest = spec.canvases[-1]
        raise ConfigError(
            f"image.canvas '{item}': expected WIDTHxHEIGHT in multiples of {spec.side}, one of "
            f"{tiles} from {spec.canvases[0][0]}x{spec.canvases[0][1]} to "
            f"{largest[0]}x{largest[1]}; --set image.tiles=N says how many tiles there may be"
        )
    assert canvas is not None
    grid = tower.grid // tower.cell
    bucket = Bucket(
        name=item,
        canvas=canvas,
        grids=((grid, grid),) * count_views(canvas, spec.side),
        strip=tower.cell**2,
        fixed=(),
    )
    try:
        fitting_size(bucket, spec)
    except BundleError as error:
        raise ConfigError(f"image.canvas '{item}': {error}") from error
    return bucket


def _find_image_text(checkpoint: Checkpoint) -> str:
    """What stands for the picture in a prompt: the image token between two others."""
    data = checkpoint.read_json("tokenizer_config.json") or {}
    # The library has written them in three places.
    names: dict[str, Any] = dict(data)
    for place in ("extra_special_tokens", "model_specific_special_tokens"):
        names |= data[place] if isinstance(data.get(place), dict) else {}
    tokens = [
        names.get(f"{name}_image_token", usual)
        for name, usual in (("start", "<img>"), ("context", "<IMG_CONTEXT>"), ("end", "</img>"))
    ]
    # What the library has written of a token is its text, or a table with it.
    return "".join(str(each.get("content") if isinstance(each, dict) else each) for each in tokens)


def _load_processor(checkpoint: Checkpoint, spec: Preprocess) -> Any:
    """The library's processor, which cuts tiles as its processor of prompts has it do."""
    counts = [width // spec.side * (height // spec.side) for width, height in spec.canvases]
    cutting = {"crop_to_patches": True, "min_patches": min(counts), "max_patches": max(counts)}
    if processor_config(checkpoint):
        return TileProcessor.from_pretrained(checkpoint.folder, local_files_only=True, **cutting)
    size = {"height": spec.side, "width": spec.side}
    return TileProcessor(size=size, image_mean=spec.mean, image_std=spec.std, **cutting)
