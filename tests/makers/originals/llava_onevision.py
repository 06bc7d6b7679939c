"""LLaVA-OneVision as in llava-hf/llava-onevision-qwen2-0.5b-ov-hf, written by the library."""

from pathlib import Path

import torch
from transformers import (
    GenerationConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    Qwen2Config,
    SiglipVisionConfig,
)

from makers.checkpoints import rename_tensors, stored_name
from makers.originals.files import SPREAD, Draw, write_json
from makers.originals.tokenizers import make_byte_tokenizer

MEAN = STD = [0.5, 0.5, 0.5]
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
TILES = tuple((down, across) for down in range(1, 4) for across in range(1, 4))
"""Canvases as (tiles down, tiles across), all up to three by three."""
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ '\\n' + part['text'] }}"
    "{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""Gives the text that the published one gives."""


def make_llava_onevision(
    folder,
    *,
    names="legacy",
    image_size=31,
    patch_size=7,
    vision_width=36,
    vision_heads=3,
    vision_layers=3,
    vision_mlp=50,
    vision_head=False,
    feature_layer=-1,
    views=9,
    tiles=TILES,
    width=84,
    heads=6,
    kv_heads=2,
    mlp=90,
    layers=3,
    max_positions=1024,
    tied=False,
    processor=True,
    chat=True,
    max_shard_size=None,
    dtype="float32",
    spread=SPREAD,
    seed=0,
):
    """Make a LLaVA-OneVision in Hugging Face's layout and return its folder.

    Args:
        folder: Is created.
        names: Of tensors: `legacy` as llava-hf stores them, or `modern` as the library does today.
        image_size: Pixels of one tile; no multiple of the patch, as the published 384 is none.
        patch_size: Pixels.
        vision_width: Of the tower.
        vision_heads: Of the tower.
        vision_layers: Of the tower.
        vision_mlp: Of the tower.
        vision_head: Whether the files hold the tower's pooling head, which nothing uses.
        feature_layer: Hidden state that the projector reads.
        views: In `vision_aspect_ratio`.
        tiles: Canvases as (tiles down, tiles across).
        width: Of the decoder.
        heads: Query heads.
        kv_heads: Key and value heads.
        mlp: Width of the gated MLP.
        layers: Of the decoder.
        max_positions: Of the decoder.
        tied: Whether the head is the embedding table, as for 0.5B.
        processor: Whether there is a file of the image processor.
        chat: Whether there is a chat template.
        max_shard_size: For example `100KB` to get several files and an index.
        dtype: That the weights are stored in.
        spread: Standard deviation of the weights.
        seed: Of the weights.
    """
    folder = Path(folder)
    folder.mkdir(parents=True)
    ids = make_byte_tokenizer(folder, special=SPECIAL, marks={})
    special = {"eos_token_id": ids["<|im_end|>"], "bos_token_id": ids["<|endoftext|>"]}
    pinpoints = [[image_size * down, image_size * across] for down, across in tiles]
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=vision_width,
            intermediate_size=vision_mlp,
            num_hidden_layers=vision_layers,
            num_attention_heads=vision_heads,
            image_size=image_size,
            patch_size=patch_size,
            vision_use_head=vision_head,
        ),
        text_config=Qwen2Config(
            vocab_size=1 + max(ids.values()),
            hidden_size=width,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=max_positions,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            tie_word_embeddings=tied,
            **special,
        ),
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        image_grid_pinpoints=pinpoints,
        vision_aspect_ratio=f"anyres_max_{views}",
        vision_feature_layer=feature_layer,
        tie_word_embeddings=tied,
    )
    draw = Draw(seed, spread)
    state = torch.random.get_rng_state()
    model = LlavaOnevisionForConditionalGeneration(config)
    torch.random.set_rng_state(state)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            one = "norm" in name and name.endswith("weight")
            parameter.copy_((draw.one if one else draw.zero)(*parameter.shape))
    model = model.to(getattr(torch, dtype))
    model.generation_config = GenerationConfig(**special)
    model.save_pretrained(folder, **({"max_shard_size": max_shard_size} if max_shard_size else {}))
    rename_tensors(folder, lambda key: _stored_name(key, names))
    if processor:
        LlavaOnevisionImageProcessorPil(
            size={"height": image_size, "width": image_size},
            image_mean=MEAN,
            image_std=STD,
            image_grid_pinpoints=pinpoints,
        ).save_pretrained(folder)
    if chat:
        write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    return folder


def _stored_name(key, names):
    if key.rpartition(".")[2] == "image_newline":
        return "image_newline" if names == "legacy" else "model.image_newline"
    return stored_name(key, names)
