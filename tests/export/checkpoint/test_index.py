"""Checkpoints as an index: where tensors lie, and every way a folder can be broken."""

import dataclasses
import json
import struct
import subprocess
import sys

import pytest
import torch
from makers.stored import INDEX, some_tensors
from safetensors import safe_open
from safetensors.torch import save_file
from tools.refusals import refuse_checkpoint

from gap_export.checkpoint.index import open_checkpoint
from gap_export.checkpoint.tensor import read_tensor
from gap_export.errors import CheckpointError


def rewrite_header(path, edit):
    """Change a safetensors file's header and leave its data as it is."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def test_values_are_safetensors_own_for_every_dtype(single):
    checkpoint = open_checkpoint(str(single))
    with safe_open(single / "model.safetensors", framework="pt") as file:
        assert set(checkpoint.tensors) == set(file.keys()) == set(some_tensors())
        for key, location in checkpoint.tensors.items():
            expected, found = file.get_tensor(key), read_tensor(location)
            assert found.dtype == expected.dtype
            assert found.shape == expected.shape == location.shape
            assert torch.equal(found, expected)
            assert location.length == expected.numel() * expected.element_size()


def test_a_sharded_checkpoint_is_one_index(sharded):
    checkpoint = open_checkpoint(str(sharded))
    assert {key: t.file.name[:11] for key, t in checkpoint.tensors.items()} == {
        "a.weight": "model-00001",
        "b.weight": "model-00001",
        "c.weight": "model-00002",
        "d.index": "model-00002",
    }
    for key, location in checkpoint.tensors.items():
        assert torch.equal(read_tensor(location), some_tensors()[key])
    assert (checkpoint.hub_id, checkpoint.revision) == (None, None)


def test_tensors_of_other_dtypes_are_named_but_not_indexed(single):
    tensors = {
        "x": torch.ones(2),
        "q": torch.ones(3, dtype=torch.uint8),
        "f": torch.ones(1).to(torch.float8_e4m3fn),
    }
    save_file(tensors, single / "model.safetensors")
    checkpoint = open_checkpoint(str(single))
    assert list(checkpoint.tensors) == ["x"]
    assert checkpoint.unreadable == {"q": "U8", "f": "F8_E4M3"}


def test_an_index_may_place_tensors_of_other_dtypes(sharded):
    tensors = {"a.weight": torch.ones(2), "b.weight": torch.ones(3, dtype=torch.uint8)}
    save_file(tensors, sharded / "model-00001-of-00002.safetensors")
    assert open_checkpoint(str(sharded)).unreadable == {"b.weight": "U8"}


def test_a_tensor_that_lies_in_two_shards(sharded):
    tensors = {key: some_tensors()[key] for key in ("c.weight", "d.index", "a.weight")}
    save_file(tensors, sharded / "model-00002-of-00002.safetensors")
    message = refuse_checkpoint(sharded)
    assert "'a.weight'" in message
    assert "model-00001-of-00002.safetensors" in message
    assert "model-00002-of-00002.safetensors" in message


def test_a_missing_shard(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    message = refuse_checkpoint(sharded)
    assert str(sharded / "model-00002-of-00002.safetensors") in message
    assert "missing" in message


def test_an_index_that_names_a_tensor_its_shard_lacks(sharded):
    data = json.loads((sharded / INDEX).read_text(encoding="utf-8"))
    data["weight_map"]["a.bias"] = "model-00001-of-00002.safetensors"
    (sharded / INDEX).write_text(json.dumps(data), encoding="utf-8")
    message = refuse_checkpoint(sharded)
    assert "model-00001-of-00002.safetensors" in message
    assert "'a.bias'" in message


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": 3}}'],
)
def test_a_broken_index(sharded, text):
    (sharded / INDEX).write_text(text, encoding="utf-8")
    assert INDEX in refuse_checkpoint(sharded)


@pytest.mark.parametrize("cut", [1, 4, 50])
def test_a_file_that_is_cut_short(single, cut):
    path = single / "model.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-cut])
    message = refuse_checkpoint(single)
    assert f"{path}: {size - cut} bytes, expected {size}" in message


@pytest.mark.parametrize("length", [0, 3, 8, 20])
def test_a_file_that_ends_inside_its_header(single, length):
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    message = refuse_checkpoint(single)
    assert str(path) in message
    assert f"{length} bytes" in message
    assert "cut short" in message


def test_a_file_with_bytes_to_spare(single):
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0\0")
    assert f"expected {path.stat().st_size - 2}" in refuse_checkpoint(single)


@pytest.mark.parametrize(
    "header",
    [
        b"not json at all",
        b"[1, 2, 3]",
        b'{"a": 3}',
        b'{"a": {"dtype": "F32", "shape": [1]}}',
        b'{"a": {"data_offsets": [0, 4], "shape": [1]}}',
        b'{"a": {"data_offsets": [0, 4], "dtype": "F32"}}',
        b'{"a": {"data_offsets": [0], "dtype": "F32", "shape": [1]}}',
        b'{"a": {"data_offsets": [0, "4"], "dtype": "F32", "shape": [1]}}',
        b'{"a": {"data_offsets": [0, 4], "dtype": "F32", "shape": 1}}',
        b"\xff\xfe\xff\xfe",
    ],
)
def test_a_garbage_header(single, header):
    path = single / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    message = refuse_checkpoint(single)
    assert str(path) in message
    assert "header" in message


def test_a_web_page_in_place_of_weights(single):
    path = single / "model.safetensors"
    path.write_bytes(b"<!DOCTYPE html><html><body>404</body></html>" * 20)
    assert "no complete header" in refuse_checkpoint(single)


@pytest.mark.parametrize("shape", [[3, 4], [3, 50], [3, -5]])
def test_a_shape_that_does_not_fit_its_bytes(single, shape):
    rewrite_header(
        single / "model.safetensors", lambda header: header["a.weight"].update(shape=shape)
    )
    assert "a.weight" in refuse_checkpoint(single)


def test_a_git_lfs_pointer(single):
    (single / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "a pointer of Git LFS" in refuse_checkpoint(single)


def test_a_config_is_asked_for_by_who_needs_it(single):
    (single / "config.json").write_text('{"a": 1}', encoding="utf-8")
    assert open_checkpoint(str(single)).require_json("config.json") == {"a": 1}
    (single / "config.json").unlink()
    checkpoint = open_checkpoint(str(single))
    assert len(checkpoint.index_sha256) == 64
    with pytest.raises(CheckpointError) as caught:
        checkpoint.require_json("config.json")
    assert str(caught.value) == f"{single}: no config.json in it; give a checkpoint folder"


def test_no_weights(single):
    (single / "model.safetensors").unlink()
    (single / "training_args.bin").write_bytes(b"")
    (single / "weights.pth").mkdir()
    message = refuse_checkpoint(single)
    assert str(single) in message
    assert "no weights in it" in message


def test_a_config_that_is_no_object(single):
    (single / "config.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json: not a JSON object"):
        open_checkpoint(str(single)).read_json("config.json")


def test_json_that_is_not_there_is_none(single):
    assert open_checkpoint(str(single)).read_json("generation_config.json") is None


def test_identity_changes_with_config_and_with_tensors(sharded):
    before = open_checkpoint(str(sharded)).index_sha256
    assert open_checkpoint(str(sharded)).index_sha256 == before
    (sharded / "config.json").write_text('{"a": 1}', encoding="utf-8")
    changed = open_checkpoint(str(sharded)).index_sha256
    save_file(
        {"a.weight": torch.ones(5, 3), "b.weight": torch.ones(7)},
        sharded / "model-00001-of-00002.safetensors",
    )
    assert len({before, changed, open_checkpoint(str(sharded)).index_sha256}) == 3


def test_identity_has_the_parts_and_the_order_of_values(single, tmp_path_factory):
    checkpoint, folder = open_checkpoint(str(single)), tmp_path_factory.mktemp("other")
    found = {checkpoint.index_sha256}
    for tensor in (torch.ones(4, 4), torch.ones(4, 4).t(), torch.ones(3, 4)):
        torch.save({"w": tensor.clone() if tensor.is_contiguous() else tensor}, folder / "w.pth")
        part = open_checkpoint(str(folder / "w.pth"))
        for parts in ({"clip": part}, {"base": part}, {"base": checkpoint, "clip": part}):
            found.add(dataclasses.replace(checkpoint, parts=parts).index_sha256)
    assert len(found) == 10


def test_an_index_of_safetensors_needs_no_torch(single):
    code = (
        "import sys; from gap_export.checkpoint.index import open_checkpoint; "
        f"open_checkpoint({str(single)!r}); assert not {{'torch', 'numpy'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
