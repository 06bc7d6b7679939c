"""Torch files in the format from before torch 1.6: read as the others are, and refused as they."""

import os
import pickle
import pickletools
from contextlib import contextmanager

import pytest
import torch
from makers.stored import assert_values, save_state, some_tensors
from tools.refusals import refuse_checkpoint

from gap_export.checkpoint import torch_file
from gap_export.checkpoint.index import open_checkpoint
from gap_export.checkpoint.torch_file import read_settings


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def save(folder, state, name="pytorch_model.bin"):
    return save_state(folder, state, name, _use_new_zipfile_serialization=False)


def all_tensors():
    """Tensors of every dtype, and several that share memory."""
    tensors = some_tensors()
    table = torch.randn(6, 8)
    halves = torch.randn(40).half()
    return tensors | {
        "table": table,
        "view.rows": table[2:4],
        "view.transposed": table.t(),
        "view.columns": table[:, 3:5],
        "view.every_other": halves[1::2],
        "view.tail": halves[37:],
        "expanded": torch.randn(1, 4).expand(3, 4),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
    }


def test_tensors_lie_where_the_index_says(tmp_path):
    save(tmp_path, all_tensors())
    checkpoint = open_checkpoint(str(tmp_path))
    assert_values(checkpoint, all_tensors())
    offsets = {key: tensor.offset for key, tensor in checkpoint.tensors.items()}
    assert offsets["view.rows"] == offsets["table"] + 2 * 8 * 4


def test_the_same_state_in_both_formats(tmp_path):
    state = {"model": some_tensors(), "config": {"lora_alpha": 32}, "epoch": 3}
    path = save(tmp_path, state, "w.pth")
    assert_values(open_checkpoint(str(path)), some_tensors())
    assert read_settings(path, path) == {"lora_alpha": 32}
    save_state(tmp_path, state, "w.pth")
    assert read_settings(path, path) == {"lora_alpha": 32}


def test_values_are_not_read(tmp_path, monkeypatch):
    path = save(tmp_path, {"a": torch.ones(2**20), "b": torch.ones(2**20)})
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


@pytest.mark.parametrize("kept", [30, 200, 0.9, -1])
def test_a_file_that_is_cut_short(tmp_path, kept):
    path = save(tmp_path, some_tensors())
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    message = refuse_checkpoint(tmp_path)
    assert message.startswith(f"{path}: ")
    assert "download it again" in message


def test_a_file_with_something_behind_it(tmp_path):
    path = save(tmp_path, some_tensors())
    path.write_bytes(path.read_bytes() + b"more")
    assert "cut short or damaged" in refuse_checkpoint(tmp_path)


def test_a_storage_of_another_length_than_its_tensors_need(tmp_path):
    path = save(tmp_path, {"a": torch.zeros(7)})
    data, count = path.read_bytes(), (7).to_bytes(8, "little")
    assert data.count(count) == 1
    path.write_bytes(data.replace(count, (8).to_bytes(8, "little")))
    assert "needs 32 bytes" in refuse_checkpoint(tmp_path)


@pytest.mark.parametrize("keys", [[{}], 5, [None], "0", {"a": 1}])
def test_keys_of_storages_that_are_none(tmp_path, keys):
    """The last pickle, which is read when the others are proven."""
    path = save(tmp_path, {"a": torch.zeros(7)})
    with path.open("rb") as file:
        for _ in range(4):
            list(pickletools.genops(file))
        start = file.tell()
        list(pickletools.genops(file))
        rest = file.read()
    data = path.read_bytes()[:start] + pickle.dumps(keys, 2) + rest
    path.write_bytes(data)
    assert "cut short or damaged" in refuse_checkpoint(tmp_path)


def test_another_machines_byte_order(tmp_path):
    path = save(tmp_path, some_tensors())
    data = path.read_bytes()
    at = data.index(b"\x88", data.index(b"little_endian"))
    path.write_bytes(data[:at] + b"\x89" + data[at + 1 :])
    assert "not little-endian" in refuse_checkpoint(tmp_path)


def test_pickled_code_is_not_run(tmp_path):
    made = tmp_path / "made"
    state = {"w": torch.ones(2), "config": Call(os.system, f"touch {made}")}
    path = save(tmp_path, state, "w.pth")
    message = refuse_checkpoint(tmp_path)
    assert message.startswith(f"{path}: its pickle holds code (")
    assert "was not run" in message
    assert not made.exists()
    # The file is as hostile as it looks.
    torch.load(path, weights_only=False)
    assert made.exists()
