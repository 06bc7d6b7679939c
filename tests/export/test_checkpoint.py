"""Checkpoints as an index: where tensors lie, and every way a folder can be broken."""

import json
import struct

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import save_file

from gap_export.checkpoint import open_checkpoint
from gap_export.errors import CheckpointError
from gap_export.weights import read_tensor

INDEX = "model.safetensors.index.json"


def some_tensors():
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(3, 5),
        "b.weight": torch.randn(7, dtype=torch.float16),
        "c.weight": torch.randn(2, 3, 4).to(torch.bfloat16),
        "d.index": torch.arange(9) - 2**40,
        "e.scalar": torch.tensor(2.5),
    }


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


def refusal(folder):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(folder))
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 3
    return message


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


def test_tensors_of_other_dtypes_are_passed_over(single):
    tensors = {"x": torch.ones(2), "q": torch.ones(3, dtype=torch.uint8), "m": torch.ones(1) > 0}
    save_file(tensors, single / "model.safetensors")
    assert list(open_checkpoint(str(single)).tensors) == ["x"]


def test_a_missing_shard(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    message = refusal(sharded)
    assert str(sharded / "model-00002-of-00002.safetensors") in message
    assert "missing" in message


def test_an_index_that_names_a_tensor_its_shard_lacks(sharded):
    data = json.loads((sharded / INDEX).read_text(encoding="utf-8"))
    data["weight_map"]["a.bias"] = "model-00001-of-00002.safetensors"
    (sharded / INDEX).write_text(json.dumps(data), encoding="utf-8")
    message = refusal(sharded)
    assert "model-00001-of-00002.safetensors" in message
    assert "'a.bias'" in message


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": 3}}'],
)
def test_a_broken_index(sharded, text):
    (sharded / INDEX).write_text(text, encoding="utf-8")
    assert INDEX in refusal(sharded)


@pytest.mark.parametrize("cut", [1, 4, 50])
def test_a_file_that_is_cut_short(single, cut):
    path = single / "model.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-cut])
    message = refusal(single)
    assert f"{path}: {size - cut} bytes, expected {size}" in message


@pytest.mark.parametrize("length", [0, 3, 8, 20])
def test_a_file_that_ends_inside_its_header(single, length):
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    message = refusal(single)
    assert str(path) in message
    assert f"{length} bytes" in message
    assert "cut short" in message


def test_a_file_with_bytes_to_spare(single):
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0\0")
    assert f"expected {path.stat().st_size - 2}" in refusal(single)


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
    message = refusal(single)
    assert str(path) in message
    assert "header" in message


def test_a_web_page_in_place_of_weights(single):
    path = single / "model.safetensors"
    path.write_bytes(b"<!DOCTYPE html><html><body>404</body></html>" * 20)
    assert "no complete header" in refusal(single)


@pytest.mark.parametrize("shape", [[3, 4], [3, 50], [3, -5]])
def test_a_shape_that_does_not_fit_its_bytes(single, shape):
    rewrite_header(
        single / "model.safetensors", lambda header: header["a.weight"].update(shape=shape)
    )
    assert "a.weight" in refusal(single)


def test_a_git_lfs_pointer(single):
    (single / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "download" in refusal(single)


def test_no_config(single):
    (single / "config.json").unlink()
    assert refusal(single) == f"{single}: no config.json in it; give a checkpoint folder"


def test_no_safetensors(single):
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    message = refusal(single)
    assert str(single) in message
    assert "safetensors weights" in message


def test_a_config_that_is_no_object(single):
    (single / "config.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json: not a JSON object"):
        open_checkpoint(str(single)).read_json("config.json")


def test_json_that_is_not_there_is_none(single):
    assert open_checkpoint(str(single)).read_json("generation_config.json") is None


def test_an_unreachable_hub_points_at_local_folders(monkeypatch):
    def offline(*args, **kwargs):
        del args, kwargs
        raise LocalEntryNotFoundError("Cannot find the requested files.\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    message = refusal("some-org/some-model")
    assert message.startswith("some-org/some-model: ")
    assert "Cannot find the requested files." in message
    assert "local checkpoint folder" in message


@pytest.mark.parametrize("name", ["nothing-here", "./nothing/here", "/nothing/here"])
def test_what_cannot_be_a_hub_id_is_not_asked_for(monkeypatch, name):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    assert refusal(name) == f"{name}: no such checkpoint folder"


def hub_cache(folder, home):
    """The folder as the hub client keeps it: names that are links into a store of blobs."""
    blobs, snapshot = home / "blobs", home / "snapshots" / "0123abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for k, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / f"{k:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{k:064x}")
    return snapshot


def test_links_of_a_hub_cache_are_followed_to_real_files(sharded, tmp_path_factory):
    snapshot = hub_cache(sharded, tmp_path_factory.mktemp("cache"))
    for key, location in open_checkpoint(str(snapshot)).tensors.items():
        assert not location.file.is_symlink()
        assert location.file.parent.name == "blobs"
        assert torch.equal(read_tensor(location), some_tensors()[key])


def test_a_downloaded_checkpoint_keeps_its_id_and_commit(sharded, tmp_path_factory, monkeypatch):
    snapshot = hub_cache(sharded, tmp_path_factory.mktemp("cache"))
    asked = []

    def download(hub_id, *, revision, allow_patterns):
        asked.append((hub_id, revision))
        assert not any("*.bin" in pattern for pattern in allow_patterns)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    checkpoint = open_checkpoint("some-org/some-model", "main")
    assert asked == [("some-org/some-model", "main")]
    assert (checkpoint.hub_id, checkpoint.revision) == ("some-org/some-model", "0123abc")


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
