"""The pruner of a checkpoint folder where none is asked for."""

import json

import pytest

from gap_export.config.load import load_config


@pytest.mark.parametrize(
    ("model_type", "pruner"),
    [
        ("llava", "cls_attention"),
        ("llava_onevision", "column_attention"),
        ("qwen2_5_vl", "divprune"),
        ("qwen3_vl", "divprune"),
    ],
)
def test_a_folder_starts_from_a_pruner_that_its_family_serves(model_type, pruner, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert load_config(str(tmp_path), {}).config.prune.strategy == pruner
    asked = load_config(str(tmp_path), {"prune.strategy": "random"})
    assert asked.config.prune.strategy == "random"
