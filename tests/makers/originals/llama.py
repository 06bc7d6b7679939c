"""The tensors and the configuration that every Llama here has."""

import torch

from makers.originals.files import under


def llama_tensors(draw, vocabulary, width, layers, heads, kv_heads, mlp):
    """The tensors of a Llama, in Hugging Face's names, without buffers."""
    assert width % (2 * heads) == 0, "rotary heads have an even width"
    narrow = width // heads * kv_heads
    tensors = {"model.embed_tokens.weight": draw.zero(vocabulary, width)}
    for k in range(layers):
        layer = {
            "self_attn.q_proj.weight": draw.zero(width, width),
            "self_attn.k_proj.weight": draw.zero(narrow, width),
            "self_attn.v_proj.weight": draw.zero(narrow, width),
            "self_attn.o_proj.weight": draw.zero(width, width),
            "mlp.gate_proj.weight": draw.zero(mlp, width),
            "mlp.down_proj.weight": draw.zero(width, mlp),
            "mlp.up_proj.weight": draw.zero(mlp, width),
            "input_layernorm.weight": draw.one(width),
            "post_attention_layernorm.weight": draw.one(width),
        }
        tensors |= under(f"model.layers.{k}.", layer)
    tensors["model.norm.weight"] = draw.one(width)
    tensors["lm_head.weight"] = draw.zero(vocabulary, width)
    return tensors


def rotary_buffers(layers, head_dim):
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return {
        f"model.layers.{k}.self_attn.rotary_emb.inv_freq": frequencies.clone()
        for k in range(layers)
    }


PARTS = ("embed_tokens.", "layers.", "norm.", "vision_tower.", "mm_projector.", "lm_head.")
BEFORE_431 = ("gate", "down", "up")
SINCE_431 = ("gate", "up", "down")


def order_state(tensors, mlp=SINCE_431):
    """The same in the order of a model's state dict, which savers write.

    Args:
        tensors: Of a Llama with a tower, a projector and buffers or without.
        mlp: The order of its linear layers, which version 4.31 of the library changed.
    """
    linear = [f"mlp.{name}_proj" for name in mlp]
    inside = ("q_proj", "k_proj", "v_proj", "o_proj", "rotary_emb", *linear, "_layernorm")

    def key(name):
        short = name.removeprefix("model.")
        part = next(k for k, each in enumerate(PARTS) if short.startswith(each))
        if PARTS[part] != "layers.":
            return part, 0, 0
        layer = int(short.split(".")[1])
        return part, layer, next(k for k, each in enumerate(inside) if each in short)

    return {name: tensors[name] for name in sorted(tensors, key=key)}


def llama_config(
    vocabulary, width, layers, heads, mlp, max_positions, dtype, *, eps, kv_heads=None
):
    """A Llama's keys; those before transformers 4.31 knew no `num_key_value_heads`."""
    config = {
        "hidden_act": "silu",
        "hidden_size": width,
        "initializer_range": 0.02,
        "intermediate_size": mlp,
        "max_position_embeddings": max_positions,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "rms_norm_eps": eps,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": vocabulary,
    }
    return config | ({"num_key_value_heads": kv_heads} if kv_heads else {})
