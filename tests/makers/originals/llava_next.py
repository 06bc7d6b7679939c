"""LLaVA-NeXT as in llava-hf/llava-v1.6-vicuna-7b-hf and llava-hf/llava-v1.6-mistral-7b-hf."""

import json
import shutil
from pathlib import Path

import torch
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
)

from makers.checkpoints import REFSHAPES, TOKENIZER_FILES, rename_tensors, stored_name
from makers.originals.clip import CLIP_MEAN, CLIP_STD
from makers.originals.files import SPREAD, Draw, write_json

# Tiles down, tiles across, in the order of the published pinpoints.
NEXT_TILES = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


def make_llava_next(
    folder,
    *,
    text="llama",
    names="legacy",
    image_size=28,
    patch_size=14,
    vision_width=32,
    vision_layers=3,
    vision_heads=4,
    width=48,
    layers=2,
    heads=4,
    kv_heads=None,
    mlp=80,
    vocabulary=None,
    max_positions=1024,
    tiles=NEXT_TILES,
    max_shard_size=None,
    dtype="float32",
    spread=SPREAD,
    seed=0,
):
    """Make a LLaVA-NeXT in Hugging Face's layout and return its folder.

    Args:
        folder: Is created.
        text: `llama` (Vicuna), or `mistral`: grouped heads, rotary base 1e6, no sliding window.
        names: Tensor names: `legacy` as llava-hf stores them (`language_model.model...`,
            `vision_tower.vision_model...`, `image_newline`) with a config of that time, or
            `modern` (`model.language_model...`, `model.image_newline`, `lm_head`) with the
            library's config of today.
        image_size: Pixels of one tile.
        patch_size: Pixels.
        vision_width: Of the CLIP tower.
        vision_layers: Of the CLIP tower.
        vision_heads: Of the CLIP tower.
        width: Of the decoder.
        layers: Of the decoder.
        heads: Query heads.
        kv_heads: Key and value heads; where None, `heads` for Llama and half for Mistral.
        mlp: Width of the gated MLP.
        vocabulary: Rows of the embedding table; what refshapes' tokenizer needs where None.
        max_positions: Of the decoder.
        tiles: Canvases as (tiles down, tiles across).
        max_shard_size: For example `100KB` to get several files and an index.
        dtype: That the weights are stored in.
        spread: Standard deviation of the weights.
        seed: Of the weights.
    """
    assert text in {"llama", "mistral"}
    assert names in {"legacy", "modern"}
    folder = Path(folder)
    entries = json.loads((REFSHAPES / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {token["content"]: token["id"] for token in entries["added_tokens"]}
    theta = 10000.0 if text == "llama" else 1000000.0
    kv_heads = kv_heads or (heads if text == "llama" else heads // 2)
    pinpoints = [[image_size * down, image_size * across] for down, across in tiles]
    side = image_size // patch_size
    special = {"bos_token_id": ids["<s>"], "eos_token_id": ids["</s>"]}
    special |= {"pad_token_id": ids["<pad>"]}
    sizes = {
        "vocab_size": vocabulary or 1 + max(entries["model"]["vocab"].values()),
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": max_positions,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    } | special
    if text == "llama":
        decoder = LlamaConfig(**sizes)
    else:
        decoder = MistralConfig(sliding_window=None, **sizes)
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=vision_width,
            intermediate_size=2 * vision_width,
            num_hidden_layers=vision_layers,
            num_attention_heads=vision_heads,
            image_size=image_size,
            patch_size=patch_size,
            projection_dim=vision_width,
        ),
        text_config=decoder,
        image_token_index=ids["<image>"],
        image_grid_pinpoints=pinpoints,
        image_seq_length=side**2,
    )
    draw = Draw(seed, spread)
    state = torch.random.get_rng_state()
    model = LlavaNextForConditionalGeneration(config)
    torch.random.set_rng_state(state)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "norm" in name and name.endswith("weight")
            parameter.copy_((draw.one if norm else draw.zero)(*parameter.shape))
    model = model.to(getattr(torch, dtype))
    model.generation_config = GenerationConfig(**special)
    model.save_pretrained(folder, **({"max_shard_size": max_shard_size} if max_shard_size else {}))
    rename_tensors(folder, lambda key: _next_name(key, names))
    if names == "legacy":
        write_json(folder / "config.json", _next_config(folder, theta))
    sizes = {"size": {"shortest_edge": image_size}}
    sizes |= {"crop_size": {"height": image_size, "width": image_size}}
    preprocessor = sizes | {
        "aspect_ratio_setting": "anyres",
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_grid_pinpoints": pinpoints,
        "image_mean": CLIP_MEAN,
        "image_processor_type": "LlavaNextImageProcessor",
        "image_std": CLIP_STD,
        "processor_class": "LlavaNextProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
    }
    write_json(folder / "preprocessor_config.json", preprocessor)
    processor = {
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "patch_size": patch_size,
        "processor_class": "LlavaNextProcessor",
        "vision_feature_select_strategy": "default",
    }
    write_json(folder / "processor_config.json", processor)
    for name in TOKENIZER_FILES:
        shutil.copyfile(REFSHAPES / name, folder / name)
    return folder


def _next_name(key, names):
    if key.rpartition(".")[2] == "image_newline":
        return "image_newline" if names == "legacy" else "model.image_newline"
    return stored_name(key, names)


def _next_config(folder, theta):
    """The config that the library wrote, in the words of transformers 4.39."""
    data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = data["text_config"]
    del text["rope_parameters"], text["head_dim"]
    text |= {"rope_theta": theta, "torch_dtype": data["dtype"]}
    data |= {
        "ignore_index": -100,
        "torch_dtype": data.pop("dtype"),
        "transformers_version": "4.39.0.dev0",
        "use_image_newline_parameter": True,
        "vocab_size": text["vocab_size"],
    }
    return data
