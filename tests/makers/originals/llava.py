"""LLaVA-1.5 as in liuhaotian/llava-v1.5-7b."""

import json
from pathlib import Path

import torch

from makers.originals.clip import clip_vision_tensors
from makers.originals.files import SPREAD, Draw, cast, linear, save_tensors, write_json
from makers.originals.llama import llama_config, llama_tensors, order_state, rotary_buffers
from makers.originals.tokenizers import make_sentencepiece


def make_llava_original(
    folder,
    clip_folder,
    *,
    vocabulary=400,
    width=48,
    layers=2,
    heads=4,
    kv_heads=None,
    mlp=80,
    max_positions=512,
    projector="mlp2x_gelu",
    feature_layer=-2,
    with_vision_tower=False,
    model_type="llava",
    files="bin",
    dtype="float16",
    spread=SPREAD,
    seed=0,
):
    """Make a LLaVA-1.5 in its authors' layout, beside its CLIP, and return its folder.

    Args:
        folder: Is created.
        clip_folder: Of `make_clip`; the config names it `openai/<its name>`.
        vocabulary: Of the tokenizer and the embedding table.
        width: Of the decoder.
        layers: Of the decoder.
        heads: Query heads.
        kv_heads: Key and value heads; as many as `heads` where None.
        mlp: Width of the gated MLP.
        max_positions: Of the decoder.
        projector: `mlp2x_gelu` or `linear`.
        feature_layer: `mm_vision_select_layer`.
        with_vision_tower: Whether a vision tower is stored too. Its weights are **not** those of
            the CLIP folder, as where it was trained with the rest.
        model_type: `llava`, or `llava_llama` for what the authors' later code writes: no buffers,
            no second projector, more keys in the config.
        files: `bin`, or `safetensors`, as their later code saves unless told otherwise.
        dtype: That the weights are stored in (rotary buffers are float32 always).
        spread: Standard deviation of the weights.
        seed: Of the weights.
    """
    assert projector in {"mlp2x_gelu", "linear"}
    folder, clip_folder = Path(folder), Path(clip_folder)
    make_sentencepiece(folder, vocabulary=vocabulary)
    draw = Draw(seed, spread)
    vision = json.loads((clip_folder / "config.json").read_text("utf-8"))["vision_config"]
    kv_heads = kv_heads or heads
    tensors = llama_tensors(draw, vocabulary, width, layers, heads, kv_heads, mlp)
    if projector == "linear":
        bridge = linear(draw, "model.mm_projector", width, vision["hidden_size"])
    else:
        bridge = linear(draw, "model.mm_projector.0", width, vision["hidden_size"])
        bridge |= linear(draw, "model.mm_projector.2", width, width)
    tensors |= bridge
    if with_vision_tower:
        tensors |= clip_vision_tensors(
            draw,
            vision["image_size"] // vision["patch_size"],
            vision["patch_size"],
            vision["hidden_size"],
            vision["num_hidden_layers"],
            vision["intermediate_size"],
            "model.vision_tower.vision_tower.vision_model.",
        )
    tensors = cast(tensors, dtype)
    is_later = model_type == "llava_llama"
    if not is_later:
        tensors |= rotary_buffers(layers, width // heads)
        # The hub has the projector a second time, in a file that no index names.
        torch.save(cast(bridge, dtype), folder / "mm_projector.bin")
    save_tensors(folder, order_state(tensors), files, shards=2)
    config = llama_config(
        vocabulary, width, layers, heads, mlp, max_positions, dtype, eps=1e-5, kv_heads=kv_heads
    )
    config |= {
        "architectures": ["LlavaLlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "freeze_mm_mlp_adapter": False,
        "freeze_mm_vision_resampler": False,
        "image_aspect_ratio": "pad",
        "max_length": max_positions,
        "mm_hidden_size": vision["hidden_size"],
        "mm_projector_type": projector,
        "mm_resampler_type": None,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": feature_layer,
        "mm_vision_tower": f"openai/{clip_folder.name}",
        "model_type": model_type,
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rope_scaling": None,
        "transformers_version": "4.31.0",
        "tune_mm_mlp_adapter": False,
        "tune_mm_vision_resampler": False,
        "unfreeze_mm_vision_tower": with_vision_tower,
        "use_mm_proj": True,
    }
    if is_later:
        config |= {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mm_patch_merge_type": "flat",
            "mm_projector_lr": None,
            "rope_theta": 10000.0,
            "tokenizer_model_max_length": 2048,
            "tokenizer_padding_side": "right",
            "transformers_version": "4.37.2",
        }
    write_json(folder / "config.json", config)
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    generation |= {"max_length": max_positions, "transformers_version": "4.31.0"}
    write_json(folder / "generation_config.json", generation)
    return folder
