"""Shikra: CLIP tower at 224 pixels, one linear projector, LLaMA decoder, white padding.

The weights are published as differences to LLaMA's (`parts.base`), which are added tensor by
tensor; a checkpoint that is merged already is seen by its values and takes no base.

Of the authors' questions those that name the phrase before the picture cannot be used here, since
the number of tokens before the picture is fixed at export; the default is one that names it after.

References:
    Shikra: Unleashing Multimodal LLM's Referential Dialogue Magic, arXiv:2306.15195.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Final

from PIL import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from gap_export.blocks import llama
from gap_export.blocks.clip import (
    ClipTower,
    build_clip_text,
    clip_features,
    find_clip_weights,
    read_clip,
    read_text_spec,
    resolve_layer,
)
from gap_export.blocks.hf_config import (
    FRACTION_BOX,
    IGNORED,
    parse_config,
    processor_config,
    read_normalization,
    refuse_quantized,
    require_model_type,
)
from gap_export.blocks.projector import Projector
from gap_export.checkpoint.adapter import BASE, merge_into, read_part, require_whole
from gap_export.checkpoint.added_tokens import read_added_tokens
from gap_export.checkpoint.differences import holds_differences
from gap_export.checkpoint.index import Checkpoint
from gap_export.checkpoint.sources import (
    TensorSource,
    expected_shapes,
    match_tensors,
    require_shape,
    stored,
)
from gap_export.checkpoint.tokenizer_files import TokenizerFiles
from gap_export.config.records import ExportConfig
from gap_export.errors import CheckpointError
from gap_export.interfaces.family import EagerModel, ModelSpec
from gap_export.interfaces.features import Feature
from gap_export.reference.clip import EagerClip
from gap_export.reference.lazy import LazyTensor, sum_tensors
from gap_export.reference.llama import EagerLlama
from gap_export.reference.loader import language_key, merge_adapters, open_loader
from gap_export.reference.model import EagerGrounder, linear_layer, load_processor
from gap_runtime.pictures.preprocess import Bucket, Preprocess

# B batch (1), N patches, K kept, C vision width, D decoder width.

DECODER: Final = llama
TOWER_LAYERS: Final = "vision_tower.encoder.layers"
PARTS: Final = {
    "clip": "openai/clip-vit-large-patch14",
    "base": "huggyllama/llama-7b",
    "adapter": "adapter",
}
build_text_tower = build_clip_text
NEIGHBOURS: Final = {
    r"^llama$": "it is a part of a model alone: name the model and give the part, for example "
    "gap-export shikra-7b --set parts.base=FOLDER",
}
_LAYER: Final = -2
_FORM: Final = "[0.###,0.###,0.###,0.###]"
_TEMPLATE: Final = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: In <image>, I need the "
    "bounding box coordinates of {phrase}. ASSISTANT:"
)
_PREFIX: Final = 38
_PATCH_TOKEN: Final = "<im_patch>"
_FRAME: Final = ("<im_start>", "<im_end>")
_PROJECTOR: Final = "model.mm_projector"
_WHITE: Final = (255, 255, 255)
_STOP_ID: Final = 2
"""The config on the hub names others, which are wrong."""


def find_parts(checkpoint: Checkpoint, *, text: bool) -> dict[str, str]:
    """CLIP; and the base, where the checkpoint holds differences to it."""
    del text
    data = checkpoint.require_json("config.json")
    parts = {"clip": str(data.get("mm_vision_tower") or PARTS["clip"])}
    if holds_differences(checkpoint):
        parts["base"] = PARTS["base"]
    return parts


def read_spec(checkpoint: Checkpoint, config: ExportConfig) -> ModelSpec:
    """Read config.json and CLIP's configs.

    Raises:
        CheckpointError: The config describes something that this family does not have.
    """
    where = str(checkpoint.folder / "config.json")
    data = checkpoint.require_json("config.json")
    require_model_type(data, "shikra", where)
    refuse_quantized(data, where)
    clip = checkpoint.require_part("clip")
    vision, _ = read_clip(clip)
    layer = resolve_layer(vision, data.get("mm_vision_select_layer", _LAYER), where)
    if data.get("mm_hidden_size", vision.hidden_size) != vision.hidden_size:
        raise CheckpointError(
            f"{where}: mm_hidden_size {data['mm_hidden_size']}, but {clip.folder} is "
            f"{vision.hidden_size} wide; give the right CLIP checkpoint: --set parts.clip=DIR"
        )
    facts = {key: value for key, value in data.items() if key not in {"model_type", "dtype"}}
    text = parse_config(lambda: LlamaConfig(**facts), where, "Llama")
    decoder = llama.read_decoder(text, where)
    text_spec = read_text_spec(clip, vision.hidden_size)
    side = vision.image_size // vision.patch_size
    mean, std = read_normalization(clip, vision.image_size)
    frame = _FRAME if data.get("mm_use_im_start_end", True) else ()
    files = TokenizerFiles(folder=checkpoint.folder, rule="stripped", added=(_PATCH_TOKEN, *frame))
    return ModelSpec(
        buckets=(Bucket(name="", canvas=None, grids=((side, side),), strip=1, fixed=()),),
        vision_width=vision.hidden_size,
        features=clip_features(vision, text_spec),
        text=text_spec,
        decoder=decoder,
        tokenizer=files,
        image_text=_PATCH_TOKEN.join(frame or ("", "")),
        image_token_id=_find_patch_token(files),
        stop_ids=(_STOP_ID,),
        preprocess=Preprocess(
            mode="pad",
            side=vision.image_size,
            fill=_WHITE,
            mean=mean,
            std=std,
            canvases=(),
        ),
        box=dataclasses.replace(FRACTION_BOX, form=_FORM),
        template=config.prompt.template or _TEMPLATE,
        prefix=_PREFIX,
        library_config=_Config(vision, text, layer),
    )


def find_weights(checkpoint: Checkpoint, spec: ModelSpec) -> dict[str, TensorSource]:
    """CLIP's tensors and the language model's: the base, differences, an adapter added."""
    expected = llama.tensor_shapes(spec.decoder) | expected_shapes(lambda: build_projector(spec))
    own = match_tensors(
        checkpoint,
        expected,
        rename=_own_name,
        ignored=(*IGNORED, r"^model\.vision_tower\."),
    )
    sources = {name: stored(tensor) for name, tensor in own.items()}
    base = checkpoint.parts.get("base")
    _require_one_whole(checkpoint, base)
    if base is not None:
        data, where = base.require_json("config.json"), str(base.folder / "config.json")
        config = parse_config(lambda: LlamaConfig(**data), where, "Llama")
        plain = dataclasses.replace(spec.decoder, vocabulary=config.vocab_size)
        found = match_tensors(
            base, llama.tensor_shapes(plain), rename=llama.llama_name, ignored=IGNORED
        )
        for name, tensor in found.items():
            delta = own[name]
            if delta.shape[0] < tensor.shape[0]:
                require_shape(tensor, delta.shape)
            sources[name] = TensorSource(
                shape=delta.shape,
                inputs=(tensor, delta),
                make=_add_delta,
                cut=(True, True),
            )
    merge_into(sources, read_part(checkpoint, _own_name))
    clip = checkpoint.parts["clip"]
    return sources | find_clip_weights(clip, vision=True, text=spec.text is not None)


def build_tower(spec: ModelSpec, bucket: Bucket, needs: frozenset[Feature]) -> nn.Module:
    """CLIP up to the block that the projector reads."""
    del bucket
    config = spec.library_config
    text_width = spec.text.width if spec.text else None
    return ClipTower(config.vision, config.layer, needs, text_width=text_width)


def build_projector(spec: ModelSpec) -> nn.Module:
    """One linear layer, under its name in the checkpoint."""
    return Projector("mm_projector", nn.Linear(spec.vision_width, spec.decoder.width))


def load_eager(
    checkpoint: Checkpoint, spec: ModelSpec, dtype: str, *, memory: int | None = None
) -> EagerModel:
    """Hugging Face's CLIPVisionModel and LlamaForCausalLM, the differences added plainly."""
    config, clip = spec.library_config, checkpoint.parts["clip"]
    with open_loader(checkpoint, dtype, memory) as loader:
        names = {"vision_model.": ""}
        tower = loader.load(CLIPVisionModel, config.vision, part="clip", names=names)
        base = loader.open("base") if "base" in checkpoint.parts else {}
        adapters = read_part(checkpoint, _own_name)
        tensors = _add_base(loader.open(), base)
        tensors = merge_adapters(loader, tensors, adapters, key_of=language_key)
        model = loader.build(LlamaForCausalLM, config.text, tensors)
        projector = {key: each for key, each in tensors.items() if key.startswith(_PROJECTOR)}
        folder = clip.folder if processor_config(clip) else None
        process = load_processor(CLIPImageProcessorPil, folder, spec.preprocess.side)
        return EagerGrounder(
            tower=EagerClip(tower, config.layer),
            project=linear_layer(loader.read(projector), _PROJECTOR),
            language=EagerLlama(
                model.model, model.lm_head, spec.tokenizer, image_token_id=spec.image_token_id
            ),
            process=lambda picture: process(_expand(picture)),
            clip=None if spec.text is None else loader.load_clip_text(),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class _Config:
    """Both towers' configs and the hidden state that patches are taken from."""

    vision: Any
    text: LlamaConfig
    layer: int


def _find_patch_token(files: TokenizerFiles) -> int | None:
    """The token that visual tokens replace; None where there is no tokenizer."""
    if not files.exists:
        return None
    return next(token.id for token in read_added_tokens(files) if token.content == _PATCH_TOKEN)


def _own_name(key: str) -> str:
    """Name of a tensor of the published checkpoint."""
    if key.startswith("model.mm_projector."):
        return key.removeprefix("model.")
    return llama.llama_name(key)


def _require_one_whole(checkpoint: Checkpoint, base: Checkpoint | None) -> None:
    """Refuse differences without a base, a whole model with one, and differences as a base."""
    where = checkpoint.hub_id or checkpoint.folder
    if base is None and holds_differences(checkpoint):
        raise CheckpointError(
            f"{where}: holds differences to LLaMA's weights, not a model; give the LLaMA that "
            "they were made from: --set parts.base=DIR"
        )
    if base is None:
        return
    require_whole(base, BASE)
    if not holds_differences(checkpoint):
        raise CheckpointError(
            f"{where}: holds a whole model, to which {base.folder} would be added; leave the base "
            "out: --set parts.base="
        )
    if holds_differences(base):
        raise CheckpointError(
            f"{base.folder}: holds differences, not a model, expected LLaMA's weights; give them: "
            "--set parts.base=DIR"
        )


def _add_delta(base: Tensor, delta: Tensor) -> Tensor:
    """The sum; rows of new tokens have no base."""
    delta[: base.shape[0]] += base
    return delta


def _add_base(
    differences: dict[str, LazyTensor], base: dict[str, LazyTensor]
) -> dict[str, LazyTensor]:
    """The model's tensors by the checkpoint's own keys."""
    added = {
        key: sum_tensors(differences[key], tensor)
        for key, tensor in base.items()
        if not key.endswith("inv_freq")
    }
    return differences | added


def _expand(picture: Image.Image) -> Image.Image:
    """The picture in the middle of a white square."""
    width, height = picture.size
    canvas = Image.new("RGB", (max(width, height),) * 2, _WHITE)
    if width > height:
        canvas.paste(picture, (0, (width - height) // 2))
    else:
        canvas.paste(picture, ((height - width) // 2, 0))
    return canvas
