"""LLaVA-1.5: CLIP tower, two-layer projector, Llama decoder, pictures padded to a square.

Reads Hugging Face's layout on disk (sharded safetensors), in the key names of every transformers
version since 4.36.

References:
    Improved Baselines with Visual Instruction Tuning, arXiv:2310.03744; llava-hf checkpoints.
"""

from __future__ import annotations

import re
from typing import Any, Final

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    DynamicCache,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from gap_export.blocks.clip import ClipTower, resolve_layer
from gap_export.blocks.llama import LlamaDecoder, read_llama_shape
from gap_export.blocks.llama import rotary_tables as llama_tables
from gap_export.checkpoint import Checkpoint
from gap_export.errors import CheckpointError
from gap_export.family import EagerModel, ModelSpec
from gap_export.features import EagerVision, Feature
from gap_runtime.manifest import BoxFormat, Preprocess

# B batch (1), N patches, C vision width, D decoder width, S rows, V vocabulary.

EMBEDDING: Final = "language_model.embed_tokens.weight"
FEATURES: Final = frozenset({Feature.CLS_ATTENTION})
_LM_HEAD: Final = "lm_head.weight"
_CLIP_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD: Final = (0.26862954, 0.26130258, 0.27577711)
_NUMBER: Final = r"\s*(-?\d+(?:\.\d+)?)\s*"
_BOX: Final = BoxFormat(
    attempt=r"\[[^\[\]]*\]?",
    pattern=rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]",
    scale=1.0,
    frame="padded-square",
)
_TEMPLATE: Final = (
    "USER: <image>\nPlease provide the bounding box coordinate of the region this sentence "
    "describes: {phrase} ASSISTANT:"
)
_SHORT_PREFIX: Final = 5
_RENAMES: Final = (
    (re.compile(r"^model\.(?=(vision_tower|multi_modal_projector|language_model)\.)"), ""),
    (re.compile(r"^vision_tower\.vision_model\."), "vision_tower."),
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^language_model\.model\."), "language_model."),
)


def read_spec(checkpoint: Checkpoint) -> ModelSpec:
    """Read config.json and the preprocessing config.

    Raises:
        CheckpointError: The config describes something that this family does not have.
    """
    where = str(checkpoint.folder / "config.json")
    data = checkpoint.read_json("config.json") or {}
    if data.get("model_type") != "llava":
        raise CheckpointError(f"{where}: model_type {data.get('model_type')!r}, expected 'llava'")
    try:
        config = LlavaConfig.from_dict(data)
    except (TypeError, ValueError, KeyError, AttributeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{where}: not a LLaVA config ({reason:.200})") from error
    vision, text = config.vision_config, config.text_config
    if vision.model_type != "clip_vision_model":
        raise CheckpointError(
            f"{where}: vision_config.model_type '{vision.model_type}', expected clip_vision_model"
        )
    if config.vision_feature_select_strategy != "default":
        raise CheckpointError(
            f"{where}: vision_feature_select_strategy '{config.vision_feature_select_strategy}' "
            "keeps the CLS token among the patches; expected 'default'"
        )
    if not isinstance(config.vision_feature_layer, int):
        raise CheckpointError(
            f"{where}: vision_feature_layer {config.vision_feature_layer}, expected one layer"
        )
    resolve_layer(vision, config.vision_feature_layer, where)
    for name, wanted in (("image_size", int), ("patch_size", int)):
        if not isinstance(getattr(vision, name), wanted):
            raise CheckpointError(
                f"{where}: vision_config.{name} {getattr(vision, name)}, expected one number"
            )
    if vision.num_channels != 3:
        raise CheckpointError(f"{where}: vision_config.num_channels is not 3")
    if data.get("quantization_config"):
        raise CheckpointError(
            f"{where}: the checkpoint is quantized; give the one that it was made from"
        )
    shape = read_llama_shape(text, where)
    side = vision.image_size // vision.patch_size
    return ModelSpec(
        grid=(side, side),
        image_side=vision.image_size,
        vision_width=vision.hidden_size,
        width=shape.width,
        layers=shape.layers,
        cache_heads=shape.cache_heads,
        head_dim=shape.head_dim,
        vocabulary=shape.vocabulary,
        max_positions=text.max_position_embeddings,
        image_token_id=_image_token_id(data, config),
        stop_ids=_stop_ids(checkpoint, text.eos_token_id),
        preprocess=_read_preprocess(checkpoint, vision.image_size),
        box=_BOX,
        template=_TEMPLATE,
        prefix=_SHORT_PREFIX,
        library_config=config,
    )


def canonical_name(key: str) -> str:
    """Name of a tensor in the traced modules, from its key in any known file layout."""
    for pattern, replacement in _RENAMES:
        key = pattern.sub(replacement, key)
    return key


def substitute(name: str, spec: ModelSpec) -> str | None:
    """The embedding table stands in for a tied head that the files leave out."""
    config = spec.library_config
    tied = config.tie_word_embeddings or config.text_config.tie_word_embeddings
    return EMBEDDING if name == _LM_HEAD and tied else None


def build_tower(spec: ModelSpec, needs: frozenset[Feature]) -> nn.Module:
    """CLIP up to the block that the projector reads."""
    config = spec.library_config
    layer = resolve_layer(config.vision_config, config.vision_feature_layer, "config.json")
    return ClipTower(config.vision_config, layer, needs)


def fill_constants(tower: nn.Module) -> None:
    """Give values to the tower's buffers that no checkpoint holds."""
    assert isinstance(tower, ClipTower)
    tower.fill_constants()


def build_projector(spec: ModelSpec) -> nn.Module:
    """Hugging Face's projector, under its name in the checkpoint."""
    return _Projector(spec.library_config)


def build_decoder(spec: ModelSpec, tables: tuple[Tensor, ...]) -> nn.Module:
    """The Llama decoder."""
    shape = read_llama_shape(spec.library_config.text_config, "config.json")
    return LlamaDecoder(shape, *tables)


def rotary_tables(spec: ModelSpec, positions: int) -> tuple[Tensor, ...]:
    """Cosine and sine by position ID."""
    return llama_tables(spec.library_config.text_config, positions)


def load_eager(checkpoint: Checkpoint, spec: ModelSpec, dtype: str) -> EagerModel:
    """Hugging Face's LlavaForConditionalGeneration with the checkpoint's weights."""
    try:
        return _EagerLlava(checkpoint, spec, getattr(torch, dtype))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{checkpoint.folder}: transformers cannot load it ({reason:.200}); mend it, or "
            "export the graphs alone with --no-reference"
        ) from error


class _Projector(nn.Module):
    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.multi_modal_projector = LlavaMultiModalProjector(config)

    def forward(self, patches_BNC: Tensor) -> Tensor:
        tokens_BND: Tensor = self.multi_modal_projector(patches_BNC)
        return tokens_BND


class _EagerLlava:
    """Hugging Face's own model, processor and tokenizer."""

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec, dtype: torch.dtype) -> None:
        model = LlavaForConditionalGeneration.from_pretrained(
            checkpoint.folder, dtype=dtype, attn_implementation="eager", local_files_only=True
        )
        self._model = model.eval()
        self._spec = spec
        config = spec.library_config
        self._layer = resolve_layer(
            config.vision_config, config.vision_feature_layer, "config.json"
        )
        self._processor = _load_processor(checkpoint, spec.image_side)
        self._tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, local_files_only=True)

    def make_pixels(self, picture: Image.Image) -> Tensor:
        pixels: Tensor = self._processor(picture, return_tensors="pt")["pixel_values"]
        return pixels

    @torch.no_grad()
    def look(self, pixels: Tensor) -> EagerVision:
        output = self._model.model.vision_tower(
            pixels.to(self._model.dtype), output_hidden_states=True, output_attentions=True
        )
        return EagerVision(
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            layer=self._layer,
            grid=self._spec.grid,
        )

    @torch.no_grad()
    def project(self, vision: EagerVision) -> Tensor:
        features = vision.hidden_states[self._layer][:, 1:]
        tokens: Tensor = self._model.model.multi_modal_projector(features)[0]
        return tokens

    def encode(self, prompt: str) -> list[int]:
        ids: list[int] = self._tokenizer(prompt)["input_ids"]
        return ids

    def decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text.strip()

    @torch.no_grad()
    def embed(self, token_ids: list[int]) -> Tensor:
        table = self._model.get_input_embeddings()
        rows: Tensor = table(torch.tensor(token_ids, dtype=torch.int64))
        return rows

    def start_cache(self) -> Any:
        return DynamicCache()

    @torch.no_grad()
    def run_decoder(self, embeddings: Tensor, position_ids: Tensor, cache: Any) -> Tensor:
        rows, seen = len(embeddings), cache.get_seq_length()
        # An explicit mask: without one the library takes gaps in the position IDs for the
        # borders of packed sequences.
        hidden = torch.full((rows, seen + rows), torch.finfo(self._model.dtype).min)
        mask = hidden.triu(seen + 1).to(self._model.dtype)[None, None]
        output = self._model.model.language_model(
            inputs_embeds=embeddings[None],
            position_ids=position_ids[None],
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        )
        logits: Tensor = self._model.lm_head(output.last_hidden_state[0, -1])
        return logits.float()


def _image_token_id(data: dict[str, Any], config: LlavaConfig) -> int:
    """The image token under any of the names that the config has had."""
    for name in ("image_token_id", "image_token_index"):
        if isinstance(data.get(name), int):
            return int(data[name])
    return int(config.image_token_id)


def _stop_ids(checkpoint: Checkpoint, configured: int | list[int] | None) -> tuple[int, ...]:
    """End-of-sequence tokens: the generation config's, else the text config's."""
    generation = checkpoint.read_json("generation_config.json") or {}
    found = generation.get("eos_token_id", configured)
    if found is None:
        found = configured
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(token) is int for token in ids):
        raise CheckpointError(f"{checkpoint.folder}: eos_token_id {found!r}, expected numbers")
    return tuple(ids)


def _read_preprocess(checkpoint: Checkpoint, side: int) -> Preprocess:
    """Mean and standard deviation from the processor's config, CLIP's where there is none.

    Always padded to a square: the processor's own default crops, which moves the box frame.

    Raises:
        CheckpointError: The processor does something that the runtime does not.
    """
    data = _processor_config(checkpoint)
    where = f"{checkpoint.folder}: image processor"
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if data.get(name) is False:
            raise CheckpointError(f"{where}: {name} is off, expected on")
    if data.get("resample") not in {None, int(Image.Resampling.BICUBIC)}:
        raise CheckpointError(f"{where}: resample {data['resample']}, expected 3 (bicubic)")
    if abs((data.get("rescale_factor") or 1 / 255) * 255 - 1) > 1e-6:
        raise CheckpointError(f"{where}: rescale_factor {data['rescale_factor']}, expected 1/255")
    for name in ("size", "crop_size"):
        sizes = data.get(name) or side
        if set(sizes.values() if isinstance(sizes, dict) else [sizes]) != {side}:
            raise CheckpointError(f"{where}: {name} {sizes}, but the vision tower takes {side}")
    mean = tuple(float(v) for v in data.get("image_mean") or _CLIP_MEAN)
    std = tuple(float(v) for v in data.get("image_std") or _CLIP_STD)
    if len(mean) != 3 or len(std) != 3:
        raise CheckpointError(f"{where}: image_mean and image_std need 3 values each")
    fill = (int(mean[0] * 255), int(mean[1] * 255), int(mean[2] * 255))
    return Preprocess(mode="pad", side=side, fill=fill, mean=mean, std=std)


def _processor_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The image processor's config under either of its file names; empty where there is none."""
    data = checkpoint.read_json("preprocessor_config.json")
    if data is None:
        data = (checkpoint.read_json("processor_config.json") or {}).get("image_processor")
    return data or {}


def _load_processor(checkpoint: Checkpoint, side: int) -> Any:
    """The library's processor as the checkpoint configures it, in its pad-to-square mode."""
    if _processor_config(checkpoint):
        return LlavaImageProcessorPil.from_pretrained(
            checkpoint.folder, do_pad=True, local_files_only=True
        )
    return LlavaImageProcessorPil(
        do_pad=True,
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
    )
