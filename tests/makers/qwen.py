"""Small random Qwen-VL checkpoints, as the library's own `save_pretrained` writes them."""

import json
import math
import shutil

import torch
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from makers.checkpoints import REFSHAPES, TOKENIZER_FILES

TEMPLATE = "USER: <image>\n Where is {phrase} ? ASSISTANT:"


def make_qwen_checkpoint(
    folder, *, full=(1, 4), depth=5, window=56, tied=False, layers=3, wide=8, spread=0.15, seed=0
):
    """Make a small random Qwen2.5-VL with refshapes' tokenizer; its folder.

    Args:
        folder: Is created.
        full: Numbers of the tower's blocks with full attention.
        depth: Blocks of the tower.
        window: Pixels to a side of a window.
        tied: Whether the head is the embedding table.
        layers: Of the decoder.
        wide: Width of the tower's five heads.
        spread: Standard deviation of the weights.
        seed: Of the weights.
    """
    ids, text = describe_text(layers)
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": depth,
            "hidden_size": 5 * wide,
            "num_heads": 5,
            "intermediate_size": 54,
            "window_size": window,
            "fullatt_block_indexes": list(full),
            "out_hidden_size": 96,
        },
        text_config=text,
        image_token_id=ids["<image>"],
        tie_word_embeddings=tied,
    )
    processor = Qwen2VLImageProcessorPil()
    return write(folder, Qwen2_5_VLForConditionalGeneration, config, processor, ids, spread, seed)


def make_qwen3_checkpoint(
    folder,
    *,
    stacked=(0, 2, 3),
    depth=5,
    side=7,
    tied=False,
    layers=4,
    wide=8,
    spread=0.15,
    seed=0,
):
    """Make a small random Qwen3-VL with refshapes' tokenizer; its folder.

    Args:
        folder: Is created.
        stacked: Numbers of the tower's blocks whose states DeepStack takes, in the config's order.
        depth: Blocks of the tower.
        side: Of the learned grid of positions.
        tied: Whether the head is the embedding table.
        layers: Of the decoder.
        wide: Width of the tower's five heads.
        spread: Standard deviation of the weights.
        seed: Of the weights.
    """
    ids, text = describe_text(layers)
    config = Qwen3VLConfig(
        vision_config={
            "depth": depth,
            "hidden_size": 5 * wide,
            "num_heads": 5,
            "intermediate_size": 54,
            "patch_size": 8,
            "num_position_embeddings": side**2,
            "deepstack_visual_indexes": list(stacked),
            "out_hidden_size": 96,
        },
        text_config=text | {"head_dim": 16},
        image_token_id=ids["<image>"],
        tie_word_embeddings=tied,
    )
    processor = Qwen2VLImageProcessorPil(
        patch_size=8, image_mean=[0.5, 0.4, 0.5], image_std=[0.5, 0.5, 0.6]
    )
    return write(folder, Qwen3VLForConditionalGeneration, config, processor, ids, spread, seed)


def describe_text(layers):
    """IDs of refshapes' added tokens, and the config of a decoder for its vocabulary."""
    entries = json.loads((REFSHAPES / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {token["content"]: token["id"] for token in entries["added_tokens"]}
    return ids, {
        "vocab_size": math.ceil((1 + max(entries["model"]["vocab"].values())) / 32) * 32,
        "hidden_size": 96,
        "intermediate_size": 90,
        "num_hidden_layers": layers,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 3, 3],
        },
        "bos_token_id": ids["<s>"],
        "eos_token_id": ids["</s>"],
        "pad_token_id": ids["<pad>"],
    }


def write(folder, kind, config, processor, ids, spread, seed):
    """Write a model of random weights with all its files."""
    generator = torch.Generator().manual_seed(seed)
    state = torch.random.get_rng_state()
    model = kind(config)
    torch.random.set_rng_state(state)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * spread
            parameter.copy_(noise + (1 if parameter.ndim == 1 and parameter.mean() > 0.5 else 0))
    model.generation_config = GenerationConfig(
        bos_token_id=ids["<s>"], eos_token_id=ids["</s>"], pad_token_id=ids["<pad>"]
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copyfile(REFSHAPES / name, folder / name)
    return folder
