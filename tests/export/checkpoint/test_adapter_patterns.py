"""The patterns of an adapter's settings: PEFT's rule, and an end."""

import re
import types

import pytest

from gap_export.checkpoint import adapter
from gap_export.errors import CheckpointError
from gap_runtime.records.patterns import Matcher

LAYERS = ("model.layers.1.self_attn.q_proj", "model.layers.11.mlp.up_proj", "q_proj")
DOWN = types.SimpleNamespace(shape=(4, 8), key="k", shown="f")


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    "key", ["q_proj", "layers.1.self_attn.q_proj", r"layers\.\d+\..*", "proj", r"1+\.mlp\.up_proj"]
)
def test_a_pattern_is_taken_as_peft_takes_it(layer, key):
    settings = {"r": 4, "lora_alpha": 8, "alpha_pattern": {key: 16}}
    wanted = 4 if re.match(rf"(.*\.)?({key})$", layer) else 2
    assert adapter._find_scale(settings, layer, DOWN, "config", Matcher()) == wanted


@pytest.mark.parametrize("table", [{"q_proj": 4}, {"(": 4}, ["q_proj"]])
def test_a_pattern_that_cannot_be_used_is_named(table):
    settings = {"r": 4, "lora_alpha": 8, "rank_pattern": table}
    with pytest.raises(CheckpointError, match=r"^config: rank_pattern"):
        adapter._find_scale(settings, "a" * 4000 + "?", DOWN, "config", Matcher(0.0))
