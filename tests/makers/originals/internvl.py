"""InternVL3 and 3.5 as in OpenGVLab/InternVL3-1B-hf, written by the library itself."""

import json
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    GenerationConfig,
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
)

from makers.originals.files import SPREAD, Draw
from makers.originals.tokenizers import make_byte_tokenizer

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
MARKS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *MARKS.values())
GROUNDING = ("<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")


def make_internvl(
    folder,
    *,
    text="qwen2",
    image_size=24,
    patch_size=4,
    cell=2,
    vision_width=36,
    vision_heads=3,
    vision_layers=3,
    vision_mlp=50,
    attention_bias=True,
    head_norms=False,
    norm_type="layer_norm",
    mean_pooling=True,
    mask_token=False,
    feature_layer=-1,
    width=84,
    heads=6,
    kv_heads=2,
    head_dim=None,
    mlp=90,
    layers=3,
    vocabulary=None,
    max_positions=1024,
    rope_type="default",
    tied=False,
    most_tiles=None,
    processor=True,
    max_shard_size=None,
    dtype="float32",
    spread=SPREAD,
    seed=0,
):
    """Make an InternVL in Hugging Face's layout and return its folder.

    Args:
        folder: Is created.
        text: Type of the decoder: `qwen2` (3), or `qwen3` (3.5).
        image_size: Pixels of one tile.
        patch_size: Pixels.
        cell: Patches along the side of what becomes one token.
        vision_width: Of the tower.
        vision_heads: Of the tower.
        vision_layers: Of the tower.
        vision_mlp: Of the tower.
        attention_bias: Whether the tower's queries, keys and values have biases.
        head_norms: Whether the tower's queries and keys are normed.
        norm_type: Of the tower's blocks: `layer_norm` or `rms_norm`.
        mean_pooling: Off where the tower has a last norm.
        mask_token: Whether the files hold a mask token, which only training needs.
        feature_layer: Hidden state that the projector reads.
        width: Of the decoder.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: `width / heads` where None.
        mlp: Width of the gated MLP.
        layers: Of the decoder.
        vocabulary: Rows of the embedding table; what the tokenizer needs where None.
        max_positions: Of the decoder.
        rope_type: `default`, or `dynamic` with the factor 2 of the published files.
        tied: Whether the head is the embedding table.
        most_tiles: Of a picture, in the processor's file; the library's own number where None.
        processor: Whether there is a file of the image processor.
        max_shard_size: For example `100KB` to get several files and an index.
        dtype: That the weights are stored in.
        spread: Standard deviation of the weights.
        seed: Of the weights.
    """
    folder = Path(folder)
    folder.mkdir(parents=True)
    ids = make_byte_tokenizer(folder, special=SPECIAL + GROUNDING, marks=MARKS)
    special = {"eos_token_id": ids["<|im_end|>"], "bos_token_id": ids["<|endoftext|>"]}
    rope = {"rope_type": rope_type, "rope_theta": 1e6}
    if rope_type == "dynamic":
        rope["factor"] = 2.0
    sizes = {
        "vocab_size": vocabulary or 1 + max(ids.values()),
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": max_positions,
        "rope_parameters": rope,
        "tie_word_embeddings": tied,
    }
    if head_dim or text == "qwen3":
        sizes["head_dim"] = head_dim or width // heads
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=vision_width,
            num_hidden_layers=vision_layers,
            num_attention_heads=vision_heads,
            attention_bias=attention_bias,
            use_qk_norm=head_norms,
            intermediate_size=vision_mlp,
            norm_type=norm_type,
            image_size=image_size,
            patch_size=patch_size,
            use_mask_token=mask_token,
            use_mean_pooling=mean_pooling,
        ),
        text_config=AutoConfig.for_model(text, **sizes, **special),
        image_token_id=ids["<IMG_CONTEXT>"],
        image_seq_length=(image_size // patch_size // cell) ** 2,
        downsample_ratio=1 / cell,
        vision_feature_layer=feature_layer,
        tie_word_embeddings=tied,
    )
    draw = Draw(seed, spread)
    state = torch.random.get_rng_state()
    model = InternVLForConditionalGeneration(config)
    torch.random.set_rng_state(state)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            one = ("norm" in name and name.endswith("weight")) or "lambda" in name
            parameter.copy_((draw.one if one else draw.zero)(*parameter.shape))
    model = model.to(getattr(torch, dtype))
    model.generation_config = GenerationConfig(**special)
    model.save_pretrained(folder, **({"max_shard_size": max_shard_size} if max_shard_size else {}))
    if processor:
        tiles = {} if most_tiles is None else {"max_patches": most_tiles}
        GotOcr2ImageProcessorPil(
            size={"height": image_size, "width": image_size},
            image_mean=MEAN,
            image_std=STD,
            **tiles,
        ).save_pretrained(folder)
    return folder


def edit_config(folder, edit):
    """Change `config.json` of a folder by a function of its data."""
    path = Path(folder) / "config.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    edit(data)
    path.write_text(json.dumps(data), encoding="utf-8")
