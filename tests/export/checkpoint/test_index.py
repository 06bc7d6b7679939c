"""Checkpoints as an index: where tensors lie, and every way a folder can be broken."""

import argparse
import dataclasses
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from gap_export.checkpoint.index import open_checkpoint, open_part, read_tensor
from gap_export.errors import CheckpointError

INDEX = "model.safetensors.index.json"


def some_tensors():
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(3, 5),
        "b.weight": torch.randn(7, dtype=torch.float16),
        "c.weight": torch.randn(2, 3, 4).to(torch.bfloat16),
        "d.index": torch.arange(9) - 2**40,
        "d.small": torch.arange(5, dtype=torch.int32) - 2,
        "d.mask": torch.tensor([True, False, True]),
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
    message = refusal(sharded)
    assert "'a.weight'" in message
    assert "model-00001-of-00002.safetensors" in message
    assert "model-00002-of-00002.safetensors" in message


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
    message = refusal(single)
    assert str(single) in message
    assert "no weights in it" in message


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


@pytest.mark.parametrize(
    "name", ["nothing-here", "./nothing/here", "/nothing/here", "weights/nothing.pth"]
)
def test_what_cannot_be_a_hub_id_is_not_asked_for(monkeypatch, name):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    assert refusal(name) == f"{name}: no such checkpoint folder or file"


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


class Hub:
    """A hub that gives one folder as the cache has it after a download of some of its files."""

    def __init__(self, snapshot):
        self.snapshot, self.asked = snapshot, []
        self.files = {path.name for path in snapshot.iterdir()}
        self.away = snapshot.parent / "away"
        self.away.mkdir()
        for name in self.files:
            (snapshot / name).rename(self.away / name)

    def __call__(self, hub_id, *, revision, allow_patterns, ignore_patterns=None):
        self.asked.append((hub_id, revision))
        paths = sorted(path.name for path in self.away.iterdir())
        for name in huggingface_hub.utils.filter_repo_objects(
            paths, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            (self.away / name).rename(self.snapshot / name)
        return str(self.snapshot)


def test_a_downloaded_checkpoint_keeps_its_id_and_commit(sharded, tmp_path_factory, monkeypatch):
    (sharded / "pytorch_model.bin").write_bytes(b"")
    (sharded / "merges.txt").write_bytes(b"")
    hub = Hub(hub_cache(sharded, tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    checkpoint = open_checkpoint("some-org/some-model", "main")
    assert hub.asked == [("some-org/some-model", "main")]
    assert (checkpoint.hub_id, checkpoint.revision) == ("some-org/some-model", "0123abc")
    assert [path.name for path in hub.away.iterdir()] == ["pytorch_model.bin"]


def test_torch_files_are_downloaded_where_there_are_no_others(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    torch.save(some_tensors(), folder / "pytorch_model.bin")
    (folder / "config.json").write_text("{}", encoding="utf-8")
    for name in ("training_args.bin", "optimizer.pt", "rng_state_0.pth"):
        (folder / name).write_bytes(b"")
    hub = Hub(hub_cache(folder, tmp_path))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    checkpoint = open_checkpoint("some-org/some-model")
    assert hub.asked == [("some-org/some-model", None), ("some-org/some-model", "0123abc")]
    assert len(list(hub.away.iterdir())) == 3
    assert checkpoint.tensors["a.weight"].file.parent.name == "blobs"
    assert_values(checkpoint, some_tensors())


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


# --- torch files


class Weird(torch.nn.Module):
    """Something that only unpickling with code can bring back."""


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def odd_tensors():
    """Every way in which tensors lie in a torch file, of the dtypes that graphs use."""
    torch.manual_seed(1)
    table = torch.randn(6, 8)
    halves = torch.randn(40).half()
    return some_tensors() | {
        "table": table,
        "view.rows": table[2:4],
        "view.row": table[5],
        "view.transposed": table.t(),
        "view.columns": table[:, 3:5],
        "view.every_other": halves[1::2],
        "view.tail": halves[37:],
        "view.whole": halves,
        "view.folded": halves[2:26].view(2, 3, 4).permute(2, 0, 1),
        "view.bits": torch.randn(3).view(torch.int32),
        "expanded": torch.randn(1, 4).expand(3, 4),
        "expanded.scalar": torch.tensor(2.0, dtype=torch.bfloat16).expand(2, 2),
        "empty": torch.zeros(0, 3),
        "empty.transposed": torch.zeros(3, 0).t(),
        "column": torch.randn(5, 1).t(),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "trained": torch.randn(3, requires_grad=True),
        "buffer": torch.nn.Buffer(torch.randn(2)),
        "own order": torch.randn(1, 2, 3, 4).to(memory_format=torch.channels_last),
    }


def assert_values(checkpoint, expected):
    """Read values are the expected ones, and lie in the file as the index says."""
    assert set(checkpoint.tensors) == set(expected)
    for key, tensor in expected.items():
        location, found = checkpoint.tensors[key], read_tensor(checkpoint.tensors[key])
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert location.shape == tuple(tensor.shape)
        assert torch.equal(found, tensor), key
        assert found.is_contiguous()
        assert location.length == tensor.numel() * tensor.element_size()
        assert (location.strides is None) == tensor.is_contiguous()
        if location.strides is None:
            raw = location.file.read_bytes()[location.offset :][: location.length]
            values = tensor.detach().contiguous().flatten().view(torch.uint8)
            assert raw == values.numpy().tobytes(), key


def save_state(folder, state, name="pytorch_model.bin", **options):
    torch.save(state, folder / name, **options)
    return folder / name


def rewrite(path, edit=None, *, order=None, **options):
    """Write a torch file's records anew with Python's zip, which aligns nothing."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    if edit is not None:
        edit(records)
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name in order(records) if order else records:
            archive.writestr(name, records[name])
    return path


def rewrite_pickle(path, pickled):
    """Give a torch file another pickle; `pickled` is bytes, or makes them from the old ones."""

    def edit(records):
        name = next(name for name in records if name.endswith("/data.pkl"))
        records[name] = pickled(records[name]) if callable(pickled) else pickled

    return rewrite(path, edit)


class Storage:
    """Pickled as a reference to storage `key`."""

    def __init__(self, key="0", items=6, kind=torch.FloatStorage, device="cpu"):
        self.reference = ("storage", kind, key, device, items)


def pickle_tensors(tensors):
    """The pickle of a state dict, of which each value is (storage, offset, shape, strides)."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return value.reference if isinstance(value, Storage) else None

    buffer = io.BytesIO()
    rebuild, rest = torch._utils._rebuild_tensor_v2, (False, OrderedDict())
    Pickler(buffer, protocol=2).dump(
        {key: Call(rebuild, *value, *rest) for key, value in tensors.items()}
    )
    return buffer.getvalue()


@pytest.mark.parametrize("aligned", [True, False])
def test_torch_tensors_lie_where_the_index_says(tmp_path, aligned):
    path = save_state(tmp_path, odd_tensors())
    if not aligned:
        rewrite(path)
    checkpoint = open_checkpoint(str(tmp_path))
    assert_values(checkpoint, odd_tensors())
    assert checkpoint.unreadable == {}
    offsets = {key: tensor.offset for key, tensor in checkpoint.tensors.items()}
    assert offsets["view.rows"] == offsets["table"] + 2 * 8 * 4
    assert offsets["view.tail"] == offsets["view.whole"] + 37 * 2
    assert checkpoint.tensors["view.transposed"].strides == (1, 8)
    assert checkpoint.tensors["expanded"].strides == (0, 1)
    assert checkpoint.tensors["expanded"].span == 16


def test_values_of_torch_files_are_not_read(tmp_path, monkeypatch):
    path = save_state(tmp_path, {"a": torch.ones(2**20), "b": torch.ones(2**20)})
    size, read = path.stat().st_size, []
    opened = Path.open

    def watched(self, mode="r", *args, **kwargs):
        file = opened(self, mode, *args, **kwargs)
        if mode == "rb":
            plain = file.read
            monkeypatch.setattr(file, "read", lambda n=-1: read.append(plain(n)) or read[-1])
        return file

    monkeypatch.setattr(Path, "open", watched)
    assert len(open_checkpoint(str(tmp_path)).tensors) == 2
    assert 0 < sum(map(len, read)) < size / 100


def test_offsets_past_four_gibibytes(tmp_path):
    path = save_state(tmp_path, {"a": torch.ones(3), "b": torch.arange(5), "c": torch.ones(2)})
    with zipfile.ZipFile(path) as archive:
        infos = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        records = {name: archive.read(info) for name, info in infos.items()}
    gap = 5 * 2**30
    with path.open("wb") as file:
        file.write(b"PK")
        file.truncate(gap)
        with zipfile.ZipFile(file, "a") as archive:
            for name, data in records.items():
                archive.writestr(f"archive/{name}", data)
    checkpoint = open_checkpoint(str(tmp_path))
    assert min(tensor.offset for tensor in checkpoint.tensors.values()) > gap
    assert torch.equal(read_tensor(checkpoint.tensors["b"]), torch.arange(5))


def test_records_in_another_order_than_torch_writes_them(tmp_path):
    # Without reading values, torch takes storages for lying in the order of their numbers.
    state = {f"layers.{k}": torch.full((16,), float(k)) for k in range(12)}
    path = save_state(tmp_path, state)
    source = torch._C.PyTorchFileReader(str(path))
    names = [n for n in source.get_all_records() if n != "version" and not n.startswith(".data/")]
    writer = torch._C.PyTorchFileWriter(str(tmp_path / "sorted.bin"))
    for name in sorted(names, key=lambda name: (name.startswith("data/"), name)):
        data = source.get_record(name)
        writer.write_record(name, data, len(data))
    writer.write_end_of_file()
    assert_values(open_checkpoint(str(tmp_path / "sorted.bin")), state)


def test_a_file_of_a_gpu_is_indexed_without_one(tmp_path):
    path = save_state(tmp_path, some_tensors())
    rewrite_pickle(path, lambda old: old.replace(b"X\3\0\0\0cpu", b"X\6\0\0\0cuda:0"))
    assert_values(open_checkpoint(str(tmp_path)), some_tensors())


def test_torch_tensors_that_no_graph_can_use_are_named(tmp_path):
    state = {
        "w": torch.ones(2),
        "byte": torch.ones(2, dtype=torch.uint8),
        "double": torch.ones(2, dtype=torch.float64),
        "eight": torch.ones(2).to(torch.float8_e5m2),
        "complex": torch.ones(2, dtype=torch.complex64),
        "negated": torch.ones(3, dtype=torch.complex64).conj().imag,
        "sparse": torch.eye(3).to_sparse(),
        "meta": torch.ones(3, device="meta"),
    }
    save_state(tmp_path, state)
    checkpoint = open_checkpoint(str(tmp_path))
    assert list(checkpoint.tensors) == ["w"]
    assert checkpoint.unreadable == {
        "byte": "uint8",
        "double": "float64",
        "eight": "float8_e5m2",
        "complex": "complex64",
        "negated": "negated float32",
        "sparse": "sparse_coo float32",
        "meta": "float32 without values",
    }


@pytest.fixture
def sharded_torch(tmp_path):
    """A folder with two torch files and an index."""
    places = {}
    for k, keys in enumerate((["a.weight", "b.weight"], ["c.weight", "d.index"]), start=1):
        name = f"pytorch_model-{k:05d}-of-00002.bin"
        save_state(tmp_path, {key: some_tensors()[key] for key in keys}, name)
        places |= dict.fromkeys(keys, name)
    text = json.dumps({"metadata": {}, "weight_map": places})
    (tmp_path / "pytorch_model.bin.index.json").write_text(text, encoding="utf-8")
    return tmp_path


def test_torch_shards_are_one_index(sharded_torch):
    checkpoint = open_checkpoint(str(sharded_torch))
    assert_values(
        checkpoint, {k: some_tensors()[k] for k in ("a.weight", "b.weight", "c.weight", "d.index")}
    )
    assert checkpoint.tensors["c.weight"].file.name == "pytorch_model-00002-of-00002.bin"


def test_torch_shards_that_do_not_fit_their_index(sharded_torch):
    second = sharded_torch / "pytorch_model-00002-of-00002.bin"
    save_state(sharded_torch, {"c.weight": torch.ones(2)}, second.name)
    message = refusal(sharded_torch)
    assert "'d.index' is missing" in message
    assert second.name in message
    state = {key: torch.ones(2) for key in ("a.weight", "c.weight", "d.index")}
    save_state(sharded_torch, state, second.name)
    message = refusal(sharded_torch)
    assert "'a.weight' is in pytorch_model-00001-of-00002.bin too" in message
    assert second.name in message
    second.unlink()
    assert f"{second}: shard is missing (2 tensors)" in refusal(sharded_torch)


def test_safetensors_are_preferred_to_torch_files(sharded, sharded_torch):
    assert sharded == sharded_torch
    save_state(sharded, {"x": torch.ones(1)})
    files = {tensor.file.suffix for tensor in open_checkpoint(str(sharded)).tensors.values()}
    assert files == {".safetensors"}


@pytest.mark.parametrize("name", ["checkpoint_stage3.pth", "model.pt", "mm_projector.bin"])
def test_the_only_torch_file_of_a_folder_is_taken(tmp_path, name):
    save_state(tmp_path, {"w": torch.ones(2)}, name)
    for other in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_3.pth"):
        (tmp_path / other).write_bytes(b"")
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.tensors["w"].file == tmp_path / name
    assert checkpoint.folder == tmp_path


def test_several_torch_files_are_left_to_the_user(tmp_path):
    for name in ("first.pth", "second.pt"):
        save_state(tmp_path, {name: torch.ones(2)}, name)
    message = refusal(tmp_path)
    assert "first.pth, second.pt" in message
    assert "name the file itself" in message
    checkpoint = open_checkpoint(str(tmp_path / "second.pt"))
    assert list(checkpoint.tensors) == ["second.pt"]
    assert (checkpoint.folder, checkpoint.hub_id) == (tmp_path, None)


def test_a_file_may_be_named_itself(sharded):
    checkpoint = open_checkpoint(str(sharded / "model-00002-of-00002.safetensors"))
    assert set(checkpoint.tensors) == {"c.weight", "d.index"}
    assert checkpoint.require_json("config.json") == {}


def test_a_home_is_found_in_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_state(tmp_path, {"w": torch.ones(2)}, "w.pth")
    assert open_checkpoint("~/w.pth").folder == tmp_path


@pytest.mark.parametrize(
    ("state", "found"),
    [
        (
            {
                "model": {"a": torch.ones(2), "b": torch.ones(3)},
                "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{}]},
                "config": {"run": {"lr": 1e-5}},
                "scaler": {"scale": 65536.0},
                "epoch": 19,
            },
            {"a", "b"},
        ),
        ({"state_dict": {"a": torch.ones(2)}, "epoch": 3}, {"a"}),
        ({"module": OrderedDict(a=torch.nn.Parameter(torch.ones(2))), "step": 1}, {"a"}),
        ({"state_dict": {"s": torch.ones(1)}, "model": {"m": torch.ones(1)}}, {"m"}),
        ({"model": "vit", "state_dict": {"a": torch.ones(2)}}, {"a"}),
        ({"model": {}, "module": {"a": torch.ones(2)}}, {"a"}),
        ({"model": {"a": torch.ones(2)}, "logit_scale": torch.ones(1)}, {"a"}),
        ({"a": torch.ones(2), "b": torch.ones(2), "model": {"c": torch.ones(2)}}, {"a", "b"}),
        ({"a": torch.ones(2), "epoch": 1, "lr": 0.1}, {"a"}),
        ({"a": torch.ones(2), 7: torch.ones(2), "note": None}, {"a"}),
    ],
)
def test_the_state_dict_is_found_among_what_was_saved(tmp_path, state, found):
    save_state(tmp_path, state)
    assert set(open_checkpoint(str(tmp_path)).tensors) == found


@pytest.mark.parametrize(
    "saved",
    [
        {},
        {"epoch": 3, "model": {"lr": 1.0}},
        {"model": {"ema": {"a": torch.ones(2)}}},
        [torch.ones(2)],
        torch.ones(2),
        3,
    ],
)
def test_a_torch_file_without_a_state_dict(tmp_path, saved):
    path = save_state(tmp_path, saved)
    message = refusal(tmp_path)
    assert message.startswith(f"{path}: no tensors in it")
    assert "state_dict" in message


def test_the_format_from_before_torch_1_6(tmp_path):
    path = save_state(tmp_path, some_tensors(), _use_new_zipfile_serialization=False)
    message = refusal(tmp_path)
    assert message.startswith(f"{path}: in torch's format from before 1.6")
    assert "save it again with torch.save" in message


@pytest.mark.parametrize("kept", [0, 3, 4, 100, 0.5, -1, -23])
def test_a_torch_file_that_is_cut_short(tmp_path, kept):
    path = save_state(tmp_path, some_tensors())
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    message = refusal(tmp_path)
    assert str(path) in message
    assert "download it again" in message


def test_a_torch_file_that_lacks_bytes_in_its_middle(tmp_path):
    path = save_state(tmp_path, {"a": torch.ones(1000), "b": torch.ones(1000)})
    data = path.read_bytes()
    path.write_bytes(data[:3000] + data[4000:])
    assert "cut short or damaged" in refusal(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        b"<!DOCTYPE html><html><body>404</body></html>",
        pickle.dumps({"a": [1.0]}),
        bytes(4096),
    ],
)
def test_what_is_no_torch_file(tmp_path, content):
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    assert "not a file of torch.save" in refusal(tmp_path)


def test_zip_files_of_others(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "0 data.pkl, expected one" in refusal(tmp_path)
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), path)
    assert "TorchScript" in refusal(tmp_path)
    rewrite(save_state(tmp_path, some_tensors()), compression=zipfile.ZIP_DEFLATED)
    assert "is compressed" in refusal(tmp_path)


def test_values_of_the_other_byte_order(tmp_path):
    other = b"big" if sys.byteorder == "little" else b"little"
    path = save_state(tmp_path, some_tensors())
    rewrite(path, lambda records: records.update({"pytorch_model/byteorder": other}))
    assert f"not {sys.byteorder}-endian" in refusal(tmp_path)


def hostile(path):
    """Ways in which unpickling would make the file `path`."""
    return [
        Call(os.system, f"touch {path}"),
        Call(eval, f"open({str(path)!r}, 'w')"),
        Call(subprocess.call, ["touch", str(path)]),
        Call(open, str(path), "w"),
        Call(torch.save, {}, str(path)),
        Call(torch.hub._import_module, "made", str(path)),
    ]


@pytest.mark.parametrize("kind", range(6))
@pytest.mark.parametrize("nested", [True, False])
def test_pickled_code_is_not_run(tmp_path, kind, nested):
    made = tmp_path / "made"
    call = hostile(made)[kind]
    state = {"model": {"w": torch.ones(2)}, "config": call} if nested else call
    path = save_state(tmp_path, state, "w.pth")
    message = refusal(tmp_path)
    assert message.startswith(f"{path}: its pickle holds code (")
    assert "was not run" in message
    assert not made.exists()
    if kind < 5:
        # The file is as hostile as it looks.
        torch.load(path, weights_only=False)
        assert made.exists()


def test_a_hostile_pickle_in_any_of_the_records(tmp_path):
    made = tmp_path / "made"
    path = save_state(tmp_path, {"w": torch.ones(2)}, "w.pth")
    code = pickle.dumps(Call(os.system, f"touch {made}"), 2)
    rewrite_pickle(path, code)
    assert "system" in refusal(tmp_path)
    path.write_bytes(code)
    assert "not a file of torch.save" in refusal(tmp_path)
    torch.save(Call(os.system, f"touch {made}"), path, _use_new_zipfile_serialization=False)
    assert "before 1.6" in refusal(tmp_path)
    assert not made.exists()


def test_classes_are_refused_by_name(tmp_path):
    save_state(tmp_path, {"model": {"w": torch.ones(2)}, "args": argparse.Namespace(lr=1)})
    message = refusal(tmp_path)
    assert "code (argparse.Namespace), which was not run" in message
    assert "where you trust the file" in message
    save_state(tmp_path, Weird())
    assert "Weird" in refusal(tmp_path)


def test_a_pickle_of_another_protocol(tmp_path):
    save_state(tmp_path, some_tensors(), pickle_protocol=4)
    assert "save its state dict alone with torch.save" in refusal(tmp_path)


def torch_file_with(folder, place):
    """A torch file of one storage of six values, in which a second tensor lies at `place`."""
    path = save_state(folder, {"w": torch.arange(6.0)})
    places = {"good": (Storage(), 0, (6,), (1,)), "other": place}
    return rewrite_pickle(path, pickle_tensors(places))


def test_a_written_pickle_is_as_good_as_torch_s_own(tmp_path):
    torch_file_with(tmp_path, (Storage(), 1, (2, 2), (3, 1)))
    expected = {"good": torch.arange(6.0), "other": torch.tensor([[1.0, 2.0], [4.0, 5.0]])}
    tensors = open_checkpoint(str(tmp_path)).tensors
    for key, value in expected.items():
        assert torch.equal(read_tensor(tensors[key]), value)


@pytest.mark.parametrize(
    ("place", "needed", "found"),
    [
        ((Storage(), 0, (7,), (1,)), 28, 24),
        ((Storage(), 1, (6,), (1,)), 24, 20),
        ((Storage(), 7, (1,), (1,)), 4, 0),
        ((Storage(), 0, (2, 2), (6, 1)), 32, 24),
        ((Storage(items=100), 0, (100,), (1,)), 400, 24),
        ((Storage(kind=torch.LongStorage, items=6), 0, (6,), (1,)), 48, 24),
        ((Storage(), 0, (2**40,), (1,)), 2**42, 24),
        ((Storage(items=2**60), 0, (2**60,), (1,)), 2**62, 24),
    ],
)
def test_tensors_that_reach_past_their_storage(tmp_path, place, needed, found):
    path = torch_file_with(tmp_path, place)
    message = refusal(tmp_path)
    assert message.startswith(f"{path}: tensor 'other' of shape {list(place[2])} ")
    assert f"needs {needed} bytes, found {found}; " in message


@pytest.mark.parametrize(
    "place",
    [
        (Storage(), -1, (2,), (1,)),
        (Storage(), 0, (-2,), (1,)),
        (Storage("1"), 0, (2,), (1,)),
        (Storage("../version"), 0, (2,), (1,)),
        (Storage(items=2**62), 0, (2,), (1,)),
        ("storage", 0, (2,), (1,)),
        (Storage(), "0", (2,), (1,)),
        (Storage(), 0, (2,), (1, 1)),
        (Storage(), 0, (2**62, 2**62), (1, 1)),
    ],
)
def test_tensors_that_cannot_be(tmp_path, place):
    path = torch_file_with(tmp_path, place)
    message = refusal(tmp_path)
    assert str(path) in message
    assert "requires_grad" not in message


def test_a_pickle_gets_no_memory(tmp_path):
    path = save_state(tmp_path, {"w": torch.ones(6)})
    rewrite_pickle(path, pickle.dumps({"w": Call(torch.FloatTensor, 10**12)}, 2))
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.unreadable == {"w": "float32 without values"}
    assert not checkpoint.tensors


FUZZED = io.BytesIO()
torch.save({"model": {"a": torch.ones(3), "b": torch.ones(2, 2).t()}, "epoch": 1}, FUZZED)


@given(
    edits=st.lists(
        st.tuples(st.integers(0, len(FUZZED.getvalue()) - 1), st.integers(0, 255)), max_size=8
    ),
    cut=st.none() | st.integers(0, len(FUZZED.getvalue())),
)
def test_a_damaged_file_is_indexed_or_refused(edits, cut):
    data = bytearray(FUZZED.getvalue())
    for place, value in edits:
        data[place] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "w.pth"
        path.write_bytes(data[:cut])
        try:
            tensors = open_checkpoint(str(path)).tensors
        except CheckpointError:
            return
        for tensor in tensors.values():
            assert read_tensor(tensor).shape == tensor.shape


def test_a_file_that_shrinks_while_in_use(tmp_path):
    path = save_state(tmp_path, {"w": torch.ones(1000)})
    tensor = open_checkpoint(str(tmp_path)).tensors["w"]
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: ends inside tensor 'w'"):
        read_tensor(tensor)


def test_an_index_of_safetensors_needs_no_torch(single):
    code = (
        "import sys; from gap_export.checkpoint.index import open_checkpoint; "
        f"open_checkpoint({str(single)!r}); assert not {{'torch', 'numpy'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- parts


@pytest.mark.parametrize(
    ("location", "place"),
    [
        ("parts/clip", "here/parts/clip"),
        ("org/clip", "home/main/org/clip"),
        ("org/clip", "home/main/clip"),
        ("org/clip", "home/org/clip"),
        ("org/clip", "home/clip"),
        ("../clip", "home/clip"),
        ("/nowhere/clip", "home/clip"),
        ("./clip", "home/main/clip"),
    ],
)
def test_a_part_is_looked_for_around_the_checkpoint(tmp_path, monkeypatch, location, place):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    for folder in ("here", "home/main", place):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(tmp_path / "here")
    save_state(tmp_path / place, {"w": torch.ones(2)})
    part = open_part(location, tmp_path / "home/main", "clip")
    assert part.folder.resolve() == (tmp_path / place).resolve()
    assert (part.hub_id, list(part.tensors)) == (None, ["w"])


def test_a_part_may_be_a_file(tmp_path):
    save_state(tmp_path, {"w": torch.ones(2)}, "eva_vit_g.pth")
    (tmp_path / "main").mkdir()
    part = open_part("/elsewhere/eva_vit_g.pth", tmp_path / "main", "vision")
    assert part.tensors["w"].file.name == "eva_vit_g.pth"


@pytest.mark.parametrize("location", ["", ".hidden", "/nowhere/eva.pth", "org/eva.pth"])
def test_a_part_that_is_nowhere(tmp_path, monkeypatch, location):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(CheckpointError) as caught:
        open_part(location, tmp_path / "main", "vision")
    message = str(caught.value)
    assert "no such part 'vision'" in message
    assert "--set parts.vision=DIR" in message
    assert "\n" not in message
    if location:
        assert str(tmp_path / "main" / Path(location).name) in message
        assert str(tmp_path / Path(location).name) in message


def test_a_part_of_the_hub(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    save_state(folder, {"w": torch.ones(2)})
    hub = Hub(hub_cache(folder, tmp_path))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    part = open_part("openai/clip", tmp_path / "main", "clip")
    assert (part.hub_id, part.revision, list(part.tensors)) == ("openai/clip", "0123abc", ["w"])


def test_a_part_that_the_hub_does_not_give(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        del args, kwargs
        raise LocalEntryNotFoundError("Cannot find the requested files.\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError) as caught:
        open_part("openai/clip", tmp_path / "main", "clip")
    message = str(caught.value)
    assert message.startswith("openai/clip: cannot be fetched from the hub (Cannot find")
    for place in ("main/openai/clip", "main/clip", "openai/clip", "clip"):
        assert str(tmp_path / place) in message
    assert "--set parts.clip=DIR" in message
    assert "\n" not in message
