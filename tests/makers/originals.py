"""Small random checkpoints in the files that the models were published in.

Same key names, nesting, containers, dtypes, shards and tokenizer files as the real downloads, only
smaller: what a reader of the real files needs is here, and what it must not trip over too (rotary
buffers, position numbers, heads nobody uses, a spare block, an optimizer, wrong token numbers).

| maker | as published in |
|---|---|
| `make_sentencepiece` | the tokenizer files of Vicuna and LLaMA |
| `make_clip` | openai/clip-vit-large-patch14-336 |
| `make_llava_original` | liuhaotian/llava-v1.5-7b |
| `make_llava_next` | llava-hf/llava-v1.6-vicuna-7b-hf, llava-hf/llava-v1.6-mistral-7b-hf |
| `make_shikra` | shikras/shikra-7b-delta-v1, a LLaMA, openai/clip-vit-large-patch14 |
| `make_minigpt` | minigptv2_checkpoint.pth, LAVIS' eva_vit_g.pth, meta-llama/Llama-2-7b-chat-hf |
"""

import functools
import io
import itertools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
)

from makers.checkpoints import REFSHAPES, TOKENIZER_FILES, rename_tensors, stored_name

SPREAD = 0.15
SHIKRA_TOKENS = ("<im_patch>", "<im_start>", "<im_end>")
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
# Tiles down, tiles across, in the order of the published pinpoints.
NEXT_TILES = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


@dataclass(frozen=True, kw_only=True)
class ShikraFiles:
    """Folders of a Shikra, and what the delta must come to."""

    delta: Path
    base: Path
    clip: Path
    # The delta's names without its buffers, float32: base + delta, added in float32.
    merged: dict


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


# Tokenizers.


def make_sentencepiece(folder, *, vocabulary=400, added=(), legacy=True, max_length=2048):
    """Write the files of a small trained LLaMA tokenizer and return the folder.

    Args:
        folder: Is created where it is missing; other files in it stay.
        vocabulary: Pieces, 320 to 680: 259 control and byte pieces, letters, merges.
        added: Tokens that `added_tokens.json` numbers from `vocabulary` on.
        legacy: `tokenizer_config.json`'s key of that name, left out where None (as in files
            from before transformers 4.31).
        max_length: `model_max_length`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(_train_sentencepiece(vocabulary))
    plain = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    special = {
        f"{name}_token": {"content": content} | plain
        for name, content in (("bos", "<s>"), ("eos", "</s>"), ("unk", "<unk>"))
    }
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "pad_token": None,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
    }
    config |= {name: {"__type": "AddedToken"} | token for name, token in special.items()}
    config |= {} if legacy is None else {"legacy": legacy}
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", special | {"pad_token": "<unk>"})
    if added:
        numbers = {token: vocabulary + k for k, token in enumerate(added)}
        _write_json(folder / "added_tokens.json", numbers)
    return folder


@functools.cache
def _train_sentencepiece(vocabulary):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_sentences()),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocabulary,
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        add_dummy_prefix=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _sentences():
    colours = ("red", "green", "blue", "yellow", "black", "white", "orange", "purple")
    shapes = ("circle", "square", "triangle", "star", "ring", "cross", "box", "hexagon")
    places = ("left of", "right of", "above", "below", "next to")
    for k, (colour, shape) in enumerate(itertools.product(colours, shapes)):
        other = f"{colours[(k + 3) % 8]} {shapes[(k + 5) % 8]}"
        x, y = k * 37 % 1000, k * 91 % 1000
        yield f"Please provide the bounding box coordinate of the large {colour} {shape}."
        yield f"Where is the small {colour} {shape} {places[k % 5]} the {other}?"
        yield f"The {colour} {shape} is at [0.{x:03d},0.{y:03d},0.{999 - x:03d},0.{999 - y:03d}]."
        yield f"USER: In this image, find the {other}. ASSISTANT: [0.{x % 100:02d}, 0.5, 0.75, 1]"
        yield f"[INST] [refer] give me the location of {colour} {shape} [/INST] {{<{x % 101}>}}"


def _clip_vocabulary():
    """CLIP's byte-level pieces: 512 of bytes, a few merged ones, then the two control tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + k) for k in range(len(rest))]
    merges = []
    for word in ("the", "red", "green", "blue", "circle", "square", "star", "left", "right", "of"):
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = [pieces[0] + pieces[1]]
    merges = list(dict.fromkeys(merges))
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += dict.fromkeys(a + b for a, b in merges)
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return tokens, merges


def _write_clip_tokenizer(folder, tokens, merges):
    _write_json(folder / "vocab.json", {token: k for k, token in enumerate(tokens)})
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    plain = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    special = {
        "bos_token": {"content": "<|startoftext|>"} | plain,
        "eos_token": {"content": "<|endoftext|>"} | plain,
        "unk_token": {"content": "<|endoftext|>"} | plain,
    }
    config = {name: {"__type": "AddedToken"} | token for name, token in special.items()} | {
        "pad_token": "<|endoftext|>",
        "add_prefix_space": False,
        "errors": "replace",
        "do_lower_case": True,
        "model_max_length": 77,
        "tokenizer_class": "CLIPTokenizer",
    }
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", special | {"pad_token": "<|endoftext|>"})


# CLIP.


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
    draw = _Draw(seed, spread)
    tokens, merges = _clip_vocabulary()
    vocabulary = len(tokens)
    if with_tokenizer:
        _write_clip_tokenizer(folder, tokens, merges)
    text_mlp, vision_mlp = text_mlp or 2 * text_width, vision_mlp or 2 * vision_width
    tensors = {"logit_scale": torch.tensor(2.6592)}
    tensors |= _clip_text(draw, vocabulary, text_width, text_layers, text_mlp)
    grid = image_size // patch_size
    tensors |= _clip_vision(draw, grid, patch_size, vision_width, vision_layers, vision_mlp)
    tensors["visual_projection.weight"] = draw.zero(projection, vision_width)
    tensors["text_projection.weight"] = draw.zero(projection, text_width)
    tensors = _cast(tensors, dtype)
    for tower, rows in (("text", 77), ("vision", grid**2 + 1)):
        tensors[f"{tower}_model.embeddings.position_ids"] = torch.arange(rows)[None]
    _save(folder, tensors, files, shards=1)
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
    _write_json(folder / "config.json", config)
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
    _write_json(folder / "preprocessor_config.json", preprocessor)
    return folder


def _clip_vision(draw, grid, patch_size, width, layers, mlp, prefix="vision_model."):
    tensors = {
        "embeddings.class_embedding": draw.zero(width),
        "embeddings.patch_embedding.weight": draw.zero(width, 3, patch_size, patch_size),
        "embeddings.position_embedding.weight": draw.zero(grid**2 + 1, width),
    }
    tensors |= _affine(draw, "pre_layrnorm", width)
    for k in range(layers):
        tensors |= _clip_layer(draw, f"encoder.layers.{k}", width, mlp)
    tensors |= _affine(draw, "post_layernorm", width)
    return _under(prefix, tensors)


def _clip_text(draw, vocabulary, width, layers, mlp):
    tensors = {
        "embeddings.token_embedding.weight": draw.zero(vocabulary, width),
        "embeddings.position_embedding.weight": draw.zero(77, width),
    }
    for k in range(layers):
        tensors |= _clip_layer(draw, f"encoder.layers.{k}", width, mlp)
    tensors |= _affine(draw, "final_layer_norm", width)
    return _under("text_model.", tensors)


def _clip_layer(draw, name, width, mlp):
    tensors = {}
    for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
        tensors |= _linear(draw, f"self_attn.{part}", width, width)
    tensors |= _affine(draw, "layer_norm1", width)
    tensors |= _linear(draw, "mlp.fc1", mlp, width)
    tensors |= _linear(draw, "mlp.fc2", width, mlp)
    tensors |= _affine(draw, "layer_norm2", width)
    return _under(f"{name}.", tensors)


# LLaVA.


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
        model_type: `llava`, or `llava_llama` as the authors' later code writes.
        dtype: That the weights are stored in (rotary buffers are float32 always).
        spread: Standard deviation of the weights.
        seed: Of the weights.
    """
    assert projector in {"mlp2x_gelu", "linear"}
    folder, clip_folder = Path(folder), Path(clip_folder)
    make_sentencepiece(folder, vocabulary=vocabulary)
    draw = _Draw(seed, spread)
    vision = json.loads((clip_folder / "config.json").read_text("utf-8"))["vision_config"]
    kv_heads = kv_heads or heads
    tensors = _llama(draw, vocabulary, width, layers, heads, kv_heads, mlp)
    if projector == "linear":
        bridge = _linear(draw, "model.mm_projector", width, vision["hidden_size"])
    else:
        bridge = _linear(draw, "model.mm_projector.0", width, vision["hidden_size"])
        bridge |= _linear(draw, "model.mm_projector.2", width, width)
    tensors |= bridge
    if with_vision_tower:
        tensors |= _clip_vision(
            draw,
            vision["image_size"] // vision["patch_size"],
            vision["patch_size"],
            vision["hidden_size"],
            vision["num_hidden_layers"],
            vision["intermediate_size"],
            "model.vision_tower.vision_tower.vision_model.",
        )
    tensors = _cast(tensors, dtype) | _rotary_buffers(layers, width // heads)
    _save(folder, tensors, "bin", shards=2)
    # The hub has the projector a second time, in a file that no index names.
    torch.save(_cast(bridge, dtype), folder / "mm_projector.bin")
    config = _llama_config(
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
    _write_json(folder / "config.json", config)
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    generation |= {"max_length": max_positions, "transformers_version": "4.31.0"}
    _write_json(folder / "generation_config.json", generation)
    return folder


def make_llava_next(
    folder,
    *,
    text="llama",
    names="legacy",
    image_size=28,
    patch_size=14,
    vision_width=32,
    vision_layers=3,
    vision_heads=4,
    width=48,
    layers=2,
    heads=4,
    kv_heads=None,
    mlp=80,
    vocabulary=None,
    max_positions=1024,
    tiles=NEXT_TILES,
    max_shard_size=None,
    dtype="float32",
    spread=SPREAD,
    seed=0,
):
    """Make a LLaVA-NeXT in Hugging Face's layout and return its folder.

    Args:
        folder: Is created.
        text: `llama` (Vicuna), or `mistral`: grouped heads, rotary base 1e6, no sliding window.
        names: Tensor names: `legacy` as llava-hf stores them (`language_model.model...`,
            `vision_tower.vision_model...`, `image_newline`) with a config of that time, or
            `modern` (`model.language_model...`, `model.image_newline`, `lm_head`) with the
            library's config of today.
        image_size: Pixels of one tile.
        patch_size: Pixels.
        vision_width: Of the CLIP tower.
        vision_layers: Of the CLIP tower.
        vision_heads: Of the CLIP tower.
        width: Of the decoder.
        layers: Of the decoder.
        heads: Query heads.
        kv_heads: Key and value heads; where None, `heads` for Llama and half for Mistral.
        mlp: Width of the gated MLP.
        vocabulary: Rows of the embedding table; what refshapes' tokenizer needs where None.
        max_positions: Of the decoder.
        tiles: Canvases as (tiles down, tiles across).
        max_shard_size: For example `100KB` to get several files and an index.
        dtype: That the weights are stored in.
        spread: Standard deviation of the weights.
        seed: Of the weights.
    """
    assert text in {"llama", "mistral"}
    assert names in {"legacy", "modern"}
    folder = Path(folder)
    entries = json.loads((REFSHAPES / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {token["content"]: token["id"] for token in entries["added_tokens"]}
    theta = 10000.0 if text == "llama" else 1000000.0
    kv_heads = kv_heads or (heads if text == "llama" else heads // 2)
    pinpoints = [[image_size * down, image_size * across] for down, across in tiles]
    side = image_size // patch_size
    special = {"bos_token_id": ids["<s>"], "eos_token_id": ids["</s>"]}
    special |= {"pad_token_id": ids["<pad>"]}
    sizes = {
        "vocab_size": vocabulary or 1 + max(entries["model"]["vocab"].values()),
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": max_positions,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    } | special
    if text == "llama":
        decoder = LlamaConfig(**sizes)
    else:
        decoder = MistralConfig(sliding_window=None, **sizes)
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=vision_width,
            intermediate_size=2 * vision_width,
            num_hidden_layers=vision_layers,
            num_attention_heads=vision_heads,
            image_size=image_size,
            patch_size=patch_size,
            projection_dim=vision_width,
        ),
        text_config=decoder,
        image_token_index=ids["<image>"],
        image_grid_pinpoints=pinpoints,
        image_seq_length=side**2,
    )
    draw = _Draw(seed, spread)
    state = torch.random.get_rng_state()
    model = LlavaNextForConditionalGeneration(config)
    torch.random.set_rng_state(state)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "norm" in name and name.endswith("weight")
            parameter.copy_((draw.one if norm else draw.zero)(*parameter.shape))
    model = model.to(getattr(torch, dtype))
    model.generation_config = GenerationConfig(**special)
    model.save_pretrained(folder, **({"max_shard_size": max_shard_size} if max_shard_size else {}))
    rename_tensors(folder, lambda key: _next_name(key, names))
    if names == "legacy":
        _write_json(folder / "config.json", _next_config(folder, theta))
    sizes = {"size": {"shortest_edge": image_size}}
    sizes |= {"crop_size": {"height": image_size, "width": image_size}}
    preprocessor = sizes | {
        "aspect_ratio_setting": "anyres",
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_grid_pinpoints": pinpoints,
        "image_mean": CLIP_MEAN,
        "image_processor_type": "LlavaNextImageProcessor",
        "image_std": CLIP_STD,
        "processor_class": "LlavaNextProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
    }
    _write_json(folder / "preprocessor_config.json", preprocessor)
    processor = {
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "patch_size": patch_size,
        "processor_class": "LlavaNextProcessor",
        "vision_feature_select_strategy": "default",
    }
    _write_json(folder / "processor_config.json", processor)
    for name in TOKENIZER_FILES:
        shutil.copyfile(REFSHAPES / name, folder / name)
    return folder


def _next_name(key, names):
    if key.rpartition(".")[2] == "image_newline":
        return "image_newline" if names == "legacy" else "model.image_newline"
    return stored_name(key, names)


def _next_config(folder, theta):
    """The config that the library wrote, in the words of transformers 4.39."""
    data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = data["text_config"]
    del text["rope_parameters"], text["head_dim"]
    text |= {"rope_theta": theta, "torch_dtype": data["dtype"]}
    data |= {
        "ignore_index": -100,
        "torch_dtype": data.pop("dtype"),
        "transformers_version": "4.39.0.dev0",
        "use_image_newline_parameter": True,
        "vocab_size": text["vocab_size"],
    }
    return data


# Shikra.


def make_shikra(
    home,
    *,
    vocabulary=400,
    width=48,
    layers=2,
    heads=4,
    mlp=80,
    max_positions=512,
    image_size=56,
    patch_size=14,
    vision_width=32,
    vision_layers=3,
    vision_heads=4,
    clip_files="safetensors",
    dtype="float16",
    spread=SPREAD,
    seed=0,
):
    """Make a Shikra as published, in `home/delta`, `home/base` and `home/clip`.

    Args:
        home: Is created.
        vocabulary: Of the base; the delta has three rows more.
        width: Of the decoder.
        layers: Of the decoder.
        heads: Of the decoder.
        mlp: Width of the gated MLP.
        max_positions: Of the decoder.
        image_size: Pixels.
        patch_size: Pixels.
        vision_width: Of the CLIP tower.
        vision_layers: Of the CLIP tower.
        vision_heads: Of the CLIP tower.
        clip_files: `make_clip`'s `files`.
        dtype: That base and delta are stored in (the base's rotary buffers are float32).
        spread: Standard deviation of the weights.
        seed: Of the weights.
    """
    home = Path(home)
    clip = make_clip(
        home / "clip",
        image_size=image_size,
        patch_size=patch_size,
        vision_width=vision_width,
        vision_layers=vision_layers,
        vision_heads=vision_heads,
        files=clip_files,
        spread=spread,
        seed=seed + 1,
    )
    draw = _Draw(seed, spread)
    base = _cast(_llama(draw, vocabulary, width, layers, heads, heads, mlp), dtype)
    rows = vocabulary + len(SHIKRA_TOKENS)
    target = _llama(draw, rows, width, layers, heads, heads, mlp)
    delta = {}
    for name, value in target.items():
        known = base[name].float()
        delta[name] = value.clone()
        delta[name][: len(known)] -= known
    delta |= _linear(draw, "model.mm_projector", width, vision_width)
    delta = _cast(delta, dtype)
    merged = {name: value.float() for name, value in delta.items()}
    for name, known in base.items():
        merged[name][: len(known)] += known.float()
    buffers = _rotary_buffers(layers, width // heads)

    # Written before tokenizer configs had the key.
    folder = make_sentencepiece(home / "base", vocabulary=vocabulary, legacy=None)
    _save(folder, base | buffers, "bin", shards=2)
    config = _llama_config(vocabulary, width, layers, heads, mlp, max_positions, dtype, eps=1e-6)
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    right = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    right |= {"transformers_version": "4.28.0.dev0"}
    _write_json(folder / "config.json", config | right)
    _write_json(folder / "generation_config.json", right)

    folder = make_sentencepiece(
        home / "delta", vocabulary=vocabulary, added=SHIKRA_TOKENS, legacy=None
    )
    # The difference of two equal buffers.
    zeros = {name: torch.zeros_like(value) for name, value in buffers.items()}
    _save(folder, delta | _cast(zeros, dtype), "bin", shards=2)
    wrong = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}
    wrong |= {"transformers_version": "4.28.0.dev0"}
    config |= wrong | {
        "architectures": ["ShikraLlamaForCausalLM"],
        "freeze_mm_mlp_adapter": False,
        "max_sequence_length": max_positions,
        "mm_hidden_size": vision_width,
        "mm_use_im_start_end": True,
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14",
        "model_type": "shikra",
        "tune_mm_mlp_adapter": False,
        "use_cache": False,
        "use_mm_proj": True,
        "vocab_size": rows,
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", wrong | {"_from_model_config": True})
    return ShikraFiles(delta=home / "delta", base=home / "base", clip=clip, merged=merged)


# MiniGPT-v2.


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
    draw = _Draw(seed, spread)
    kv_heads = kv_heads or heads

    folder = make_sentencepiece(
        home / "llama", vocabulary=vocabulary, legacy=False, max_length=10**30
    )
    llama = _cast(_llama(draw, vocabulary, width, layers, heads, kv_heads, mlp), llama_dtype)
    _save(folder, llama | _rotary_buffers(layers, width // heads), llama_files, shards=2)
    config = _llama_config(
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
    _write_json(folder / "config.json", config)
    generation = special | {"do_sample": True, "max_length": max_positions, "pad_token_id": 0}
    generation |= {"temperature": 0.6, "top_p": 0.9}
    _write_json(folder / "generation_config.json", generation)

    eva = _eva(
        _Draw(seed + 1, vision_spread),
        pretraining_grid,
        patch_size,
        vision_width,
        vision_layers + spare_blocks,
        vision_mlp or int(4.3637 * vision_width),
    )
    torch.save(_cast(eva, vision_dtype), home / "eva_vit_g.pth")

    model = {}
    for k in range(layers):
        for part, rows in (("q_proj", width), ("v_proj", width // heads * kv_heads)):
            name = f"llama_model.base_model.model.model.layers.{k}.self_attn.{part}"
            model[f"{name}.lora_A.weight"] = draw.zero(rank, width)
            model[f"{name}.lora_B.weight"] = draw.zero(rows, rank)
    if ln_vision:
        model |= _affine(draw, "ln_vision", vision_width)
    model |= _linear(draw, "llama_proj", width, 4 * vision_width)
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
        "optimizer": _adam(draw, model),
        "config": {
            "run": {"task": "image_text_pretrain", "init_lr": 1e-5, "max_epoch": 50, "amp": True},
            "model": settings,
            "datasets": {"refcoco": {"vis_processor": {"train": {"image_size": image_size}}}},
        },
        "scaler": None,
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
        block = _affine(draw, "norm1", width)
        block |= {"attn.q_bias": draw.zero(width), "attn.v_bias": draw.zero(width)}
        block["attn.qkv.weight"] = draw.zero(3 * width, width)
        block |= _linear(draw, "attn.proj", width, width)
        block |= _affine(draw, "norm2", width)
        block |= _linear(draw, "mlp.fc1", mlp, width)
        block |= _linear(draw, "mlp.fc2", width, mlp)
        tensors |= _under(f"blocks.{k}.", block)
    return tensors | _affine(draw, "norm", width) | _linear(draw, "head", 5, width)


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


# Llama.


def _llama(draw, vocabulary, width, layers, heads, kv_heads, mlp):
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
        tensors |= _under(f"model.layers.{k}.", layer)
    tensors["model.norm.weight"] = draw.one(width)
    tensors["lm_head.weight"] = draw.zero(vocabulary, width)
    return tensors


def _rotary_buffers(layers, head_dim):
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return {
        f"model.layers.{k}.self_attn.rotary_emb.inv_freq": frequencies.clone()
        for k in range(layers)
    }


def _llama_config(
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


# Weights and files.


class _Draw:
    """Seeded float32 weights: around zero, or around one for norms."""

    def __init__(self, seed, spread):
        self._generator = torch.Generator().manual_seed(seed)
        self._spread = spread

    def zero(self, *shape):
        return torch.randn(shape, generator=self._generator) * self._spread

    def one(self, *shape):
        return self.zero(*shape) + 1


def _linear(draw, name, rows, columns):
    return {f"{name}.weight": draw.zero(rows, columns), f"{name}.bias": draw.zero(rows)}


def _affine(draw, name, width):
    return {f"{name}.weight": draw.one(width), f"{name}.bias": draw.zero(width)}


def _under(prefix, tensors):
    return {prefix + name: value for name, value in tensors.items()}


def _cast(tensors, dtype):
    return {name: value.to(getattr(torch, dtype)) for name, value in tensors.items()}


def read_folder(folder):
    """All tensors of a folder's checkpoint by name, from safetensors or `pytorch_model` files."""
    tensors = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_file(path)
    for path in sorted(Path(folder).glob("pytorch_model*.bin")):
        tensors |= torch.load(path, weights_only=True)
    return tensors


def _save(folder, tensors, files, *, shards):
    """Write a checkpoint in one file, or in several of about equal size and an index."""
    if files == "safetensors":
        stem, write = "model", functools.partial(save_file, metadata={"format": "pt"})
    else:
        stem, write = "pytorch_model", torch.save
    if shards == 1:
        write(tensors, folder / f"{stem}.{files}")
        return
    total = sum(value.nbytes for value in tensors.values())
    parts, seen = [{} for _ in range(shards)], 0
    for name, value in tensors.items():
        parts[min(seen * shards // total, shards - 1)][name] = value
        seen += value.nbytes
    places = {}
    for k, part in enumerate(parts, 1):
        file = f"{stem}-{k:05d}-of-{shards:05d}.{files}"
        write(part, folder / file)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    _write_json(folder / f"{stem}.{files}.index.json", index)


def _write_json(path, data):
    path.write_text(
        json.dumps(data, indent=2, sort_keys=path.name != "vocab.json") + "\n", "utf-8"
    )
