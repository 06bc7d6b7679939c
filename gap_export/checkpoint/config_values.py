"""What the values of a checkpoint's JSON files may be, by their key and at any depth.

Families read them through the library's config classes, which take nearly anything and fail where
a value is used. So the JSON files of a checkpoint, but for its tokenizer's, pass here once, when
they are read. A key that is not listed is nobody's concern; null is left to who reads it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

from gap_export.errors import CheckpointError

_MOST: Final = 2**31
_DEEPEST: Final = 1000
"""Above the layers of any model; each is traced or looked at."""
_WORD: Final = 200

_DEPTHS: Final = frozenset(("num_hidden_layers", "depth"))
"""Whole numbers above 0, of layers."""

_COUNTS: Final = frozenset(
    (
        *("hidden_size", "intermediate_size", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "vocab_size", "num_channels", "in_channels"),
        *("max_position_embeddings", "mm_hidden_size", "embed_dim", "num_heads"),
        *("projection_dim", "spatial_merge_size", "temporal_patch_size", "out_hidden_size"),
        *("num_position_embeddings", "window_size"),
    )
)
"""Whole numbers above 0."""
_SIDES: Final = frozenset(("patch_size", "image_size"))
"""Pixels across, or a list of them."""
_WIDEST: Final = 100_000
_SCALES: Final = frozenset(
    ("rope_theta", "rms_norm_eps", "layer_norm_eps", "rescale_factor", "layer_norm_epsilon")
)
"""Numbers above 0."""
_WORDS: Final = frozenset(("model_type", "dtype", "torch_dtype", "projector_type"))
"""A word each."""
_TABLES: Final = frozenset(
    ("text_config", "vision_config", "llm_config", "quantization_config", "rope_parameters")
)
"""Tables each."""
_ACTIVATIONS: Final = frozenset(
    (
        *("gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python"),
        *("gelu_python_tanh", "gelu_pytorch_tanh", "quick_gelu", "relu", "relu2", "relu6"),
        *("leaky_relu", "linear", "mish", "sigmoid", "silu", "swish", "tanh", "laplace"),
        *("hardswish", "prelu", "sqrtsoftplus", "xielu"),
    )
)
"""What the library calls the functions that it knows."""


def require_values(data: dict[str, Any], where: str) -> None:
    """Refuse values that nobody could use.

    Args:
        data: A JSON file of a checkpoint, of a depth that can be walked.
        where: Start of the message.

    Raises:
        CheckpointError: With the first one.
    """
    for key, value in data.items():
        rule = _find_rule(key)
        if rule is not None and value is not None and not rule[0](value):
            raise CheckpointError(
                f"{where}: {key} is {value!r:.60}, expected {rule[1]}; download the checkpoint "
                "again, or mend the value"
            )
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, dict):
                require_values(each, where)


def _find_rule(key: str) -> tuple[Callable[[Any], bool], str] | None:
    """How the values of a key are judged, and what is expected of them."""
    if key.endswith(("hidden_act", "hidden_activation")):
        return _is_activation, f"one of {', '.join(sorted(_ACTIVATIONS))}"
    return next((rule for keys, rule in _RULES if key in keys), None)


def _is_activation(value: Any) -> bool:
    return isinstance(value, str) and value in _ACTIVATIONS


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < _MOST


def _is_side(value: Any) -> bool:
    if isinstance(value, list):
        return 0 < len(value) <= 2 and all(map(_is_side, value))
    return isinstance(value, dict) or (_is_count(value) and value <= _WIDEST)


def _is_scale(value: Any) -> bool:
    return type(value) in {int, float} and 0 < value < math.inf


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and len(value) <= _WORD


def _are_channels(value: Any, least: float) -> bool:
    # How many there have to be, the reader of the processor says.
    return isinstance(value, list) and all(
        type(each) in {int, float} and least <= each <= 10 for each in value
    )


def _are_sections(value: Any) -> bool:
    # How many there have to be, and their sum, the reader of the decoder says.
    return isinstance(value, list) and all(map(_is_count, value))


def _are_numbers(value: Any) -> bool:
    # Which of them there are, the reader of the table or the tower says.
    found = value if isinstance(value, list) else [value]
    return bool(found) and all(type(each) is int for each in found)


_Rule = tuple[Callable[[Any], bool], str]
_RULES: Final[tuple[tuple[frozenset[str], _Rule], ...]] = (
    (_COUNTS, (_is_count, "a whole number above 0")),
    (_DEPTHS, (lambda value: _is_count(value) and value <= _DEEPEST, "1 to 1000 layers")),
    (_SIDES, (_is_side, f"1 to {_WIDEST} pixels")),
    (_SCALES, (_is_scale, "a number above 0")),
    (_WORDS, (_is_word, "a word")),
    (_TABLES, (lambda value: isinstance(value, dict), "a table")),
    (
        frozenset(("eos_token_id",)),
        (_are_numbers, "the number of a token, or a list of several"),
    ),
    (
        frozenset(("image_token_id", "image_token_index")),
        (lambda value: type(value) is int and 0 <= value < _MOST, "the number of a token"),
    ),
    (
        frozenset(("vision_feature_layer", "mm_vision_select_layer")),
        (_are_numbers, "the number of a layer, or a list of several"),
    ),
    (frozenset(("mrope_section",)), (_are_sections, "whole numbers above 0")),
    (frozenset(("image_mean",)), (lambda value: _are_channels(value, -10), "numbers")),
    (frozenset(("image_std",)), (lambda value: _are_channels(value, 1e-3), "numbers above 0")),
)
