"""CLIP as in openai/clip-vit-large-patch14-336."""

from pathlib import Path

import torch

from makers.originals.files import (
    SPREAD,
    Draw,
    affine,
    cast,
    linear,
    save_tensors,
    under,
    write_json,
)
from makers.originals.tokenizers import clip_vocabulary, write_clip_tokenizer

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


def make_clip(
    folder,
    *,
    image_size=56,
    patch_size=14,
    vision_width=32,
    vision_layers=3,
    vision_heads=4,
    vision_mlp=None,
    text_width=24,
    text_layers=2,
    text_heads=3,
    text_mlp=None,
    projection=20,
    text_eos=2,
    with_tokenizer=True,
    files="safetensors",
    dtype="float32",
    spread=SPREAD,
    seed=0,
):
    """Make a whole CLIP, both towers, and return its folder.

    Args:
        folder: Is created.
        image_size: Pixels.
        patch_size: Pixels.
        vision_width: Of the vision tower.
        vision_layers: Of the vision tower.
        vision_heads: Of the vision tower.
        vision_mlp: Twice the width where None.
        text_width: Of the text tower.
        text_layers: Of the text tower.
        text_heads: Of the text tower.
        text_mlp: Twice the width where None.
        projection: Width of the space that both towers end in.
        text_eos: `text_config.eos_token_id`: 2 as in the published file of patch14 (the pooled
            row is then the one of the highest ID), `"eot"` for the tokenizer's own ID.
        with_tokenizer: Whether to add the tokenizer files.
        files: `safetensors` or `bin` (all that patch14-336 has).
        dtype: That the weights are stored in.
        spread: Standard deviation of the weights.
        seed: Of the weights.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    draw = Draw(seed, spread)
    tokens, merges = clip_vocabulary()
    vocabulary = len(tokens)
    if with_tokenizer:
        write_clip_tokenizer(folder, tokens, merges)
    text_mlp, vision_mlp = text_mlp or 2 * text_width, vision_mlp or 2 * vision_width
    tensors = {"logit_scale": torch.tensor(2.6592)}
    tensors |= _clip_text(draw, vocabulary, text_width, text_layers, text_mlp)
    grid = image_size // patch_size
    tensors |= clip_vision_tensors(draw, grid, patch_size, vision_width, vision_layers, vision_mlp)
    tensors["visual_projection.weight"] = draw.zero(projection, vision_width)
    tensors["text_projection.weight"] = draw.zero(projection, text_width)
    tensors = cast(tensors, dtype)
    for tower, rows in (("text", 77), ("vision", grid**2 + 1)):
        tensors[f"{tower}_model.embeddings.position_ids"] = torch.arange(rows)[None]
    save_tensors(folder, tensors, files, shards=1)
    eot = vocabulary - 1
    config = {
        "architectures": ["CLIPModel"],
        "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592,
        "model_type": "clip",
        "projection_dim": projection,
        "text_config": {
            "bos_token_id": 0 if text_eos == 2 else eot - 1,
            "dropout": 0.0,
            "eos_token_id": eot if text_eos == "eot" else text_eos,
            "hidden_act": "quick_gelu",
            "hidden_size": text_width,
            "intermediate_size": text_mlp,
            "layer_norm_eps": 1e-5,
            "max_position_embeddings": 77,
            "model_type": "clip_text_model",
            "num_attention_heads": text_heads,
            "num_hidden_layers": text_layers,
            "pad_token_id": 1,
            "projection_dim": projection,
            "vocab_size": vocabulary,
        },
        "torch_dtype": dtype,
        "transformers_version": "4.21.3",
        "vision_config": {
            "dropout": 0.0,
            "hidden_act": "quick_gelu",
            "hidden_size": vision_width,
            "image_size": image_size,
            "intermediate_size": vision_mlp,
            "layer_norm_eps": 1e-5,
            "model_type": "clip_vision_model",
            "num_attention_heads": vision_heads,
            "num_hidden_layers": vision_layers,
            "patch_size": patch_size,
            "projection_dim": projection,
        },
    }
    write_json(folder / "config.json", config)
    preprocessor = {
        "crop_size": image_size,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "resample": 3,
        "size": image_size,
    }
    write_json(folder / "preprocessor_config.json", preprocessor)
    return folder


def clip_vision_tensors(draw, grid, patch_size, width, layers, mlp, prefix="vision_model."):
    tensors = {
        "embeddings.class_embedding": draw.zero(width),
        "embeddings.patch_embedding.weight": draw.zero(width, 3, patch_size, patch_size),
        "embeddings.position_embedding.weight": draw.zero(grid**2 + 1, width),
    }
    tensors |= affine(draw, "pre_layrnorm", width)
    for k in range(layers):
        tensors |= _clip_layer(draw, f"encoder.layers.{k}", width, mlp)
    tensors |= affine(draw, "post_layernorm", width)
    return under(prefix, tensors)


def _clip_text(draw, vocabulary, width, layers, mlp):
    tensors = {
        "embeddings.token_embedding.weight": draw.zero(vocabulary, width),
        "embeddings.position_embedding.weight": draw.zero(77, width),
    }
    for k in range(layers):
        tensors |= _clip_layer(draw, f"encoder.layers.{k}", width, mlp)
    tensors |= affine(draw, "final_layer_norm", width)
    return under("text_model.", tensors)


def _clip_layer(draw, name, width, mlp):
    tensors = {}
    for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
        tensors |= linear(draw, f"self_attn.{part}", width, width)
    tensors |= affine(draw, "layer_norm1", width)
    tensors |= linear(draw, "mlp.fc1", mlp, width)
    tensors |= linear(draw, "mlp.fc2", width, mlp)
    tensors |= affine(draw, "layer_norm2", width)
    return under(f"{name}.", tensors)
