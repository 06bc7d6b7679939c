"""Small random LLaVA checkpoints in Hugging Face's layout, for tests that need other sizes."""

import json
import math
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tools.places import ROOT
from transformers import (
    AutoConfig,
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

REFSHAPES = ROOT / "refshapes" / "checkpoint"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

_TO_CANONICAL = (
    (re.compile(r"^model\.(?=(vision_tower|multi_modal_projector|language_model)\.)"), ""),
    (re.compile(r"^vision_tower\.vision_model\."), "vision_tower."),
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^language_model\.model\."), "language_model."),
)
_TO_LEGACY = (
    (re.compile(r"^vision_tower\."), "vision_tower.vision_model."),
    (re.compile(r"^language_model\."), "language_model.model."),
    (re.compile(r"^lm_head\."), "language_model.lm_head."),
)
_TO_MODERN = (
    (re.compile(r"^vision_tower\."), "model.vision_tower.vision_model."),
    (re.compile(r"^multi_modal_projector\."), "model.multi_modal_projector."),
    (re.compile(r"^language_model\."), "model.language_model."),
)


def make_llava_checkpoint(
    folder,
    *,
    image_size=56,
    patch_size=14,
    vision_width=32,
    vision_layers=3,
    vision_heads=4,
    vision_feature_layer=-2,
    vision=None,
    text="llama",
    width=64,
    layers=2,
    heads=4,
    kv_heads=None,
    head_dim=None,
    mlp=96,
    vocabulary=None,
    max_positions=512,
    rope_theta=10000.0,
    sections=None,
    dtype="float32",
    tied=False,
    names="legacy",
    max_shard_size=None,
    tokenizer=True,
    spread=0.15,
    seed=0,
):
    """Make a small random LLaVA, as `save_pretrained` writes it, and return its folder.

    Args:
        folder: Is created.
        image_size: Pixels; the patch grid is `image_size // patch_size` squared.
        patch_size: Pixels.
        vision_width: Of the CLIP tower.
        vision_layers: Of the CLIP tower; the last one is not used with the feature layer -2.
        vision_heads: Of the CLIP tower.
        vision_feature_layer: Hidden state that the projector reads.
        vision: Config of another tower, all of whose tokens are patches; CLIP's where None.
        text: Type of the decoder.
        width: Of the decoder.
        layers: Of the decoder.
        heads: Query heads.
        kv_heads: Key and value heads; as many as `heads` where None.
        head_dim: `width / heads` where None.
        mlp: Width of the gated MLP.
        vocabulary: Rows of the embedding table; what the tokenizer needs where None.
        max_positions: Of the decoder.
        rope_theta: Base of the rotary frequencies.
        sections: How many of them are turned by time, row and column; None where one ID counts.
        dtype: That the weights are stored in.
        tied: Whether the head is the embedding table (and is left out of the files).
        names: Tensor names: `legacy` as llava-hf stores them (`language_model.model...`,
            `vision_tower.vision_model...`), `modern` (`model.language_model...`, `lm_head`) or
            `library` (whatever the installed transformers writes).
        max_shard_size: For example `100KB` to get several files and an index.
        tokenizer: Whether to add refshapes' tokenizer files.
        spread: Standard deviation of the weights: wide, so that attention is far from uniform.
        seed: Of the weights.
    """
    assert names in {"legacy", "modern", "library"}
    folder = Path(folder)
    entries = json.loads((REFSHAPES / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {token["content"]: token["id"] for token in entries["added_tokens"]}
    fitting = math.ceil((1 + max(entries["model"]["vocab"].values())) / 32) * 32
    strategy = "default" if vision is None else "full"
    vision = vision or CLIPVisionConfig(
        hidden_size=vision_width,
        intermediate_size=2 * vision_width,
        num_hidden_layers=vision_layers,
        num_attention_heads=vision_heads,
        image_size=image_size,
        patch_size=patch_size,
        projection_dim=vision_width,
    )
    text_config = AutoConfig.for_model(
        text,
        vocab_size=vocabulary or fitting,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        head_dim=head_dim or width // heads,
        max_position_embeddings=max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta}
        | ({"mrope_section": sections} if sections else {}),
        bos_token_id=ids["<s>"],
        eos_token_id=ids["</s>"],
        pad_token_id=ids["<pad>"],
        tie_word_embeddings=tied,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text_config,
        image_token_index=ids["<image>"],
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy=strategy,
        image_seq_length=(image_size // patch_size) ** 2,
        tie_word_embeddings=tied,
    )
    generator = torch.Generator().manual_seed(seed)
    state = torch.random.get_rng_state()
    model = LlavaForConditionalGeneration(config)
    torch.random.set_rng_state(state)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * spread
            # Norm weights lie around one, everything else around zero.
            parameter.copy_(noise + (1 if parameter.ndim == 1 and parameter.mean() > 0.5 else 0))
    model = model.to(getattr(torch, dtype))
    model.generation_config = GenerationConfig(
        bos_token_id=ids["<s>"], eos_token_id=ids["</s>"], pad_token_id=ids["<pad>"]
    )
    model.save_pretrained(folder, **({"max_shard_size": max_shard_size} if max_shard_size else {}))
    CLIPImageProcessor(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
    ).save_pretrained(folder)
    if names != "library":
        rename_tensors(folder, lambda key: stored_name(key, names))
    if tokenizer:
        for name in TOKENIZER_FILES:
            shutil.copyfile(REFSHAPES / name, folder / name)
    return folder


def stored_name(key, names):
    """A tensor's name in the `legacy` or the `modern` layout, from any layout."""
    for pattern, replacement in _TO_CANONICAL:
        key = pattern.sub(replacement, key)
    for pattern, replacement in _TO_LEGACY if names == "legacy" else _TO_MODERN:
        key = pattern.sub(replacement, key)
    return key


def rename_tensors(folder, rename):
    """Rewrite all safetensors files of a folder, and its index, with other tensor names."""
    edit_tensors(folder, lambda tensors: {rename(key): value for key, value in tensors.items()})


def edit_tensors(folder, edit):
    """Rewrite every safetensors file of a folder, and its index, through `edit(tensors)`."""
    places = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = {key: value.clone() for key, value in load_file(path).items()}
        tensors = {key: value.contiguous() for key, value in edit(tensors).items()}
        save_file(tensors, path, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, path.name)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        data = json.loads(index.read_text(encoding="utf-8"))
        data["weight_map"] = places
        index.write_text(json.dumps(data), encoding="utf-8")


def read_tensors(folder):
    """All tensors of a checkpoint folder by name, with safetensors' own reader."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors
