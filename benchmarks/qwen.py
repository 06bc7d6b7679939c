"""Qwen-VL checkpoints of the true sizes: configs, shapes and files of random values.

Names and shapes are what the library makes of the published configs; as on the hub, a head that is
the embedding table is left out, and values are bfloat16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from benchmarks.shards import write_json, write_safetensors
from benchmarks.tiled import Shapes

_ROPE_25: Final = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
_ROPE_3: Final = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]}


def _text(
    width: int, layers: int, heads: int, cached: int, mlp: int, **more: Any
) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": cached,
        "intermediate_size": mlp,
        "vocab_size": 151936,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        **more,
    }


def _qwen25(text: dict[str, Any], *, is_tied: bool) -> dict[str, Any]:
    more = {"max_position_embeddings": 128000, "rope_parameters": _ROPE_25}
    return {
        "model_type": "qwen2_5_vl",
        "image_token_id": 151655,
        "tie_word_embeddings": is_tied,
        "text_config": text | more | {"model_type": "qwen2_5_vl_text"},
        "vision_config": {
            "model_type": "qwen2_5_vl_vision",
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "out_hidden_size": text["hidden_size"],
        },
    }


def _qwen3(
    text: dict[str, Any], *, is_tied: bool, tower: tuple[int, int, int], stacked: list[int]
) -> dict[str, Any]:
    depth, width, mlp = tower
    more = {"max_position_embeddings": 262144, "rope_parameters": _ROPE_3, "head_dim": 128}
    return {
        "model_type": "qwen3_vl",
        "image_token_id": 151655,
        "tie_word_embeddings": is_tied,
        "text_config": text | more | {"model_type": "qwen3_vl_text"},
        "vision_config": {
            "model_type": "qwen3_vl_vision",
            "depth": depth,
            "hidden_size": width,
            "intermediate_size": mlp,
            "num_heads": 16,
            "patch_size": 16,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": stacked,
            "out_hidden_size": text["hidden_size"],
        },
    }


_SMALL_TOWER: Final = (24, 1024, 4096)
_LARGE_TOWER: Final = (27, 1152, 4304)
QWEN: Final = {
    "qwen2.5-vl-3b": (
        "Qwen/Qwen2.5-VL-3B-Instruct",
        _qwen25(_text(2048, 36, 16, 2, 11008), is_tied=True),
    ),
    "qwen2.5-vl-7b": (
        "Qwen/Qwen2.5-VL-7B-Instruct",
        _qwen25(_text(3584, 28, 28, 4, 18944, vocab_size=152064), is_tied=False),
    ),
    "qwen3-vl-2b": (
        "Qwen/Qwen3-VL-2B-Instruct",
        _qwen3(
            _text(2048, 28, 16, 8, 6144), is_tied=True, tower=_SMALL_TOWER, stacked=[5, 11, 17]
        ),
    ),
    "qwen3-vl-4b": (
        "Qwen/Qwen3-VL-4B-Instruct",
        _qwen3(
            _text(2560, 36, 32, 8, 9728), is_tied=True, tower=_SMALL_TOWER, stacked=[5, 11, 17]
        ),
    ),
    "qwen3-vl-8b": (
        "Qwen/Qwen3-VL-8B-Instruct",
        _qwen3(
            _text(4096, 36, 32, 8, 12288), is_tied=False, tower=_LARGE_TOWER, stacked=[8, 16, 24]
        ),
    ),
}
"""By the names of export_configs/: where they are on the hub, and their configs."""


def qwen_shapes(config: dict[str, Any]) -> Shapes:
    """Tensors of a Qwen-VL in Hugging Face's layout."""
    # Slow to load, and not needed for other models.
    import torch  # noqa: PLC0415
    from transformers import (  # noqa: PLC0415
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
    )

    with torch.device("meta"):
        model: Any = (
            Qwen3VLForConditionalGeneration(Qwen3VLConfig.from_dict(config))
            if config["model_type"] == "qwen3_vl"
            else Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(config))
        )
    tensors = model.state_dict()
    if config["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def write_qwen(folder: Path, name: str, *, sparse: bool = False) -> None:
    """A checkpoint by its configuration's name."""
    config = QWEN[name][1]
    write_json(folder, "config.json", config)
    write_safetensors(folder, qwen_shapes(config), dtype="bfloat16", sparse=sparse)
