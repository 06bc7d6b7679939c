"""Values of a checkpoint's JSON files are typed where they are read, at any depth."""

import hypothesis
import pytest
from hypothesis import strategies as st
from transformers.activations import ACT2FN

from gap_export.checkpoint.config_values import _ACTIVATIONS, _RULES, require_values
from gap_export.errors import CheckpointError

GOOD = {
    "hidden_size": 64,
    "rope_theta": 1e6,
    "dtype": "float32",
    "hidden_act": "silu",
    "projector_hidden_act": "gelu",
    "patch_size": 14,
    "image_size": [448, 448],
    "image_mean": [0.5, 0.5, 0],
    "image_std": [0.5, 0.5, 1],
    "num_key_value_heads": None,
    "text_config": {"vocab_size": 100, "anything": [{"depth": 2}]},
}


def test_usual_values_are_taken():
    require_values(GOOD, "config.json")


def test_activations_are_those_of_the_library():
    assert set(ACT2FN) == _ACTIVATIONS


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("hidden_size", (0, -1, 1.5, "64", True, [64], {}, 2**31, 10**30)),
        ("vocab_size", (0, "many")),
        ("num_hidden_layers", (0, 1001, 2**31 - 1, "4")),
        ("patch_size", (0, -14, 2**31, 100_001, "14", 14.0, [], [14, 0], [14, 14, 14])),
        ("rope_theta", (0, -1.0, "10000", True, [], float("nan"), float("inf"))),
        ("dtype", (1, "a\nb", [], "x" * 300)),
        ("hidden_act", ("", "gelu\n", "none such", 1, [])),
        ("projector_hidden_act", ("", {})),
        ("image_mean", ("0.5", [0.5, 0.5, "."], [0.5, 0.5, float("nan")], 0.5)),
        ("image_std", ([0.5, 0.5, 0], [0.5, 0.5, -1], [True] * 3)),
        ("text_config", ([], 1, "x")),
        ("quantization_config", ([1], "gptq")),
        ("image_token_index", (-1, 2**31, 1.0, "x", [5], True)),
        ("mm_vision_select_layer", ("-2", -2.0, [[1, 2]], [])),
        ("num_position_embeddings", (-1, 0, "x")),
        ("mrope_section", ([16, "24", 24], 64, {}, [0, 32, 32], [16.0, 24, 24])),
        ("image_token_id", (-(2**63), 10**30)),
    ],
)
def test_others_are_one_line(key, values):
    for value in values:
        for data in ({key: value}, {"vision_config": {"inner": [{key: value}]}}):
            with pytest.raises(CheckpointError, match=rf"^config\.json: {key} is ") as caught:
                require_values({**GOOD, **data}, "config.json")
            assert ", expected " in str(caught.value)


KEYS = st.sampled_from(sorted({key for keys, _ in _RULES for key in keys} | {"hidden_act"}))
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


@hypothesis.given(data=st.dictionaries(KEYS, PLAIN, max_size=4))
def test_any_values_are_taken_or_refused(data):
    try:
        require_values(data, "x")
    except CheckpointError as error:
        refused = str(error)
    else:
        refused = "x: "
    assert refused.startswith("x: ")
