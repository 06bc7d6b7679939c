"""Random checkpoints of the true sizes, in the files that they are published in.

    python -m benchmarks.checkpoints NAME FOLDER [--decoder]

NAME is a configuration of export_configs/. Values are drawn once and written over and over, so
that writing is as fast as the disk and memory does not grow with the model. Norms and scales are
as random as the rest: such a model computes nothing of use, but exports like the real one.

NAME may also be `llava-185m` or `llava-1.1b`: LLaVAs of benchmarks.runtime, which are run and not
only exported. Their decoders have 187 million and 1.03 billion parameters beside the embedding
table; with it and CLIP-L they are models of 0.53 and 1.41 billion. Values are drawn as before a
training, so that all activations are finite.
`--decoder` also writes their language model alone, the same values as a Llama checkpoint, to
FOLDER/decoder, and a tokenizer to both.
"""

from __future__ import annotations

import itertools
import json
import math
import string
import zlib
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.command import read_home, run_benchmark
from benchmarks.qwen import QWEN, write_qwen
from benchmarks.shards import write_json, write_safetensors, write_torch, write_torch_shards
from benchmarks.tiled import (
    INTERNVL,
    ONEVISION,
    Shapes,
    internvl_config,
    internvl_shapes,
    llama_config,
    llama_shapes,
    onevision_config,
    onevision_shapes,
)
from gap_runtime.cli.options import ArgumentParser
from gap_runtime.errors import ConfigError

CLIP_TEXT: Final = {
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


LLAMA_7B: Final = llama_config(4096, 32, 32, 11008, 32000)
LLAMA_13B: Final = llama_config(5120, 40, 40, 13824, 32000)
MISTRAL_7B: Final = llama_config(4096, 32, 32, 14336, 32064) | {
    "model_type": "mistral",
    "num_key_value_heads": 8,
    "rope_theta": 1e6,
    "sliding_window": None,
    "max_position_embeddings": 32768,
}

RUN: Final = {
    "llava-185m": llama_config(1024, 12, 16, 2816, 32064),
    "llava-1.1b": llama_config(2048, 22, 32, 5632, 32064) | {"num_key_value_heads": 4},
}
"""Language models of the checkpoints that are run; the larger one has TinyLlama's shape."""
_PIECES: Final = 32000
_IMAGE_TOKEN: Final = 32000
_PAD_TOKEN: Final = 32001


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
        norms: tuple[str, ...] = ("pre_layrnorm", "post_layernorm")
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
            "text_config": CLIP_TEXT,
        },
    )
    shapes = clip_shapes(vision, "vision_model.") | clip_shapes(CLIP_TEXT, "text_model.")
    shapes |= {
        "visual_projection.weight": (768, 1024),
        "text_projection.weight": (768, 768),
        "logit_scale": (),
    }
    write_torch(folder / "pytorch_model.bin", shapes, "float16")


def write_library(folder: Path, kind: str, text: dict[str, Any], *, sparse: bool = False) -> None:
    """LLaVA-1.5 or LLaVA-NeXT in Hugging Face's layout."""
    text = text | {"vocab_size": 32064}
    write_json(folder, "config.json", library_config(kind, text))
    write_safetensors(folder, library_shapes(kind, text), sparse=sparse)


def write_internvl(folder: Path, text: dict[str, Any], *, sparse: bool = False) -> None:
    """InternVL3 or 3.5 in Hugging Face's layout."""
    write_json(folder, "config.json", internvl_config(text))
    write_safetensors(folder, internvl_shapes(text), sparse=sparse)


def write_onevision(folder: Path, text: dict[str, Any], *, sparse: bool = False) -> None:
    """LLaVA-OneVision in Hugging Face's layout."""
    write_json(folder, "config.json", onevision_config(text))
    write_safetensors(folder, onevision_shapes(text), sparse=sparse)


def shikra_config() -> dict[str, Any]:
    """config.json of shikra-7b-delta-v1."""
    delta = LLAMA_7B | {"model_type": "shikra", "vocab_size": 32003, "rms_norm_eps": 1e-6}
    return delta | {"mm_vision_tower": "openai/clip-vit-large-patch14", "mm_hidden_size": 1024}


def lora_shapes() -> Shapes:
    """Tensors of minigptv2_checkpoint.pth."""
    shapes: Shapes = {"llama_proj.weight": (4096, 5632), "llama_proj.bias": (4096,)}
    for layer in range(32):
        for part in ("q_proj", "v_proj"):
            name = f"llama_model.base_model.model.model.layers.{layer}.self_attn.{part}"
            shapes |= {f"{name}.lora_A.weight": (64, 4096), f"{name}.lora_B.weight": (4096, 64)}
    return shapes


def write_shikra(folder: Path) -> None:
    """Differences, base and CLIP in three folders."""
    delta = shikra_config()
    write_json(folder / "shikra-7b-delta-v1", "config.json", delta)
    shapes = llama_shapes(delta, "model.", "lm_head.weight")
    shapes |= {"model.mm_projector.weight": (4096, 1024), "model.mm_projector.bias": (4096,)}
    write_torch_shards(folder / "shikra-7b-delta-v1", shapes)
    base = LLAMA_7B | {"rms_norm_eps": 1e-6}
    write_json(folder / "llama-7b", "config.json", base)
    # By its last norm a model is told from differences to one.
    shapes = llama_shapes(base, "model.", "lm_head.weight")
    write_torch_shards(folder / "llama-7b", shapes, ones={"model.norm.weight"})
    write_clip(folder / "clip-vit-large-patch14", 224)


def write_minigpt(folder: Path) -> None:
    """The published checkpoint, EVA and Llama-2 in one folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_torch(folder / "minigptv2_checkpoint.pth", lora_shapes(), "float32", wrap="model")
    write_torch(folder / "eva_vit_g.pth", eva_shapes(), "float16")
    write_json(folder / "Llama-2-7b-chat-hf", "config.json", LLAMA_7B)
    shapes = llama_shapes(LLAMA_7B, "model.", "lm_head.weight")
    write_safetensors(folder / "Llama-2-7b-chat-hf", shapes)


def library_config(kind: str, text: dict[str, Any]) -> dict[str, Any]:
    """config.json of a LLaVA-1.5 or LLaVA-NeXT in Hugging Face's layout."""
    data: dict[str, Any] = {
        "model_type": kind,
        "image_token_index": _IMAGE_TOKEN,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vision_config": vision_config(336),
        "text_config": text,
        "tie_word_embeddings": False,
    }
    if kind == "llava_next":
        data["image_grid_pinpoints"] = _PINPOINTS
    return data


def library_shapes(kind: str, text: dict[str, Any]) -> Shapes:
    """Tensors of a LLaVA-1.5 or LLaVA-NeXT in Hugging Face's layout."""
    width = text["hidden_size"]
    shapes = clip_shapes(vision_config(336), "vision_tower.vision_model.")
    shapes |= {
        "multi_modal_projector.linear_1.weight": (width, 1024),
        "multi_modal_projector.linear_1.bias": (width,),
        "multi_modal_projector.linear_2.weight": (width, width),
        "multi_modal_projector.linear_2.bias": (width,),
    }
    if kind == "llava_next":
        shapes["image_newline"] = (width,)
    return shapes | llama_shapes(text, "language_model.model.", "language_model.lm_head.weight")


def write_values(folder: Path, shapes: Shapes) -> None:
    """model.safetensors in float16: norms around one, all else around zero, deviation 0.02.

    Values depend on a tensor's name alone, so that two layouts of one model hold the same.
    """
    offset, entries = 0, {}
    for name, shape in shapes.items():
        end = offset + 2 * math.prod(shape)
        entries[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps({"__metadata__": {"format": "pt"}} | entries).encode()
    header += b" " * (-len(header) % 8)
    with (folder / "model.safetensors").open("wb") as opened:
        opened.write(len(header).to_bytes(8, "little") + header)
        for name, shape in shapes.items():
            rng = np.random.default_rng(zlib.crc32(name.removeprefix("language_model.").encode()))
            values = rng.standard_normal(math.prod(shape), dtype=np.float32)
            values *= 0.02
            values += float("norm" in name.rsplit(".", 2)[-2] and name.endswith("weight"))
            opened.write(values.astype(np.float16).data)


def write_run_checkpoint(folder: Path, text: dict[str, Any], *, decoder: bool) -> None:
    """A LLaVA that computes finite values, and its language model alone beside it.

    Args:
        folder: Of the checkpoint.
        text: Config of the language model.
        decoder: Also write the language model to the folder `decoder`, and a tokenizer to both.
    """
    text = text | {"pad_token_id": _PAD_TOKEN, "tie_word_embeddings": False}
    data = library_config("llava", text)
    data |= {"architectures": ["LlavaForConditionalGeneration"], "torch_dtype": "float16"}
    write_json(folder, "config.json", data | {"image_seq_length": 576})
    write_values(folder, library_shapes("llava", text))
    if not decoder:
        return
    alone = text | {"architectures": ["LlamaForCausalLM"], "torch_dtype": "float16"}
    write_json(folder / "decoder", "config.json", alone)
    write_values(folder / "decoder", llama_shapes(text, "model.", "lm_head.weight"))
    for each in (folder, folder / "decoder"):
        ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": _PAD_TOKEN}
        write_json(each, "generation_config.json", ids)
        write_tokenizer(each)
    picture = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 336},
        "crop_size": {"height": 336, "width": 336},
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
    } | {f"do_{step}": True for step in ("resize", "center_crop", "rescale", "normalize")}
    write_json(folder, "preprocessor_config.json", picture)
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    write_json(folder, "processor_config.json", processor)


def _make_pieces() -> Iterator[str]:
    """Pieces of a made-up byte-pair vocabulary, most wanted first; `_` stands for a space."""
    letters = string.ascii_lowercase
    singles = "\u2581" + letters + string.ascii_uppercase + string.digits + string.punctuation
    yield from singles
    # As Llama's: digits stay apart, and the mark of a space only begins a piece.
    joining = [each for each in singles if not each.isdigit()]
    yield from map("".join, itertools.product(joining, joining[1:]))
    yield from map("".join, itertools.product(letters, repeat=3))
    yield from map("".join, itertools.product("\u2581" + string.ascii_uppercase, letters, letters))


def write_tokenizer(folder: Path) -> None:
    """A byte-pair tokenizer of Llama's kind and size, for tokenizers and for SentencePiece."""
    # Both are needed for this alone; the protobuf classes have no types.
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers  # noqa: PLC0415

    proto: Any = import_module("sentencepiece.sentencepiece_model_pb2")
    control = ["<unk>", "<s>", "</s>"]
    raw = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = list(itertools.islice(_make_pieces(), _PIECES - len(control) - len(raw)))
    vocabulary = {piece: token for token, piece in enumerate([*control, *raw, *pieces])}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    settings = {"unk_token": control[0], "fuse_unk": True, "byte_fallback": True}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, **settings))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = [*control, "<image>", "<pad>"]
    tokenizer.add_special_tokens(
        [AddedToken(each, normalized=False, special=True) for each in special]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder, "tokenizer_config.json", config)
    model = proto.ModelProto()
    kinds = proto.ModelProto.SentencePiece
    for token, piece in enumerate([*control, *raw, *pieces]):
        kind = kinds.NORMAL
        if token < len(control):
            kind = kinds.CONTROL if token else kinds.UNKNOWN
        elif token < len(control) + len(raw):
            kind = kinds.BYTE
        score = 0.0 if kind != kinds.NORMAL else float(len(control) + len(raw) - token)
        model.pieces.add(piece=piece, score=score, type=kind)
    model.trainer_spec.model_type = proto.TrainerSpec.BPE
    model.trainer_spec.vocab_size = len(model.pieces)
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = True
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())


def write_checkpoint(
    name: str, folder: Path, *, decoder: bool = False, sparse: bool = False
) -> list[str]:
    """A checkpoint by its configuration's name; the options that gap-export needs to find it.

    Args:
        name: The configuration's, or one of RUN.
        folder: Is created.
        decoder: Also the language model alone (RUN).
        sparse: Files without values, which take no space (safetensors alone).

    Raises:
        ConfigError: There is none of that name, or its files cannot be sparse.
    """
    if sparse and (name in RUN or name in {"shikra-7b", "minigpt-v2"}):
        raise ConfigError(f"{name}: has files that cannot be without values")
    if name in RUN:
        write_run_checkpoint(folder, RUN[name], decoder=decoder)
        return ["--checkpoint", str(folder)]
    if name == "shikra-7b":
        write_shikra(folder)
        base = f"parts.base={folder / 'llama-7b'}"
        return ["--checkpoint", str(folder / "shikra-7b-delta-v1"), "--set", base]
    if name == "minigpt-v2":
        write_minigpt(folder)
        return ["--checkpoint", str(folder)]
    if name in INTERNVL | ONEVISION:
        if name in INTERNVL:
            write_internvl(folder, INTERNVL[name], sparse=sparse)
        else:
            write_onevision(folder, ONEVISION[name], sparse=sparse)
        return ["--checkpoint", str(folder)]
    if name in QWEN:
        write_qwen(folder, name, sparse=sparse)
        return ["--checkpoint", str(folder)]
    texts: Iterable[tuple[str, str, dict[str, Any]]] = (
        ("llava-1.5-7b", "llava", LLAMA_7B),
        ("llava-1.5-13b", "llava", LLAMA_13B),
        ("llava-next-vicuna-7b", "llava_next", LLAMA_7B),
        ("llava-next-mistral-7b", "llava_next", MISTRAL_7B),
    )
    for known, kind, text in texts:
        if known == name:
            write_library(folder, kind, text, sparse=sparse)
            return ["--checkpoint", str(folder)]
    raise ConfigError(f"unknown checkpoint '{name}'")


def main() -> None:
    """Command line."""
    parser = ArgumentParser(description="write a random checkpoint of the true size")
    parser.add_argument("name")
    parser.add_argument("folder", type=read_home)
    parser.add_argument(
        "--decoder",
        action="store_true",
        help=f"also the language model alone, and a tokenizer ({', '.join(RUN)})",
    )
    parser.add_argument("--sparse", action="store_true", help="files without values")
    options = parser.parse_args()
    given = write_checkpoint(
        options.name, options.folder, decoder=options.decoder, sparse=options.sparse
    )
    print(" ".join(given))


if __name__ == "__main__":
    run_benchmark(main)
