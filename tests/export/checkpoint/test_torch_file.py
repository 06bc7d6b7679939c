"""Torch files: where their tensors lie without reading them, and every hostile pickle."""

import argparse
import io
import json
import os
import pickle
import subprocess
import sys
import tempfile
import zipfile
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from makers.stored import assert_values, save_state, some_tensors
from tools.refusals import refuse_checkpoint

from gap_export.checkpoint import torch_file
from gap_export.checkpoint.index import open_checkpoint
from gap_export.checkpoint.tensor import read_tensor
from gap_export.errors import CheckpointError


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
    opened = torch_file.open_file

    @contextmanager
    def watched(*args, **kwargs):
        with opened(*args, **kwargs) as file:
            plain = file.read
            monkeypatch.setattr(file, "read", lambda n=-1: read.append(plain(n)) or read[-1])
            yield file

    monkeypatch.setattr(torch_file, "open_file", watched)
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
    message = refuse_checkpoint(sharded_torch)
    assert "'d.index' is missing" in message
    assert second.name in message
    state = {key: torch.ones(2) for key in ("a.weight", "c.weight", "d.index")}
    save_state(sharded_torch, state, second.name)
    message = refuse_checkpoint(sharded_torch)
    assert "'a.weight' is in pytorch_model-00001-of-00002.bin too" in message
    assert second.name in message
    second.unlink()
    assert f"{second}: shard is missing (2 tensors)" in refuse_checkpoint(sharded_torch)


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
    message = refuse_checkpoint(tmp_path)
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
    message = refuse_checkpoint(tmp_path)
    assert message.startswith(f"{path}: no tensors in it")
    assert "state_dict" in message


@pytest.mark.parametrize("kept", [0, 3, 4, 100, 0.5, -1, -23])
def test_a_torch_file_that_is_cut_short(tmp_path, kept):
    path = save_state(tmp_path, some_tensors())
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    message = refuse_checkpoint(tmp_path)
    assert str(path) in message
    assert "download it again" in message


def test_a_torch_file_that_lacks_bytes_in_its_middle(tmp_path):
    path = save_state(tmp_path, {"a": torch.ones(1000), "b": torch.ones(1000)})
    data = path.read_bytes()
    path.write_bytes(data[:3000] + data[4000:])
    assert "cut short or damaged" in refuse_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"<!DOCTYPE html><html><body>404</body></html>",
        pickle.dumps({"a": [1.0]}),
        bytes(4096),
    ],
)
def test_what_is_no_torch_file(tmp_path, content):
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    assert "not a file of torch.save" in refuse_checkpoint(tmp_path)


def test_zip_files_of_others(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "0 data.pkl, expected one" in refuse_checkpoint(tmp_path)
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), path)
    assert "TorchScript" in refuse_checkpoint(tmp_path)
    rewrite(save_state(tmp_path, some_tensors()), compression=zipfile.ZIP_DEFLATED)
    assert "is compressed" in refuse_checkpoint(tmp_path)


def test_values_of_the_other_byte_order(tmp_path):
    other = b"big" if sys.byteorder == "little" else b"little"
    path = save_state(tmp_path, some_tensors())
    rewrite(path, lambda records: records.update({"pytorch_model/byteorder": other}))
    assert f"not {sys.byteorder}-endian" in refuse_checkpoint(tmp_path)


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
    message = refuse_checkpoint(tmp_path)
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
    assert "system" in refuse_checkpoint(tmp_path)
    path.write_bytes(code)
    assert "not a file of torch.save" in refuse_checkpoint(tmp_path)
    assert not made.exists()


def test_classes_are_refused_by_name(tmp_path):
    save_state(tmp_path, {"model": {"w": torch.ones(2)}, "args": argparse.Namespace(lr=1)})
    message = refuse_checkpoint(tmp_path)
    assert "code (argparse.Namespace), which was not run" in message
    assert "where you trust the file" in message
    save_state(tmp_path, Weird())
    assert "Weird" in refuse_checkpoint(tmp_path)


def test_a_pickle_of_another_protocol(tmp_path):
    save_state(tmp_path, some_tensors(), pickle_protocol=4)
    assert "save its state dict alone with torch.save" in refuse_checkpoint(tmp_path)


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
    message = refuse_checkpoint(tmp_path)
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
    message = refuse_checkpoint(tmp_path)
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
