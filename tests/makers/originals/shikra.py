"""Shikra as in shikras/shikra-7b-delta-v1, with its LLaMA and its CLIP."""

from dataclasses import dataclass
from pathlib import Path

import torch

from makers.originals.clip import make_clip
from makers.originals.files import SPREAD, Draw, cast, linear, save_tensors, write_json
from makers.originals.llama import (
    BEFORE_431,
    llama_config,
    llama_tensors,
    order_state,
    rotary_buffers,
)
from makers.originals.tokenizers import make_sentencepiece

SHIKRA_TOKENS = ("<im_patch>", "<im_start>", "<im_end>")


@dataclass(frozen=True, kw_only=True)
class ShikraFiles:
    """Folders of a Shikra, and what the delta must come to."""

    delta: Path
    base: Path
    clip: Path
    # The delta's names without its buffers, float32: base + delta, added in float32.
    merged: dict


def make_shikra(
    home,
    *,
    vocabulary=400,
    width=48,
    layers=2,
    heads=4,
    mlp=80,
    max_positions=512,
    image_size=56,
    patch_size=14,
    vision_width=32,
    vision_layers=3,
    vision_heads=4,
    clip_files="safetensors",
    dtype="float16",
    spread=SPREAD,
    seed=0,
):
    """Make a Shikra as published, in `home/delta`, `home/base` and `home/clip`.

    Args:
        home: Is created.
        vocabulary: Of the base; the delta has three rows more.
        width: Of the decoder.
        layers: Of the decoder.
        heads: Of the decoder.
        mlp: Width of the gated MLP.
        max_positions: Of the decoder.
        image_size: Pixels.
        patch_size: Pixels.
        vision_width: Of the CLIP tower.
        vision_layers: Of the CLIP tower.
        vision_heads: Of the CLIP tower.
        clip_files: `make_clip`'s `files`.
        dtype: That base and delta are stored in (the base's rotary buffers are float32).
        spread: Standard deviation of the weights.
        seed: Of the weights.
    """
    home = Path(home)
    clip = make_clip(
        home / "clip",
        image_size=image_size,
        patch_size=patch_size,
        vision_width=vision_width,
        vision_layers=vision_layers,
        vision_heads=vision_heads,
        files=clip_files,
        spread=spread,
        seed=seed + 1,
    )
    draw = Draw(seed, spread)
    base = cast(llama_tensors(draw, vocabulary, width, layers, heads, heads, mlp), dtype)
    rows = vocabulary + len(SHIKRA_TOKENS)
    target = llama_tensors(draw, rows, width, layers, heads, heads, mlp)
    delta = {}
    for name, value in target.items():
        known = base[name].float()
        delta[name] = value.clone()
        delta[name][: len(known)] -= known
    delta |= linear(draw, "model.mm_projector", width, vision_width)
    delta = cast(delta, dtype)
    merged = {name: value.float() for name, value in delta.items()}
    for name, known in base.items():
        merged[name][: len(known)] += known.float()
    buffers = rotary_buffers(layers, width // heads)

    # Written before tokenizer configs had the key.
    folder = make_sentencepiece(home / "base", vocabulary=vocabulary, legacy=None)
    save_tensors(folder, order_state(base | buffers, BEFORE_431), "bin", shards=2)
    config = llama_config(vocabulary, width, layers, heads, mlp, max_positions, dtype, eps=1e-6)
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    right = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    right |= {"transformers_version": "4.28.0.dev0"}
    write_json(folder / "config.json", config | right)
    write_json(folder / "generation_config.json", right)

    folder = make_sentencepiece(
        home / "delta", vocabulary=vocabulary, added=SHIKRA_TOKENS, legacy=None
    )
    # The difference of two equal buffers, which stay in float32 whatever the weights are in.
    zeros = {name: torch.zeros_like(value) for name, value in buffers.items()}
    save_tensors(folder, order_state(delta | zeros, BEFORE_431), "bin", shards=2)
    wrong = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}
    wrong |= {"transformers_version": "4.28.0.dev0"}
    config |= wrong | {
        "architectures": ["ShikraLlamaForCausalLM"],
        "freeze_mm_mlp_adapter": False,
        "max_sequence_length": max_positions,
        "mm_hidden_size": vision_width,
        "mm_use_im_start_end": True,
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14",
        "model_type": "shikra",
        "tune_mm_mlp_adapter": False,
        "use_cache": False,
        "use_mm_proj": True,
        "vocab_size": rows,
    }
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", wrong | {"_from_model_config": True})
    return ShikraFiles(delta=home / "delta", base=home / "base", clip=clip, merged=merged)
