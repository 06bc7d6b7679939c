"""MiniGPT-v2: EVA-CLIP-g on stretched pictures, four patches to a token, Llama-2-chat with LoRA.

Three checkpoints make the model: the published one holds the projector and the LoRA weights, EVA
and the language model lie beside it. What is merged or stretched is made tensor by tensor.

EVA's file holds one block more than the model runs, and neither it nor any config tells the
number of heads or the size of pictures: `--set vision.heads=N` and `vision.side=N` do, where they
are not those of EVA-CLIP-g (88 wide heads, 448 pixels).

References:
    MiniGPT-v2, arXiv:2310.09478; Vision-CAIR/MiniGPT-4.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from gap_export.blocks import llama
from gap_export.blocks.eva import EvaShape, EvaTower
from gap_export.blocks.hf_config import CLIP_MEAN, CLIP_STD, IGNORED, find_stop_ids, parse_config
from gap_export.blocks.projector import Projector
from gap_export.blocks.scores import cls_features
from gap_export.checkpoint.adapter import add_pair, merge_into, read_part, require_whole
from gap_export.checkpoint.differences import refuse_differences
from gap_export.checkpoint.index import Checkpoint
from gap_export.checkpoint.sources import (
    TensorSource,
    expected_shapes,
    match_tensors,
    require_shape,
    stored,
)
from gap_export.checkpoint.tensor import TensorLocation
from gap_export.checkpoint.tokenizer_files import TokenizerFiles
from gap_export.checkpoint.torch_file import read_settings
from gap_export.config.records import ExportConfig
from gap_export.errors import CheckpointError
from gap_export.interfaces.family import EagerModel, ModelSpec
from gap_export.interfaces.features import Feature
from gap_export.reference.eva import EagerEva
from gap_export.reference.lazy import LazyTensor, add_product
from gap_export.reference.llama import EagerLlama
from gap_export.reference.loader import language_key, merge_adapters, open_loader
from gap_export.reference.model import EagerGrounder, linear_layer
from gap_runtime.errors import ConfigError
from gap_runtime.pictures.boxes import BoxFormat
from gap_runtime.pictures.preprocess import Bucket, Preprocess

# B batch (1), N visual tokens, C patch width (of a whole strip), D decoder width.

DECODER: Final = llama
TOWER_LAYERS: Final = "visual_encoder.blocks"
PARTS: Final = {
    "vision": "eva_vit_g.pth",
    "language": "meta-llama/Llama-2-7b-chat-hf",
    "adapter": "adapter",
}
_STRIP: Final = 4
_SIDE: Final = 448
_HEAD_WIDTH: Final = 88
_LAYERS: Final = 39
_LORA_ALPHA: Final = 16
"""Where the checkpoint's own settings do not say: the default of the authors' code."""
_TEMPLATE: Final = "<s>[INST] <Img><image></Img> [refer] give me the location of {phrase} [/INST]"
_PREFIX: Final = 10
_NUMBER: Final = r"\s*<\s*(\d+)\s*>"
_BOX: Final = BoxFormat(
    attempt=r"\{[^{}]*\}?",
    pattern=rf"\{{{_NUMBER}{_NUMBER}{_NUMBER}{_NUMBER}\s*\}}",
    scale=100.0,
    frame="original",
    form="{<##><##><##><##>}",
)
_LORA_KEY: Final = re.compile(
    r"^llama_model\.base_model\.model\.model\.(layers\.\d+\.(?:self_attn|mlp)\.\w+_proj)"
    r"\.lora_([AB])(?:\.default)?\.weight$"
)
_QUANTIZER_STATE: Final = (r"^llama_model\..*\.(SCB|weight_format)$",)
"""What bitsandbytes leaves in of frozen weights that were quantized for training."""
_TOWER: Final = "visual_encoder."
"""Before the names of EVA's tensors where it was trained with the rest (`freeze_vit: False`)."""
_UNUSED_VISION: Final = (r"^(norm|fc_norm|head)\.", r"^mask_token$", r"relative_position")


def find_parts(checkpoint: Checkpoint, *, text: bool) -> dict[str, str]:
    """EVA, where it was not trained with the rest, and the language model.

    An adapter of the language model is no part that a checkpoint needs.
    """
    del text
    is_inside = any(key.startswith(_TOWER) for key in checkpoint.tensors)
    roles = ("language",) if is_inside else ("vision", "language")
    return {role: PARTS[role] for role in roles}


def read_spec(checkpoint: Checkpoint, config: ExportConfig) -> ModelSpec:
    """Read the language model's config and the sizes of EVA's tensors.

    Raises:
        CheckpointError: A part is not what it should be.
        ConfigError: `vision.heads` or `vision.side` do not fit the tower.
    """
    language = checkpoint.require_part("language")
    require_whole(language, "language")
    refuse_differences(language)
    where = str(language.folder / "config.json")
    data = language.require_json("config.json")
    text = parse_config(lambda: LlamaConfig(**data), where, "Llama")
    decoder = llama.read_decoder(text, where)
    tower = _read_tower(_find_eva(checkpoint), config)
    return ModelSpec(
        buckets=(
            Bucket(name="", canvas=None, grids=(_token_grid(tower),), strip=_STRIP, fixed=()),
        ),
        vision_width=_STRIP * tower.width,
        features=cls_features(tower.width, tower.heads),
        text=None,
        decoder=decoder,
        tokenizer=TokenizerFiles(folder=language.folder, rule="stripped"),
        image_text=None,
        image_token_id=None,
        stop_ids=find_stop_ids(language, text.eos_token_id, decoder.vocabulary),
        preprocess=Preprocess(
            mode="stretch",
            side=tower.side,
            fill=(0, 0, 0),
            mean=CLIP_MEAN,
            std=CLIP_STD,
            canvases=(),
        ),
        box=_BOX,
        template=config.prompt.template or _TEMPLATE,
        prefix=_PREFIX,
        library_config=_Config(tower, text, _read_lora(checkpoint)),
    )


def find_weights(checkpoint: Checkpoint, spec: ModelSpec) -> dict[str, TensorSource]:
    """Tensors of all three checkpoints: LoRA merged, EVA's biases joined, its table stretched."""
    tower: EvaShape = spec.library_config.tower
    has_norm = any(key.startswith("ln_vision.") for key in checkpoint.tensors)
    own = match_tensors(
        checkpoint,
        expected_shapes(lambda: build_projector(spec)) | _own_shapes(checkpoint, tower),
        rename=_own_name,
        ignored=(*IGNORED, *_QUANTIZER_STATE, rf"^{re.escape(_TOWER)}"),
        optional=frozenset() if has_norm else frozenset({"ln_vision.weight", "ln_vision.bias"}),
    )
    language = match_tensors(
        checkpoint.parts["language"],
        llama.tensor_shapes(spec.decoder),
        rename=llama.llama_name,
        ignored=IGNORED,
    )
    sources = {name: stored(tensor) for name, tensor in language.items()}
    sources |= _merge_lora(language, own, spec.library_config.lora)
    merge_into(sources, read_part(checkpoint, llama.llama_name))
    sources |= _find_tower(_find_eva(checkpoint), tower)
    for name in ("llama_proj.weight", "llama_proj.bias"):
        sources[name] = stored(own[name])
    for name, value in (("ln_vision.weight", 1.0), ("ln_vision.bias", 0.0)):
        sources[name] = stored(own[name]) if name in own else _constant(value, (tower.width,))
    return sources


def build_tower(spec: ModelSpec, bucket: Bucket, needs: frozenset[Feature]) -> nn.Module:
    """EVA as a whole."""
    return EvaTower(spec.library_config.tower, bucket.strip, needs)


def build_projector(spec: ModelSpec) -> nn.Module:
    """One linear layer from whole strips, under its name in the checkpoint."""
    return Projector("llama_proj", nn.Linear(spec.vision_width, spec.decoder.width))


def load_eager(
    checkpoint: Checkpoint, spec: ModelSpec, dtype: str, *, memory: int | None = None
) -> EagerModel:
    """Hugging Face's LlamaForCausalLM with LoRA added, and EVA written plainly."""
    tower: EvaShape = spec.library_config.tower
    with open_loader(checkpoint, dtype, memory) as loader:
        own = loader.open()
        tensors = _merged_tensors(loader.open("language"), own, spec.library_config.lora.alpha)
        adapters = read_part(checkpoint, llama.llama_name)
        tensors = merge_adapters(loader, tensors, adapters, key_of=language_key)
        model = loader.build(LlamaForCausalLM, spec.library_config.text, tensors)
        inside = {key.removeprefix(_TOWER): v for key, v in own.items() if key.startswith(_TOWER)}
        projector = {key: each for key, each in own.items() if key.startswith("llama_proj.")}
        return EagerGrounder(
            tower=EagerEva(
                loader.read(inside or loader.open("vision")),
                _read_norm(own, tower.width, loader.dtype),
                layers=tower.layers,
                heads=tower.heads,
                strip=_STRIP,
            ),
            project=linear_layer(loader.read(projector), "llama_proj"),
            language=EagerLlama(model.model, model.lm_head, spec.tokenizer, image_token_id=None),
            process=_make_processor(tower.side),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lora:
    """What a pair of matrices is scaled by, over its rank; `rank` is None where nothing says."""

    alpha: float
    rank: int | None


@dataclass(frozen=True, slots=True)
class _Config:
    """The sizes of the tower, the language model's config and LoRA's settings."""

    tower: EvaShape
    text: LlamaConfig
    lora: _Lora


def _find_eva(checkpoint: Checkpoint) -> Checkpoint:
    """EVA's tensors by their names in its file: the checkpoint's own, else those of the file."""
    own = {
        key.removeprefix(_TOWER): tensor
        for key, tensor in checkpoint.tensors.items()
        if key.startswith(_TOWER)
    }
    if not own:
        return checkpoint.require_part("vision")
    unreadable = {
        key.removeprefix(_TOWER): dtype
        for key, dtype in checkpoint.unreadable.items()
        if key.startswith(_TOWER)
    }
    return dataclasses.replace(checkpoint, tensors=own, unreadable=unreadable)


def _read_tower(part: Checkpoint, config: ExportConfig) -> EvaShape:
    """The sizes of EVA's tower, from its tensors' shapes."""

    def shape(key: str) -> tuple[int, ...]:
        if key not in part.tensors:
            raise CheckpointError(f"{part.folder}: tensor '{key}' is missing; is it EVA's file?")
        return part.tensors[key].shape

    convolution = shape("patch_embed.proj.weight")
    width, patch = convolution[0], convolution[-1]
    blocks = {int(key.split(".")[1]) for key in part.tensors if key.startswith("blocks.")}
    side = config.vision.side or _SIDE
    heads = config.vision.heads or max(1, width // _HEAD_WIDTH)
    if width % heads:
        raise ConfigError(
            f"vision.heads is {heads}, which does not divide EVA's width of {width}; give the "
            "number with --set vision.heads=N"
        )
    if side % patch or (side // patch) ** 2 % _STRIP:
        raise ConfigError(
            f"vision.side is {side}, expected an even number of patches of {patch} pixels a side"
        )
    return EvaShape(
        layers=min(len(blocks), _LAYERS),
        width=width,
        heads=heads,
        mlp=shape("blocks.0.mlp.fc1.weight")[0],
        side=side,
        patch=patch,
    )


def _token_grid(tower: EvaShape) -> tuple[int, int]:
    """Rows and columns of tokens; one row where strips run over the ends of rows of patches."""
    side = tower.side // tower.patch
    return (side, side // _STRIP) if side % _STRIP == 0 else (1, tower.patches // _STRIP)


def _own_name(key: str) -> str:
    """Name of a tensor of the published checkpoint."""
    match = _LORA_KEY.match(key)
    return f"{match[1]}.lora_{match[2]}" if match else key


def _own_shapes(checkpoint: Checkpoint, tower: EvaShape) -> dict[str, tuple[int, ...]]:
    """Shapes of what the published checkpoint may hold besides the projector.

    LoRA's rank is read off its own tensors; `_merge_lora` compares them with the weights.
    """
    shapes = {key: tensor.shape for key, tensor in checkpoint.tensors.items()}
    # Those that no graph can use are wanted all the same, so that they are refused.
    shapes |= dict.fromkeys(checkpoint.unreadable, ())
    lora = {_own_name(key): shape for key, shape in shapes.items() if _LORA_KEY.match(key)}
    return lora | {"ln_vision.weight": (tower.width,), "ln_vision.bias": (tower.width,)}


def _read_lora(checkpoint: Checkpoint) -> _Lora:
    """LoRA by the settings that the authors' runner saves in the checkpoint.

    Raises:
        CheckpointError: They tell no numbers.
    """
    found = [tensor for key, tensor in checkpoint.tensors.items() if _LORA_KEY.match(key)]
    if not found or found[0].shown.suffix == ".safetensors":
        return _Lora(alpha=_LORA_ALPHA, rank=None)
    file, shown = found[0].file, found[0].shown
    settings = read_settings(file, shown).get("model")
    settings = settings if isinstance(settings, dict) else {}
    alpha, rank = settings.get("lora_alpha", _LORA_ALPHA), settings.get("lora_r")
    if not isinstance(alpha, (int, float)) or not isinstance(rank, int | None):
        raise CheckpointError(
            f"{shown}: lora_alpha {alpha!r} and lora_r {rank!r} in its settings, expected numbers"
        )
    return _Lora(alpha=float(alpha), rank=rank)


def _merge_lora(
    language: dict[str, TensorLocation], own: dict[str, TensorLocation], lora: _Lora
) -> dict[str, TensorSource]:
    """The language model's weights that LoRA changes: W + alpha / r * B A."""
    merged = {}
    pairs = {name.partition(".lora_")[0] for name in own if ".lora_" in name}
    kinds = {base_name.rpartition(".")[2] for base_name in pairs}
    for name in language:
        base_name = name.removeprefix("language_model.").removesuffix(".weight")
        if base_name.rpartition(".")[2] in kinds and base_name not in pairs:
            file = next(tensor.shown for key, tensor in own.items() if ".lora_" in key)
            raise CheckpointError(
                f"{file}: LoRA of '{base_name}' is missing, which other layers have; "
                "download the checkpoint again"
            )
    for base_name in sorted(pairs):
        down, up = own.get(f"{base_name}.lora_A"), own.get(f"{base_name}.lora_B")
        name = f"language_model.{base_name}.weight"
        if down is None or up is None or name not in language:
            alone = down or up
            assert alone is not None
            raise CheckpointError(
                f"{alone.shown}: tensor '{alone.key}' has no counterpart (lora_A, lora_B, or "
                "the layer of the language model); download the checkpoint again"
            )
        weight = language[name]
        rank = down.shape[0]
        require_shape(down, (rank, weight.shape[1]))
        require_shape(up, (weight.shape[0], rank))
        if lora.rank not in {None, rank}:
            raise CheckpointError(
                f"{down.shown}: tensor '{down.key}' has rank {rank}, its settings say lora_r "
                f"{lora.rank}; download the checkpoint again"
            )
        merged[name] = add_pair(stored(weight), down, up, lora.alpha / rank)
    return merged


def _find_tower(part: Checkpoint, tower: EvaShape) -> dict[str, TensorSource]:
    """EVA's tensors by their names in the tower."""
    expected = expected_shapes(lambda: EvaTower(tower, _STRIP, frozenset()).visual_encoder)
    table = part.tensors.get("pos_embed")
    width = (tower.width,)
    for layer in range(tower.layers):
        del expected[f"blocks.{layer}.attn.qkv.bias"]
        expected |= {f"blocks.{layer}.attn.{name}_bias": width for name in ("q", "v")}
    if table is not None:
        trained = math.isqrt(max(table.shape[1] - 1, 0))
        expected["pos_embed"] = (1, 1 + trained * trained, tower.width)
    spare = rf"^blocks\.(?!({'|'.join(map(str, range(tower.layers)))})\.)"
    found = match_tensors(part, expected, rename=lambda key: key, ignored=(*_UNUSED_VISION, spare))
    sources = {name: stored(tensor) for name, tensor in found.items() if "_bias" not in name}
    for layer in range(tower.layers):
        biases = tuple(found[f"blocks.{layer}.attn.{name}_bias"] for name in ("q", "v"))
        sources[f"blocks.{layer}.attn.qkv.bias"] = TensorSource(
            shape=(3 * tower.width,), inputs=biases, make=_join_biases
        )
    if found["pos_embed"].shape[1] != 1 + tower.patches:
        sources["pos_embed"] = TensorSource(
            shape=(1, 1 + tower.patches, tower.width),
            inputs=(found["pos_embed"],),
            make=_table_stretcher(tower.side // tower.patch),
        )
    return {f"visual_encoder.{name}": source for name, source in sources.items()}


def _join_biases(query: Tensor, value: Tensor) -> Tensor:
    """One bias for the fused projection, zero for the keys."""
    return torch.cat([query, torch.zeros_like(query), value])


def _table_stretcher(side: int) -> Callable[[Tensor], Tensor]:
    """The position table at `side` patches a side, CLS's row as it is."""

    def stretch(table: Tensor) -> Tensor:
        trained = math.isqrt(table.shape[1] - 1)
        square = table[:, 1:].reshape(1, trained, trained, -1).permute(0, 3, 1, 2)
        larger = functional.interpolate(
            square, size=(side, side), mode="bicubic", align_corners=False
        )
        return torch.cat([table[:, :1], larger.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)

    return stretch


def _constant(value: float, shape: tuple[int, ...]) -> TensorSource:
    return TensorSource(shape=shape, inputs=(), make=lambda: torch.full(shape, value))


def _merged_tensors(
    language: dict[str, LazyTensor], own: dict[str, LazyTensor], alpha: float
) -> dict[str, LazyTensor]:
    """The language model's tensors by its keys, LoRA's pairs of matrices added."""
    merged = dict(language)
    for key, down in own.items():
        if ".lora_A." in key:
            name = key.partition(".lora_A.")[0].removeprefix("llama_model.base_model.model.")
            up, scale = own[key.replace(".lora_A.", ".lora_B.")], alpha / down.length
            name = f"{name}.weight"
            merged[name] = add_product(merged[name], up, down, scale)
    return merged


def _read_norm(
    own: dict[str, LazyTensor], width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The norm behind the tower; one that changes nothing where there is none."""
    weight, bias = own.get("ln_vision.weight"), own.get("ln_vision.bias")
    return (
        torch.ones(width, dtype=dtype) if weight is None else weight.read(),
        torch.zeros(width, dtype=dtype) if bias is None else bias.read(),
    )


def _make_processor(side: int) -> Callable[[Image.Image], Tensor]:
    """Stretched to a square and normalized, as the authors' evaluation does."""

    def process(picture: Image.Image) -> Tensor:
        resized = picture.resize((side, side), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
        return ((pixels - mean) / std)[None]

    return process
