"""Random checkpoints of the true sizes, in the files that they are published in.

    python -m benchmarks.checkpoints NAME FOLDER

NAME is a configuration of export_configs/. Values are drawn once and written over and over, so
that writing is as fast as the disk and memory does not grow with the model. Norms and scales are
as random as the rest: such a model computes nothing of use, but exports like the real one.
"""

from __future__ import annotations

import argparse
import json
import math
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

Shapes = dict[str, tuple[int, ...]]

_BLOCK_BYTES: Final = 64 * 2**20
_SHARD_BYTES: Final = 5 * 10**9
_CLIP_TEXT: Final = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "projection_dim": 768,
    "eos_token_id": 2,
}
_PINPOINTS: Final = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


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


LLAMA_7B: Final = llama_config(4096, 32, 32, 11008, 32000)
LLAMA_13B: Final = llama_config(5120, 40, 40, 13824, 32000)
MISTRAL_7B: Final = llama_config(4096, 32, 32, 14336, 32064) | {
    "model_type": "mistral",
    "num_key_value_heads": 8,
    "rope_theta": 1e6,
    "sliding_window": None,
    "max_position_embeddings": 32768,
}


def vision_config(side: int) -> dict[str, Any]:
    """CLIP-L/14's tower at a picture size."""
    return {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "image_size": side,
        "patch_size": 14,
        "projection_dim": 768,
    }


def llama_shapes(config: dict[str, Any], prefix: str, head: str) -> Shapes:
    """Tensors of a Llama or Mistral, by the keys of its files."""
    width, mlp = config["hidden_size"], config["intermediate_size"]
    cached = width * config["num_key_value_heads"] // config["num_attention_heads"]
    vocabulary = config["vocab_size"]
    shapes: Shapes = {f"{prefix}embed_tokens.weight": (vocabulary, width)}
    for layer in range(config["num_hidden_layers"]):
        name = f"{prefix}layers.{layer}."
        shapes |= {
            f"{name}self_attn.q_proj.weight": (width, width),
            f"{name}self_attn.k_proj.weight": (cached, width),
            f"{name}self_attn.v_proj.weight": (cached, width),
            f"{name}self_attn.o_proj.weight": (width, width),
            f"{name}mlp.gate_proj.weight": (mlp, width),
            f"{name}mlp.up_proj.weight": (mlp, width),
            f"{name}mlp.down_proj.weight": (width, mlp),
            f"{name}input_layernorm.weight": (width,),
            f"{name}post_attention_layernorm.weight": (width,),
        }
    return shapes | {f"{prefix}norm.weight": (width,), head: (vocabulary, width)}


def clip_shapes(config: dict[str, Any], prefix: str) -> Shapes:
    """Tensors of a CLIP vision or text tower, by the keys of its files."""
    width, mlp = config["hidden_size"], config["intermediate_size"]
    if "image_size" in config:
        patch = config["patch_size"]
        shapes: Shapes = {
            f"{prefix}embeddings.class_embedding": (width,),
            f"{prefix}embeddings.patch_embedding.weight": (width, 3, patch, patch),
            f"{prefix}embeddings.position_embedding.weight": (
                (config["image_size"] // patch) ** 2 + 1,
                width,
            ),
        }
        norms = ("pre_layrnorm", "post_layernorm")
    else:
        shapes = {
            f"{prefix}embeddings.token_embedding.weight": (config["vocab_size"], width),
            f"{prefix}embeddings.position_embedding.weight": (77, width),
        }
        norms = ("final_layer_norm",)
    for norm in norms:
        shapes |= {f"{prefix}{norm}.weight": (width,), f"{prefix}{norm}.bias": (width,)}
    for layer in range(config["num_hidden_layers"]):
        name = f"{prefix}encoder.layers.{layer}."
        for part, size in (
            *((f"self_attn.{x}_proj", (width, width)) for x in ("q", "k", "v", "out")),
            ("mlp.fc1", (mlp, width)),
            ("mlp.fc2", (width, mlp)),
        ):
            shapes |= {f"{name}{part}.weight": size, f"{name}{part}.bias": size[:1]}
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{name}{norm}.weight": (width,), f"{name}{norm}.bias": (width,)}
    return shapes


def eva_shapes() -> Shapes:
    """Tensors of eva_vit_g.pth."""
    width, mlp = 1408, 6144
    shapes: Shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 257, width),
        "patch_embed.proj.weight": (width, 3, 14, 14),
        "patch_embed.proj.bias": (width,),
    }
    for layer in range(40):
        name = f"blocks.{layer}."
        shapes |= {
            f"{name}norm1.weight": (width,),
            f"{name}norm1.bias": (width,),
            f"{name}attn.q_bias": (width,),
            f"{name}attn.v_bias": (width,),
            f"{name}attn.qkv.weight": (3 * width, width),
            f"{name}attn.proj.weight": (width, width),
            f"{name}attn.proj.bias": (width,),
            f"{name}norm2.weight": (width,),
            f"{name}norm2.bias": (width,),
            f"{name}mlp.fc1.weight": (mlp, width),
            f"{name}mlp.fc1.bias": (mlp,),
            f"{name}mlp.fc2.weight": (width, mlp),
            f"{name}mlp.fc2.bias": (width,),
        }
    return shapes


def write_json(folder: Path, name: str, data: dict[str, Any]) -> None:
    """A JSON file of a checkpoint folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(data, indent=1), encoding="utf-8")


def write_safetensors(folder: Path, shapes: Shapes, *, sparse: bool = False) -> None:
    """Float16 shards of at most 5 GB with their index; sparse ones take no space."""
    shards = _split(shapes)
    weight_map = {}
    for k, names in enumerate(shards, start=1):
        file = f"model-{k:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        entries, offset = {}, 0
        for name in names:
            size = 2 * math.prod(shapes[name])
            entries[name] = {
                "dtype": "F16",
                "shape": list(shapes[name]),
                "data_offsets": [offset, offset + size],
            }
            offset += size
        header = json.dumps(entries).encode()
        header += b" " * (-len(header) % 8)
        with (folder / file).open("wb") as opened:
            opened.write(len(header).to_bytes(8, "little") + header)
            if sparse:
                opened.truncate(opened.tell() + offset)
            else:
                _fill(opened, offset)
    write_json(folder, "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def write_torch(path: Path, shapes: Shapes, dtype: torch.dtype, wrap: str | None = None) -> None:
    """A torch file: torch lays it out without values, which are then written into their places."""
    with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
        tensors: Any = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
        torch.save({wrap: tensors} if wrap else tensors, path)
    with zipfile.ZipFile(path) as archive:
        places = [
            (info.header_offset, info.file_size)
            for info in archive.infolist()
            if "/data/" in info.filename
        ]
    with path.open("r+b") as opened:
        for header, size in places:
            opened.seek(header + 26)
            name, extra = (int.from_bytes(opened.read(2), "little") for _ in range(2))
            opened.seek(header + 30 + name + extra)
            _fill(opened, size, dtype)


def write_torch_shards(folder: Path, shapes: Shapes) -> None:
    """pytorch_model .bin shards in float16 with their index."""
    shards = _split(shapes)
    weight_map = {}
    for k, names in enumerate(shards, start=1):
        file = f"pytorch_model-{k:05d}-of-{len(shards):05d}.bin"
        weight_map |= dict.fromkeys(names, file)
        write_torch(folder / file, {name: shapes[name] for name in names}, torch.float16)
    write_json(folder, "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": weight_map})


def _split(shapes: Shapes) -> list[list[str]]:
    """Names by shard, in order."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        length = 2 * math.prod(shape)
        if size and size + length > _SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += length
    return shards


def _fill(opened: Any, size: int, dtype: torch.dtype = torch.float16) -> None:
    """Random values, the same block again and again."""
    kind = np.float16 if dtype == torch.float16 else np.float32
    if kind not in _BLOCKS:
        values = np.random.default_rng(0).standard_normal(_BLOCK_BYTES // 8, dtype=np.float32)
        _BLOCKS[kind] = (values * 0.02).astype(kind).tobytes()
    block = memoryview(_BLOCKS[kind])
    while size:
        size -= opened.write(block[: min(size, len(block))])


_BLOCKS: dict[Any, bytes] = {}


def write_clip(folder: Path, side: int) -> None:
    """openai/clip-vit-large-patch14 at a picture size."""
    vision = vision_config(side)
    write_json(
        folder,
        "config.json",
        {
            "model_type": "clip",
            "projection_dim": 768,
            "vision_config": vision,
            "text_config": _CLIP_TEXT,
        },
    )
    shapes = clip_shapes(vision, "vision_model.") | clip_shapes(_CLIP_TEXT, "text_model.")
    shapes |= {
        "visual_projection.weight": (768, 1024),
        "text_projection.weight": (768, 768),
        "logit_scale": (),
    }
    write_torch(folder / "pytorch_model.bin", shapes, torch.float16)


def write_library(folder: Path, kind: str, text: dict[str, Any], *, sparse: bool = False) -> None:
    """LLaVA-1.5 or LLaVA-NeXT in Hugging Face's layout."""
    text = text | {"vocab_size": 32064}
    vision = vision_config(336)
    data: dict[str, Any] = {
        "model_type": kind,
        "image_token_index": 32000,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vision_config": vision,
        "text_config": text,
        "tie_word_embeddings": False,
    }
    width = text["hidden_size"]
    shapes = clip_shapes(vision, "vision_tower.vision_model.")
    shapes |= {
        "multi_modal_projector.linear_1.weight": (width, 1024),
        "multi_modal_projector.linear_1.bias": (width,),
        "multi_modal_projector.linear_2.weight": (width, width),
        "multi_modal_projector.linear_2.bias": (width,),
    }
    if kind == "llava_next":
        data["image_grid_pinpoints"] = _PINPOINTS
        shapes["image_newline"] = (width,)
    shapes |= llama_shapes(text, "language_model.model.", "language_model.lm_head.weight")
    write_json(folder, "config.json", data)
    write_safetensors(folder, shapes, sparse=sparse)


def write_shikra(folder: Path) -> None:
    """Differences, base and CLIP in three folders."""
    delta = LLAMA_7B | {"model_type": "shikra", "vocab_size": 32003, "rms_norm_eps": 1e-6}
    delta |= {"mm_vision_tower": "openai/clip-vit-large-patch14", "mm_hidden_size": 1024}
    write_json(folder / "shikra-7b-delta-v1", "config.json", delta)
    shapes = llama_shapes(delta, "model.", "lm_head.weight")
    shapes |= {"model.mm_projector.weight": (4096, 1024), "model.mm_projector.bias": (4096,)}
    write_torch_shards(folder / "shikra-7b-delta-v1", shapes)
    base = LLAMA_7B | {"rms_norm_eps": 1e-6}
    write_json(folder / "llama-7b", "config.json", base)
    write_torch_shards(folder / "llama-7b", llama_shapes(base, "model.", "lm_head.weight"))
    write_clip(folder / "clip-vit-large-patch14", 224)


def write_minigpt(folder: Path) -> None:
    """The published checkpoint, EVA and Llama-2 in one folder."""
    shapes: Shapes = {"llama_proj.weight": (4096, 5632), "llama_proj.bias": (4096,)}
    for layer in range(32):
        for part in ("q_proj", "v_proj"):
            name = f"llama_model.base_model.model.model.layers.{layer}.self_attn.{part}"
            shapes |= {f"{name}.lora_A.weight": (64, 4096), f"{name}.lora_B.weight": (4096, 64)}
    folder.mkdir(parents=True, exist_ok=True)
    write_torch(folder / "minigptv2_checkpoint.pth", shapes, torch.float32, wrap="model")
    write_torch(folder / "eva_vit_g.pth", eva_shapes(), torch.float16)
    write_json(folder / "Llama-2-7b-chat-hf", "config.json", LLAMA_7B)
    shapes = llama_shapes(LLAMA_7B, "model.", "lm_head.weight")
    write_safetensors(folder / "Llama-2-7b-chat-hf", shapes)


def write_checkpoint(name: str, folder: Path) -> list[str]:
    """A checkpoint by its configuration's name; the options that gap-export needs to find it."""
    if name == "shikra-7b":
        write_shikra(folder)
        base = f"parts.base={folder / 'llama-7b'}"
        return ["--checkpoint", str(folder / "shikra-7b-delta-v1"), "--set", base]
    if name == "minigpt-v2":
        write_minigpt(folder)
        return ["--checkpoint", str(folder)]
    texts: Iterable[tuple[str, str, dict[str, Any]]] = (
        ("llava-1.5-7b", "llava", LLAMA_7B),
        ("llava-1.5-13b", "llava", LLAMA_13B),
        ("llava-next-vicuna-7b", "llava_next", LLAMA_7B),
        ("llava-next-mistral-7b", "llava_next", MISTRAL_7B),
    )
    for known, kind, text in texts:
        if known == name:
            write_library(folder, kind, text)
            return ["--checkpoint", str(folder)]
    raise SystemExit(f"unknown checkpoint '{name}'")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="write a random checkpoint of the true size")
    parser.add_argument("name")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    print(" ".join(write_checkpoint(options.name, options.folder)))


if __name__ == "__main__":
    main()
