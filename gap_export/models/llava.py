"""LLaVA-1.5: CLIP tower, two-layer projector, Llama decoder, pictures padded to a square.

Reads Hugging Face's layout, in the key names of every transformers version since 4.36, and the
original one, whose vision tower lies in the CLIP checkpoint beside it.

References:
    Improved Baselines with Visual Instruction Tuning, arXiv:2310.03744; llava-hf checkpoints;
    liuhaotian checkpoints.
"""

from __future__ import annotations

import re
from typing import Any, Final

from torch import nn
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers import LlavaImageProcessorPil as LlavaProcessor
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from gap_export.blocks import llama
from gap_export.blocks.chat import REGION_QUESTION, choose_prompt
from gap_export.blocks.clip import (
    ClipTower,
    build_clip_text,
    clip_features,
    find_clip_weights,
    read_clip,
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
    parse_config,
    processor_config,
    read_normalization,
    require_clip_tower,
    require_model_type,
    require_patches_alone,
)
from gap_export.blocks.projector import Projector
from gap_export.checkpoint.adapter import (
    add_adapters,
    choose_base,
    find_base,
    is_partial,
    read_adapters,
    replace_values,
)
from gap_export.checkpoint.differences import refuse_differences
from gap_export.checkpoint.index import Checkpoint
from gap_export.checkpoint.packed import read_packing, without_quantization
from gap_export.checkpoint.sources import TensorSource, expected_shapes
from gap_export.checkpoint.tokenizer_files import TokenizerFiles
from gap_export.config.records import ExportConfig
from gap_export.errors import CheckpointError
from gap_export.interfaces.family import EagerModel, ModelSpec
from gap_export.interfaces.features import Feature
from gap_export.reference.lazy import LazyTensor, rename_tensors
from gap_export.reference.loader import Loader, merge_adapters, open_loader
from gap_export.reference.model import join_parts, load_processor
from gap_runtime.pictures.preprocess import Bucket, Preprocess

# B batch (1), N patches, K kept, C vision width, D decoder width, S rows, V vocabulary.

DECODER: Final = llama
TOWER_LAYERS: Final = "vision_tower.encoder.layers"
PARTS: Final = {
    "clip": "openai/clip-vit-large-patch14-336",
    "base": "lmsys/vicuna-7b-v1.5",
    "adapter": "adapter",
}
build_text_tower = build_clip_text
TYPES: Final = ("llava_llama",)
"""What the authors' later code writes, in their layout."""
NEIGHBOURS: Final = {
    r"^clip": "it is a part of a model alone: name the model and give the part with "
    "--set parts.clip=FOLDER",
}
_TEMPLATES: Final = dict.fromkeys(
    ("llama", "mistral"), f"USER: <image>\n{REGION_QUESTION} ASSISTANT:"
)
_FRAMED: Final = "<im_start><image><im_end>"
"""What stands for the picture where `mm_use_im_start_end` is on."""
_NOT_READ: Final = {
    "s2": "a tower that looks at several scales of a picture (S2)",
    "mm_resampler_type": "a resampler between tower and projector",
}
"""Keys of the authors' configs, and what they switch on between picture and projector."""
_SHORT_PREFIX: Final = 5
_ORIGINAL_NAMES: Final = (
    (re.compile(r"^model\.mm_projector\.0\."), "multi_modal_projector.linear_1."),
    (re.compile(r"^model\.mm_projector\.2\."), "multi_modal_projector.linear_2."),
    (re.compile(r"^model\.vision_tower\.vision_tower\."), "vision_tower."),
    (re.compile(r"^model\.(?=(embed_tokens|layers|norm)\.)"), "language_model."),
)


def find_parts(checkpoint: Checkpoint, *, text: bool) -> dict[str, str]:
    """CLIP, for the vision tower in the original layout, for the text tower in any; and the base.

    An adapter of a whole model is no part that a checkpoint needs.
    """
    data = checkpoint.require_json("config.json")
    parts = {}
    if _is_original(data) or text:
        parts["clip"] = str(data.get("mm_vision_tower") or PARTS["clip"])
    if is_partial(checkpoint):
        parts["base"] = find_base(checkpoint, PARTS["base"])
    return parts


def read_spec(checkpoint: Checkpoint, config: ExportConfig) -> ModelSpec:
    """Read config.json and the preprocessing config.

    Raises:
        CheckpointError: The config describes something that this family does not have.
    """
    where = str(checkpoint.folder / "config.json")
    data = checkpoint.require_json("config.json")
    require_model_type(data, "llava", where)
    original, base = _is_original(data), choose_base(checkpoint)
    refuse_differences(base)
    read_packing(base.require_json("config.json"), str(base.folder / "config.json"))
    # How an adapter's base was loaded for training is no matter.
    data = without_quantization(data)
    library = _read_original(checkpoint, data, where) if original else _read_library(data, where)
    vision, text = library.vision_config, library.text_config
    require_clip_tower(vision, where)
    require_patches_alone(library, where)
    resolve_layer(vision, library.vision_feature_layer, where)
    decoder = llama.read_decoder(text, where, is_tied=library.tie_word_embeddings)
    clip = checkpoint.parts.get("clip")
    text_spec = None if clip is None else read_text_spec(clip, vision.hidden_size)
    grid = (vision.image_size // vision.patch_size,) * 2
    processor = checkpoint.parts["clip"] if original else base
    mean, std = read_normalization(processor, vision.image_size)
    image_token_id = None if original else find_image_token(data, library.image_token_id)
    prompt = choose_prompt(
        base,
        question=REGION_QUESTION,
        templates=_TEMPLATES,
        text=text,
        image_token_id=image_token_id,
        config=config.prompt,
    )
    added = _added_tokens(data) if original else ()
    notes = (*prompt.notes, *_describe_cropping(data, where)) if original else prompt.notes
    return ModelSpec(
        buckets=(Bucket(name="", canvas=None, grids=(grid,), strip=1, fixed=()),),
        vision_width=vision.hidden_size,
        features=clip_features(vision, text_spec),
        text=text_spec,
        decoder=decoder,
        tokenizer=TokenizerFiles(
            folder=base.folder, rule="pieces" if original else "file", added=added
        ),
        image_text=_FRAMED if added else None,
        image_token_id=image_token_id,
        stop_ids=find_stop_ids(base, text.eos_token_id, decoder.vocabulary),
        # Always padded: the library's default crops, which moves the box frame.
        preprocess=Preprocess(
            mode="pad",
            side=vision.image_size,
            fill=(int(mean[0] * 255), int(mean[1] * 255), int(mean[2] * 255)),
            mean=mean,
            std=std,
            canvases=(),
        ),
        box=FRACTION_BOX,
        template=prompt.template,
        prefix=_SHORT_PREFIX,
        library_config=library,
        notes=notes,
    )


def find_weights(checkpoint: Checkpoint, spec: ModelSpec) -> dict[str, TensorSource]:
    """Every tensor, in either layout, with adapters merged; a tower inside wins over CLIP's."""
    config = spec.library_config
    expected = expected_shapes(lambda: build_projector(spec)) | llama.tensor_shapes(spec.decoder)
    adapters = read_adapters(checkpoint, _canonical_name)
    files = replace_values(choose_base(checkpoint), adapters, _canonical_name)
    original = _is_original(checkpoint.require_json("config.json"))
    inside = not original or any("vision_tower." in key for key in files.tensors)
    if inside:
        expected |= tower_shapes(config.vision_config)
    sources = llama.match_weights(
        files,
        spec.decoder,
        expected,
        rename=_canonical_name,
        ignored=IGNORED,
    )
    clip = checkpoint.parts.get("clip")
    if clip is not None:
        sources |= find_clip_weights(clip, vision=not inside, text=spec.text is not None)
    add_adapters(sources, adapters)
    return sources


def build_tower(spec: ModelSpec, bucket: Bucket, needs: frozenset[Feature]) -> nn.Module:
    """CLIP up to the block that the projector reads."""
    del bucket
    config = spec.library_config
    layer = resolve_layer(config.vision_config, config.vision_feature_layer, "config.json")
    text_width = spec.text.width if spec.text else None
    return ClipTower(config.vision_config, layer, needs, text_width=text_width)


def build_projector(spec: ModelSpec) -> nn.Module:
    """Hugging Face's projector, under its name in the checkpoint."""
    return Projector("multi_modal_projector", LlavaMultiModalProjector(spec.library_config))


def load_eager(
    checkpoint: Checkpoint, spec: ModelSpec, dtype: str, *, memory: int | None = None
) -> EagerModel:
    """Hugging Face's LlavaForConditionalGeneration with the checkpoint's weights."""
    kind, config = LlavaForConditionalGeneration, spec.library_config
    original = _is_original(checkpoint.require_json("config.json"))
    part = "base" if "base" in checkpoint.parts else None
    pictures = checkpoint.parts["clip"] if original else choose_base(checkpoint)
    adapters = read_adapters(checkpoint, _canonical_name)
    with open_loader(checkpoint, dtype, memory) as loader:
        if original:
            tensors = merge_adapters(loader, _original_tensors(loader, part), adapters)
            model = loader.build(kind, config, tensors)
        else:
            model = loader.load(kind, config, part=part, adapters=adapters)
        process = load_processor(
            LlavaProcessor,
            pictures.folder if processor_config(pictures) else None,
            spec.preprocess.side,
            always={"do_pad": True},
        )
        layer = resolve_layer(config.vision_config, config.vision_feature_layer, "config.json")
        return join_parts(model, loader, spec, layer=layer, process=process)


def _is_original(data: dict[str, Any]) -> bool:
    """Whether a config is of the layout that the authors published."""
    return "mm_hidden_size" in data and "text_config" not in data


def _added_tokens(data: dict[str, Any]) -> tuple[str, ...]:
    """What the authors' code adds to a tokenizer so that the picture can be framed; else none."""
    if not data.get("mm_use_im_start_end"):
        return ()
    patch = ("<im_patch>",) if data.get("mm_use_im_patch_token", True) else ()
    return (*patch, "<im_start>", "<im_end>")


def _describe_cropping(data: dict[str, Any], where: str) -> tuple[str, ...]:
    """A line for people about a model whose authors' code would show it less of a picture."""
    found = data.get("image_aspect_ratio")
    if found == "pad":
        return ()
    return (
        (
            f"{where}: image_aspect_ratio is {found!r}, with which its authors' code cuts off the "
            "edges of pictures; here they are padded, since a box may lie there"
        ),
    )


def _read_library(data: dict[str, Any], where: str) -> LlavaConfig:
    return parse_config(lambda: LlavaConfig(**data), where, "LLaVA")


def _read_original(checkpoint: Checkpoint, data: dict[str, Any], where: str) -> LlavaConfig:
    """The library's config for a checkpoint in the authors' layout."""
    tiles = str(data.get("image_aspect_ratio")).startswith("anyres")
    if tiles or str(data.get("mm_patch_merge_type", "flat")) != "flat":
        raise CheckpointError(
            f"{where}: LLaVA-NeXT (1.6) in its authors' layout, which is not read; give the same "
            "model in Hugging Face's layout, for example llava-hf/llava-v1.6-vicuna-7b-hf, with "
            "gap-export llava-next-vicuna-7b --checkpoint FOLDER"
        )
    for name, what in _NOT_READ.items():
        if data.get(name):
            raise CheckpointError(
                f"{where}: {name} is {data[name]!r:.60}, {what}, which no family here has; give "
                "a LLaVA without it, for example llava-hf/llava-1.5-7b-hf"
            )
    kind = data.get("mm_projector_type")
    if kind != "mlp2x_gelu":
        raise CheckpointError(
            f"{where}: mm_projector_type '{kind}', expected mlp2x_gelu, which LLaVA-1.5 has; give "
            "one of those, for example llava-hf/llava-1.5-7b-hf"
        )
    clip = checkpoint.require_part("clip")
    vision, _ = read_clip(clip)
    if vision.hidden_size != data.get("mm_hidden_size"):
        raise CheckpointError(
            f"{where}: mm_hidden_size {data.get('mm_hidden_size')}, but {clip.folder} is "
            f"{vision.hidden_size} wide; give the CLIP checkpoint that it was trained with: "
            "--set parts.clip=DIR"
        )
    facts = {key: value for key, value in data.items() if key not in {"model_type", "dtype"}}
    text = parse_config(lambda: LlamaConfig(**facts), where, "Llama")
    features = {"patch": "default", "cls_patch": "full"}

    def make() -> LlavaConfig:
        return LlavaConfig(
            vision_config=vision,
            text_config=text,
            vision_feature_layer=data.get("mm_vision_select_layer", -2),
            vision_feature_select_strategy=features.get(
                data.get("mm_vision_select_feature", "patch"), "full"
            ),
            tie_word_embeddings=text.tie_word_embeddings,
        )

    return parse_config(make, where, "LLaVA")


def _canonical_name(key: str) -> str:
    """Name of a tensor in the modules here, from its key in any known file layout."""
    for pattern, replacement in _ORIGINAL_NAMES:
        key = pattern.sub(replacement, key)
    return library_name(key)


def _original_tensors(loader: Loader, part: str | None) -> dict[str, LazyTensor]:
    """Tensors of CLIP and of the model by the library's names; a tower in the model's own wins."""
    own = {
        "model.vision_tower.vision_tower.vision_model.": "model.vision_tower.",
        "model.mm_projector.0.": "model.multi_modal_projector.linear_1.",
        "model.mm_projector.2.": "model.multi_modal_projector.linear_2.",
        "model.": "model.language_model.",
    }
    clip = rename_tensors(loader.open("clip"), {"vision_model.": "model.vision_tower."})
    return clip | rename_tensors(loader.open(part), own)
