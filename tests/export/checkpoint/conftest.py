"""Folders of tensors of every dtype."""

import json

import pytest
from makers.stored import INDEX, some_tensors
from safetensors.torch import save_file


@pytest.fixture
def single(tmp_path):
    """A folder with one file of every dtype."""
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    save_file(some_tensors(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    """A folder with two files and an index."""
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    places = {}
    for k, keys in enumerate((["a.weight", "b.weight"], ["c.weight", "d.index"]), start=1):
        name = f"model-{k:05d}-of-00002.safetensors"
        save_file({key: some_tensors()[key] for key in keys}, tmp_path / name)
        places |= dict.fromkeys(keys, name)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    return tmp_path
