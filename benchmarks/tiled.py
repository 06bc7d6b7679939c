"""Sizes of decoders, and of the models that look at tiles of a picture: configs and shapes."""

from __future__ import annotations

from typing import Any, Final

Shapes = dict[str, tuple[int, ...]]


def llama_config(width: int, layers: int, heads: int, mlp: int, vocabulary: int) -> dict[str, Any]:
    """A Llama 2 config."""
    return {
        "model_type": "llama",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": mlp,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _qwen(kind: str, sizes: tuple[int, ...], vocabulary: int, *, tied: bool) -> dict[str, Any]:
    """A Qwen2 or Qwen3 config; `sizes` are width, layers, heads, cached heads and MLP width."""
    width, layers, heads, cached, mlp = sizes
    found = llama_config(width, layers, heads, mlp, vocabulary) | {
        "model_type": kind,
        "num_key_value_heads": cached,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "tie_word_embeddings": tied,
    }
    return found | ({"head_dim": 128, "max_position_embeddings": 40960} if kind == "qwen3" else {})


_GROWING: Final = {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}
INTERNVL: Final = {
    f"internvl3-{name}": _qwen("qwen2", sizes, 151674, tied=False) | {"rope_parameters": _GROWING}
    for name, sizes in (
        ("1b", (896, 24, 14, 2, 4864)),
        ("2b", (1536, 28, 12, 2, 8960)),
        ("8b", (3584, 28, 28, 4, 18944)),
    )
} | {
    f"internvl3.5-{name}": _qwen("qwen3", sizes, 151936, tied=False)
    for name, sizes in (
        ("1b", (1024, 28, 16, 8, 3072)),
        ("2b", (2048, 28, 16, 8, 6144)),
        ("4b", (2560, 36, 32, 8, 9728)),
        ("8b", (4096, 36, 32, 8, 12288)),
    )
}
"""Decoders of InternVL3 and 3.5; their heads are no copies of the embedding tables."""

ONEVISION: Final = {
    "llava-onevision-qwen2-0.5b": _qwen("qwen2", (896, 24, 14, 2, 4864), 152000, tied=True),
    "llava-onevision-qwen2-7b": _qwen("qwen2", (3584, 28, 28, 4, 18944), 152128, tied=False),
}
"""Decoders of LLaVA-OneVision; vocabularies are Qwen2's with two tokens, filled up to 64."""

_SIGLIP: Final = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}


def llama_shapes(config: dict[str, Any], prefix: str, head: str) -> Shapes:
    """Tensors of a Llama, Mistral, Qwen2 or Qwen3, by the keys of its files."""
    width, mlp, kind = config["hidden_size"], config["intermediate_size"], config["model_type"]
    narrow = config.get("head_dim") or width // config["num_attention_heads"]
    wide = narrow * config["num_attention_heads"]
    cached = narrow * config["num_key_value_heads"]
    vocabulary = config["vocab_size"]
    shapes: Shapes = {f"{prefix}embed_tokens.weight": (vocabulary, width)}
    for layer in range(config["num_hidden_layers"]):
        name = f"{prefix}layers.{layer}."
        shapes |= {
            f"{name}self_attn.q_proj.weight": (wide, width),
            f"{name}self_attn.k_proj.weight": (cached, width),
            f"{name}self_attn.v_proj.weight": (cached, width),
            f"{name}self_attn.o_proj.weight": (width, wide),
            f"{name}mlp.gate_proj.weight": (mlp, width),
            f"{name}mlp.up_proj.weight": (mlp, width),
            f"{name}mlp.down_proj.weight": (width, mlp),
            f"{name}input_layernorm.weight": (width,),
            f"{name}post_attention_layernorm.weight": (width,),
        }
        if kind == "qwen2":
            shapes[f"{name}self_attn.q_proj.bias"] = (wide,)
            shapes |= {f"{name}self_attn.{x}_proj.bias": (cached,) for x in "kv"}
        if kind == "qwen3":
            shapes |= {f"{name}self_attn.{x}_norm.weight": (narrow,) for x in "qk"}
    shapes[f"{prefix}norm.weight"] = (width,)
    return shapes if config.get("tie_word_embeddings") else shapes | {head: (vocabulary, width)}


def internvl_config(text: dict[str, Any]) -> dict[str, Any]:
    """config.json of an InternVL3 or 3.5: InternViT-300M and a decoder."""
    return {
        "model_type": "internvl",
        "image_token_id": 151667,
        "downsample_ratio": 0.5,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "vision_config": {
            "model_type": "internvl_vision",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "attention_bias": True,
            "image_size": [448, 448],
            "patch_size": [14, 14],
        },
        "text_config": text,
        "tie_word_embeddings": False,
    }


def internvl_shapes(text: dict[str, Any]) -> Shapes:
    """Tensors of an InternVL3 or 3.5 in Hugging Face's layout."""
    embeddings = "vision_tower.embeddings."
    shapes: Shapes = {
        f"{embeddings}cls_token": (1, 1, 1024),
        f"{embeddings}position_embeddings": (1, 1025, 1024),
        f"{embeddings}patch_embeddings.projection.weight": (1024, 3, 14, 14),
        f"{embeddings}patch_embeddings.projection.bias": (1024,),
    }
    for layer in range(24):
        name = f"vision_tower.encoder.layer.{layer}."
        for part in ("q_proj", "k_proj", "v_proj", "projection_layer"):
            shapes[f"{name}attention.{part}.weight"] = (1024, 1024)
            shapes[f"{name}attention.{part}.bias"] = (1024,)
        shapes |= {
            f"{name}mlp.fc1.weight": (4096, 1024),
            f"{name}mlp.fc1.bias": (4096,),
            f"{name}mlp.fc2.weight": (1024, 4096),
            f"{name}mlp.fc2.bias": (1024,),
        }
        for part in ("layernorm_before", "layernorm_after"):
            shapes |= {f"{name}{part}.weight": (1024,), f"{name}{part}.bias": (1024,)}
        shapes |= {f"{name}lambda_1": (1024,), f"{name}lambda_2": (1024,)}
    width, projector = text["hidden_size"], "multi_modal_projector."
    shapes |= {
        f"{projector}layer_norm.weight": (4096,),
        f"{projector}layer_norm.bias": (4096,),
        f"{projector}linear_1.weight": (width, 4096),
        f"{projector}linear_1.bias": (width,),
        f"{projector}linear_2.weight": (width, width),
        f"{projector}linear_2.bias": (width,),
    }
    return shapes | llama_shapes(text, "language_model.model.", "language_model.lm_head.weight")


def onevision_config(text: dict[str, Any]) -> dict[str, Any]:
    """config.json of a LLaVA-OneVision; its canvases are the library's usual ones."""
    return {
        "model_type": "llava_onevision",
        "image_token_index": 151646,
        "video_token_index": 151647,
        "projector_hidden_act": "gelu",
        "vision_aspect_ratio": "anyres_max_9",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "vision_config": _SIGLIP,
        "text_config": text,
        "tie_word_embeddings": text["tie_word_embeddings"],
    }


def onevision_shapes(text: dict[str, Any]) -> Shapes:
    """Tensors of a LLaVA-OneVision in Hugging Face's layout."""
    wide, mlp, width = 1152, 4304, text["hidden_size"]
    tower, projector = "vision_tower.vision_model.", "multi_modal_projector."
    shapes: Shapes = {
        f"{tower}embeddings.patch_embedding.weight": (wide, 3, 14, 14),
        f"{tower}embeddings.patch_embedding.bias": (wide,),
        f"{tower}embeddings.position_embedding.weight": (729, wide),
        f"{tower}post_layernorm.weight": (wide,),
        f"{tower}post_layernorm.bias": (wide,),
        "image_newline": (width,),
    }
    for layer in range(26):
        name = f"{tower}encoder.layers.{layer}."
        for part, size in (
            *((f"self_attn.{x}_proj", (wide, wide)) for x in ("q", "k", "v", "out")),
            ("mlp.fc1", (mlp, wide)),
            ("mlp.fc2", (wide, mlp)),
        ):
            shapes |= {f"{name}{part}.weight": size, f"{name}{part}.bias": size[:1]}
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{name}{norm}.weight": (wide,), f"{name}{norm}.bias": (wide,)}
    shapes |= {
        f"{projector}linear_1.weight": (width, wide),
        f"{projector}linear_1.bias": (width,),
        f"{projector}linear_2.weight": (width, width),
        f"{projector}linear_2.bias": (width,),
    }
    return shapes | llama_shapes(text, "language_model.model.", "language_model.lm_head.weight")
