"""MiniGPT-v2 as in minigptv2_checkpoint.pth, LAVIS' eva_vit_g.pth and Llama-2."""

from dataclasses import dataclass
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
from makers.originals.llama import llama_config, llama_tensors, rotary_buffers
from makers.originals.tokenizers import make_sentencepiece


@dataclass(frozen=True, kw_only=True)
class MinigptFiles:
    """Files of a MiniGPT-v2, and the sizes that none of them holds."""

    home: Path
    checkpoint: Path
    eva: Path
    llama: Path
    image_size: int
    vision_layers: int
    vision_heads: int
    lora_alpha: float


def make_minigpt(
    home,
    *,
    vocabulary=400,
    width=48,
    layers=2,
    heads=4,
    kv_heads=None,
    mlp=80,
    max_positions=512,
    rank=8,
    alpha=16,
    image_size=56,
    patch_size=14,
    pretraining_grid=3,
    vision_width=176,
    vision_layers=2,
    vision_heads=2,
    vision_mlp=None,
    spare_blocks=1,
    ln_vision=False,
    llama_files="safetensors",
    llama_dtype="float16",
    vision_dtype="float16",
    vision_spread=0.1,
    spread=SPREAD,
    seed=0,
):
    """Make a MiniGPT-v2 as published: a checkpoint, `eva_vit_g.pth` and the folder `llama`.

    Args:
        home: Is created.
        vocabulary: Of the tokenizer and the embedding table.
        width: Of the decoder.
        layers: Of the decoder.
        heads: Query heads.
        kv_heads: Key and value heads; as many as `heads` where None.
        mlp: Width of the gated MLP.
        max_positions: Of the decoder.
        rank: Of the LoRA on the query and value projections.
        alpha: Of the LoRA, which is scaled by `alpha / rank`; only `config` tells it.
        image_size: Pixels that the model runs at; the patch grid must be even.
        patch_size: Pixels.
        pretraining_grid: Patches a side of the stored position table.
        vision_width: Of EVA; at true size 16 heads of 88.
        vision_layers: Blocks that run.
        vision_heads: Of EVA.
        vision_mlp: `int(4.3637 * vision_width)` where None.
        spare_blocks: Blocks in the file that do not run; the real file has 40, and 39 run.
        ln_vision: Whether the checkpoint holds the norm after EVA (else it is 1 and 0).
        llama_files: `safetensors` or `bin`.
        llama_dtype: That Llama is stored in.
        vision_dtype: That EVA is stored in.
        vision_spread: Standard deviation of EVA's weights; at 0.15 heads as wide as its see one
            row each.
        spread: Standard deviation of the other weights.
        seed: Of the weights.
    """
    assert image_size // patch_size % 2 == 0, "four patches make a token"
    home = Path(home)
    home.mkdir(parents=True, exist_ok=True)
    draw = Draw(seed, spread)
    kv_heads = kv_heads or heads

    folder = make_sentencepiece(
        home / "llama", vocabulary=vocabulary, legacy=False, max_length=10**30
    )
    llama = cast(llama_tensors(draw, vocabulary, width, layers, heads, kv_heads, mlp), llama_dtype)
    save_tensors(folder, llama | rotary_buffers(layers, width // heads), llama_files, shards=2)
    config = llama_config(
        vocabulary,
        width,
        layers,
        heads,
        mlp,
        max_positions,
        llama_dtype,
        eps=1e-5,
        kv_heads=kv_heads,
    )
    special = {"bos_token_id": 1, "eos_token_id": 2, "transformers_version": "4.32.0.dev0"}
    config |= special | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    config |= {"pretraining_tp": 1, "rope_scaling": None}
    write_json(folder / "config.json", config)
    generation = special | {"do_sample": True, "max_length": max_positions, "pad_token_id": 0}
    generation |= {"temperature": 0.6, "top_p": 0.9}
    write_json(folder / "generation_config.json", generation)

    eva = _eva(
        Draw(seed + 1, vision_spread),
        pretraining_grid,
        patch_size,
        vision_width,
        vision_layers + spare_blocks,
        vision_mlp or int(4.3637 * vision_width),
    )
    torch.save(cast(eva, vision_dtype), home / "eva_vit_g.pth")

    model = {}
    for k in range(layers):
        for part, rows in (("q_proj", width), ("v_proj", width // heads * kv_heads)):
            name = f"llama_model.base_model.model.model.layers.{k}.self_attn.{part}"
            model[f"{name}.lora_A.weight"] = draw.zero(rank, width)
            model[f"{name}.lora_B.weight"] = draw.zero(rows, rank)
        # Their runner leaves out frozen parameters alone, so that buffers stay.
        buffer = rotary_buffers(1, width // heads)["model.layers.0.self_attn.rotary_emb.inv_freq"]
        stem = f"llama_model.base_model.model.model.layers.{k}.self_attn"
        model[f"{stem}.rotary_emb.inv_freq"] = buffer
    if ln_vision:
        model |= affine(draw, "ln_vision", vision_width)
    model |= linear(draw, "llama_proj", width, 4 * vision_width)
    settings = {
        "arch": "minigpt_v2",
        "model_type": "pretrain",
        "image_size": image_size,
        "vit_precision": "fp16",
        "freeze_vit": True,
        "llama_model": "/path/to/Llama-2-7b-chat-hf",
        "lora_r": rank,
        "lora_alpha": alpha,
        "max_txt_len": 500,
        "end_sym": "</s>",
        "prompt_template": "[INST] {} [/INST]",
        "chat_template": True,
        "ckpt": "",
    }
    whole = {
        "model": model,
        "optimizer": _adam(draw, {k: v for k, v in model.items() if "inv_freq" not in k}),
        "config": {
            "run": {"task": "image_text_pretrain", "init_lr": 1e-5, "max_epoch": 50, "amp": True},
            "model": settings,
            "datasets": {"refcoco": {"vis_processor": {"train": {"image_size": image_size}}}},
        },
        # Of torch's GradScaler; they train with mixed precision.
        "scaler": {
            "scale": 65536.0,
            "growth_factor": 2.0,
            "backoff_factor": 0.5,
            "growth_interval": 2000,
            "_growth_tracker": 100,
        },
        "epoch": 3,
    }
    torch.save(whole, home / "minigptv2_checkpoint.pth")
    return MinigptFiles(
        home=home,
        checkpoint=home / "minigptv2_checkpoint.pth",
        eva=home / "eva_vit_g.pth",
        llama=folder,
        image_size=image_size,
        vision_layers=vision_layers,
        vision_heads=vision_heads,
        lora_alpha=alpha,
    )


def _eva(draw, grid, patch_size, width, blocks, mlp):
    tensors = {
        "cls_token": draw.zero(1, 1, width),
        "pos_embed": draw.zero(1, 1 + grid**2, width),
        "patch_embed.proj.weight": draw.zero(width, 3, patch_size, patch_size),
        "patch_embed.proj.bias": draw.zero(width),
    }
    for k in range(blocks):
        block = affine(draw, "norm1", width)
        block |= {"attn.q_bias": draw.zero(width), "attn.v_bias": draw.zero(width)}
        block["attn.qkv.weight"] = draw.zero(3 * width, width)
        block |= linear(draw, "attn.proj", width, width)
        block |= affine(draw, "norm2", width)
        block |= linear(draw, "mlp.fc1", mlp, width)
        block |= linear(draw, "mlp.fc2", width, mlp)
        tensors |= under(f"blocks.{k}.", block)
    return tensors | affine(draw, "norm", width) | linear(draw, "head", 5, width)


def _adam(draw, model):
    """What AdamW's `state_dict` holds: weights decayed, biases not, two moments for each."""
    order = sorted(model, key=lambda name: model[name].ndim < 2)
    decayed = sum(model[name].ndim >= 2 for name in order)
    settings = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False}
    groups = [
        settings | {"weight_decay": 0.05, "params": list(range(decayed))},
        settings | {"weight_decay": 0.0, "params": list(range(decayed, len(order)))},
    ]
    state = {
        k: {
            "step": torch.tensor(100.0),
            "exp_avg": draw.zero(*model[name].shape),
            "exp_avg_sq": draw.zero(*model[name].shape).square(),
        }
        for k, name in enumerate(order)
    }
    return {"state": state, "param_groups": groups}
