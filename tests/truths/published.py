"""The published architectures in plain float64: what the exporter's graphs are measured against.

Written from the papers and the authors' formulas with nothing but tensor operations, and Hugging
Face's CLIP where that is the published tower. No code here is shared with the exporter. Tensors
come as the files hold them, under the files' names and in any dtype.
"""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers import CLIPVisionModel

# B batch, H heads, N patches, T tower rows (CLS and N), C vision width, D decoder width, S slots.


@dataclass(frozen=True, kw_only=True)
class EvaOutput:
    """What EVA computes on the way; `states[k]` goes into block k, the last one is the output."""

    states: list  # [B, T, C], one more than blocks
    attentions: list  # [B, H, T, T], after the softmax
    queries: list  # [B, T, C], with bias, before scaling and before splitting into heads
    keys: list  # [B, T, C], likewise; they have no bias


def eva_tower(tensors, pixels, heads, side, *, layers=None):
    """EVA-CLIP-g as MiniGPT-4 runs it.

    Args:
        tensors: Of eva_vit_g.pth.
        pixels: Normalised, [B, 3, H, W].
        heads: Attention heads.
        side: Patches a side at this picture size.
        layers: Blocks to run; where None all but the last one of the file, as published.
    """
    tensors = _double(tensors)
    if layers is None:
        layers = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}) - 1
    patch = tensors["patch_embed.proj.weight"].shape[-1]
    x = functional.conv2d(
        pixels.double(),
        tensors["patch_embed.proj.weight"],
        tensors["patch_embed.proj.bias"],
        stride=patch,
    )
    assert x.shape[-2:] == (side, side)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([tensors["cls_token"].expand(len(x), -1, -1), x], dim=1)
    x = x + eva_positions(tensors["pos_embed"], side)
    output = EvaOutput(states=[x], attentions=[], queries=[], keys=[])
    for k in range(layers):
        block = _below(tensors, f"blocks.{k}.")
        rows = _layer_norm(x, block, "norm1", 1e-6)
        bias = torch.cat(
            [block["attn.q_bias"], torch.zeros_like(block["attn.q_bias"]), block["attn.v_bias"]]
        )
        query, key, value = functional.linear(rows, block["attn.qkv.weight"], bias).chunk(3, -1)
        split = [part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value)]
        scores = split[0] @ split[1].transpose(-1, -2) / math.sqrt(split[0].shape[-1])
        weights = scores.softmax(-1)
        mixed = (weights @ split[2]).transpose(1, 2).flatten(2)
        x = x + _linear(mixed, block, "attn.proj")
        rows = _linear(_layer_norm(x, block, "norm2", 1e-6), block, "mlp.fc1")
        x = x + _linear(functional.gelu(rows), block, "mlp.fc2")
        output.states.append(x)
        output.attentions.append(weights)
        output.queries.append(query)
        output.keys.append(key)
    return output


def eva_positions(table, side):
    """EVA's position table [1, T, C] for `side` patches a side, from the stored one."""
    cls, grid = table.double()[:, :1], table.double()[:, 1:]
    stored = math.isqrt(grid.shape[1])
    if stored == side:
        return table.double()
    grid = grid.unflatten(1, (stored, stored)).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([cls, grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def minigpt_visual_tokens(eva, model, pixels, heads, side, *, layers=None):
    """MiniGPT-v2's visual tokens [B, N / 4, D].

    Args:
        eva: Tensors of eva_vit_g.pth.
        model: Tensors under `model` of the checkpoint.
        pixels: Normalised, [B, 3, H, W].
        heads: Of EVA.
        side: Patches a side.
        layers: Of EVA; see `eva_tower`.
    """
    x = eva_tower(eva, pixels, heads, side, layers=layers).states[-1]
    return minigpt_projection(model, x[:, 1:], x.shape[-1])


def minigpt_projection(model, patches, width):
    """Norm, four neighbours of the raster joined, one linear layer; patches [B, N, C]."""
    model = _double(model)
    # The frozen norm is in no file unless it was trained. It is torch's own: epsilon 1e-5.
    affine = {
        "ln_vision.weight": model.get("ln_vision.weight", torch.ones(width).double()),
        "ln_vision.bias": model.get("ln_vision.bias", torch.zeros(width).double()),
    }
    rows = _layer_norm(patches, affine, "ln_vision", 1e-5)
    return _linear(rows.reshape(len(rows), -1, 4 * width), model, "llama_proj")


def minigpt_llama(llama, model, alpha=16):
    """MiniGPT-v2's decoder: Llama's tensors in float64, with the LoRA of the checkpoint added."""
    merged, model = _double(llama), _double(model)
    prefix, ending = "llama_model.base_model.model.", ".lora_A.weight"
    for name in [name for name in model if name.endswith(ending)]:
        stem = name.removesuffix(ending)
        down, up = model[name], model[f"{stem}.lora_B.weight"]
        merged[f"{stem.removeprefix(prefix)}.weight"] += alpha / len(down) * (up @ down)
    return merged


@torch.no_grad()
def clip_states(clip_folder, pixels):
    """All hidden states [B, T, C] of a CLIP folder's vision tower, by Hugging Face in float64."""
    tower = CLIPVisionModel.from_pretrained(
        clip_folder, dtype=torch.float64, attn_implementation="eager"
    ).eval()
    return tower(pixels.double(), output_hidden_states=True).hidden_states


def shikra_visual_tokens(clip_folder, tensors, pixels, *, layer=-2):
    """Shikra's visual tokens [B, N, D]: CLIP patches through one linear layer."""
    patches = clip_states(clip_folder, pixels)[layer][:, 1:]
    return _linear(patches, _double(tensors), "model.mm_projector")


def llava_visual_tokens(clip_folder, tensors, pixels, *, layer=-2):
    """LLaVA-1.5's visual tokens [B, N, D]: CLIP patches through two linear layers with a GELU."""
    patches, tensors = clip_states(clip_folder, pixels)[layer][:, 1:], _double(tensors)
    rows = functional.gelu(_linear(patches, tensors, "model.mm_projector.0"))
    return _linear(rows, tensors, "model.mm_projector.2")


def llama_logits(tensors, embeddings, position_ids, mask=None, *, heads, theta=1e4, eps=1e-5):
    """Logits [..., S, V] of a Llama or Mistral decoder.

    Args:
        tensors: In Hugging Face's names (`model.layers...`, `lm_head.weight`); the embedding
            table stands in for a head that is missing.
        embeddings: [..., S, D].
        position_ids: [..., S], any numbers.
        mask: Added to the scores, broadcast to [..., H, S, S]; by slot, causal where None.
        heads: Query heads; the number of key heads is read off the tensors.
        theta: Base of the rotary frequencies.
        eps: Of the norms.
    """
    tensors = _double(tensors)
    x = embeddings.double()
    slots = x.shape[-2]
    if mask is None:
        mask = torch.full((slots, slots), -torch.inf, dtype=torch.float64).triu(1)
    depth = len({name.split(".")[2] for name in tensors if name.startswith("model.layers.")})
    head = len(tensors["model.layers.0.self_attn.q_proj.weight"]) // heads
    frequencies = theta ** -(torch.arange(0, head, 2, dtype=torch.float64) / head)
    angles = torch.as_tensor(position_ids).double()[..., None, :, None] * frequencies
    for k in range(depth):
        layer = _below(tensors, f"model.layers.{k}.")
        rows = _rms_norm(x, layer["input_layernorm.weight"], eps)
        query, key, value = (
            functional.linear(rows, layer[f"self_attn.{part}_proj.weight"])
            .unflatten(-1, (-1, head))
            .transpose(-2, -3)
            for part in "qkv"
        )
        group = heads // key.shape[-3]
        key = _rotate(key, angles).repeat_interleave(group, dim=-3)
        value = value.repeat_interleave(group, dim=-3)
        scores = _rotate(query, angles) @ key.transpose(-1, -2) / math.sqrt(head)
        mixed = (scores + mask).softmax(-1) @ value
        mixed = mixed.transpose(-2, -3).flatten(-2)
        x = x + functional.linear(mixed, layer["self_attn.o_proj.weight"])
        rows = _rms_norm(x, layer["post_attention_layernorm.weight"], eps)
        gate = functional.silu(functional.linear(rows, layer["mlp.gate_proj.weight"]))
        rows = gate * functional.linear(rows, layer["mlp.up_proj.weight"])
        x = x + functional.linear(rows, layer["mlp.down_proj.weight"])
    x = _rms_norm(x, tensors["model.norm.weight"], eps)
    table = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    return functional.linear(x, table)


def _rotate(x, angles):
    """Rotary positions: column j turns with column j + half."""
    a, b = x.chunk(2, -1)
    cosine, sine = angles.cos(), angles.sin()
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine], dim=-1)


def _rms_norm(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _layer_norm(x, tensors, name, eps):
    weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    return functional.layer_norm(x, weight.shape, weight, bias, eps)


def _linear(x, tensors, name):
    return functional.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])


def _below(tensors, prefix):
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def _double(tensors):
    return {name: value.double() for name, value in tensors.items()}
