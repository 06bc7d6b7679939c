"""Files that are read once: hash, broken values and copy all come from the same pass."""

import math
import os
import threading
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from gap_export.checkpoint.index import open_checkpoint
from gap_export.checkpoint.sources import stored
from gap_export.errors import ExportError
from gap_export.weights import read as source_reader
from gap_export.weights.read import SourceReader
from gap_runtime.bundle.hashes import hash_bytes


class Placed:
    """A plan that uses these tensors."""

    def __init__(self, *names):
        self.placed = dict.fromkeys(names)


@pytest.fixture
def tensors(tmp_path):
    """A checkpoint of two floating tensors with integers between them, and its sources."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text("{}")

    def write(first=0.5, last=0.5):
        values = {
            "a": torch.full((7, 300), 0.25),
            "b": torch.arange(5),
            "c": torch.full((11,), 0.25, dtype=torch.float16),
        }
        values["a"][0, 0], values["c"][-1] = first, last
        save_file(values, folder / "model.safetensors")
        found = open_checkpoint(folder).tensors
        return folder / "model.safetensors", {name: stored(found[name]) for name in ("a", "c")}

    return write


@pytest.fixture(params=["threads", "copy"])
def read(request):
    """A reader of each kind."""
    return partial(SourceReader, may_fork=request.param == "copy")


@pytest.mark.parametrize("block", [64, 4 * 2**20])
@pytest.mark.parametrize("shares", [False, True])
def test_one_pass_hashes_and_copies(tensors, tmp_path, monkeypatch, read, block, shares):
    file, ready = tensors()
    copy = tmp_path / "copy"
    monkeypatch.setattr(source_reader, "_BLOCK_BYTES", block)
    if shares:
        # A filesystem that shares blocks has the whole file there at once.
        monkeypatch.setattr(
            source_reader, "share_blocks", lambda a, b: bool(b.write_bytes(a.read_bytes()))
        )
    with read(ready, {file: copy}) as reader:
        assert reader.hash(file) == hash_bytes(file.read_bytes())
        assert reader.copy_of(file) == copy
        reader.require_finite(Placed("a", "c"))
    assert copy.read_bytes() == file.read_bytes()


@pytest.mark.parametrize(("name", "where"), [("a", "first"), ("c", "last")])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_broken_value_is_found_where_it_is_used(tensors, monkeypatch, read, name, where, value):
    monkeypatch.setattr(source_reader, "_BLOCK_BYTES", 64)
    _, ready = tensors(**{where: value})
    with read(ready, {}) as reader:
        with pytest.raises(ExportError, match=f"tensor '{name}'"):
            reader.require_finite(Placed("a", "c"))
        reader.require_finite(Placed(*({"a", "c"} - {name})))


@pytest.mark.parametrize("value", [0.5, math.nan])
def test_tensors_that_share_bytes_are_judged_alone(tensors, value):
    """Of two that overlap, the one without the broken value is sound."""
    _, ready = tensors(first=value)
    whole = ready["a"].inputs[0]
    ready["same"] = replace(ready["a"], inputs=(replace(whole, key="same"),))
    ready["rest"] = replace(
        ready["a"],
        shape=(6, 300),
        inputs=(replace(whole, key="rest", shape=(6, 300), offset=whole.offset + 1200),),
    )
    with SourceReader(ready, {}) as reader:
        reader.require_finite(Placed("rest", "c"))
        if math.isnan(value):
            with pytest.raises(ExportError, match="tensor 'same'"):
                reader.require_finite(Placed("same"))


def test_no_copy_is_made_unasked(tensors, tmp_path):
    file, ready = tensors()
    with SourceReader(ready, {}) as reader:
        assert reader.copy_of(file) is None
        assert reader.copy_of(tmp_path / "other") is None


def test_a_file_that_changes_meanwhile(tensors, read):
    file, ready = tensors()
    with read(ready, {}) as reader:
        reader.hash(file)
        file.write_bytes(file.read_bytes() + b"x")
        with pytest.raises(ExportError, match="changed during the export"):
            reader.hash(file)


def test_a_file_that_ends_early(tensors, read):
    file, ready = tensors()
    last = ready["c"].inputs[0]
    ready["c"] = replace(ready["c"], inputs=(replace(last, offset=last.offset + 64),))
    with read(ready, {}) as reader, pytest.raises(ExportError, match="cut short"):
        reader.hash(file)


@pytest.mark.parametrize("dies", [False, True])
def test_the_copy_reads_or_the_process_does(tensors, tmp_path, monkeypatch, dies):
    """Whoever reads leaves a file of its name; the hash is the file's either way."""
    file, ready = tensors()
    whole, me = source_reader._read, os.getpid()

    def read(*args):
        (tmp_path / str(os.getpid())).touch()
        if dies and os.getpid() != me:
            os._exit(9)
        return whole(*args)

    monkeypatch.setattr(source_reader, "_read", read)
    with SourceReader(ready, {}, may_fork=True) as reader:
        assert reader.hash(file) == hash_bytes(file.read_bytes())
    assert (tmp_path / str(me)).exists() == dies
    assert len([each for each in tmp_path.iterdir() if each.name.isdigit()]) == 1 + dies


def test_no_copy_is_left_where_nobody_waits_for_it(tensors, monkeypatch):
    _, ready = tensors()
    monkeypatch.setattr(source_reader, "_read", lambda *_: threading.Event().wait())
    with pytest.raises(KeyError), SourceReader(ready, {}, may_fork=True) as reader:
        raise KeyError("room")
    with pytest.raises(ChildProcessError):
        os.waitpid(reader._copy._process, os.WNOHANG)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_value_of_16_bits_is_judged_as_torch_does(tensors, dtype):
    location = replace(tensors()[1]["a"].inputs[0], dtype=dtype)
    bits = torch.arange(2**16).to(torch.int32).to(torch.uint16)
    wanted = torch.isfinite(bits.view(getattr(torch, dtype))).tolist()
    found = [
        source_reader._is_finite(memoryview(each.tobytes()), location) for each in bits.numpy()
    ]
    assert found == wanted
    assert 0 < sum(found) < len(found)


@pytest.mark.parametrize(
    "value", [math.inf, -math.inf, math.nan, -math.nan, 3.4e38, -3.4e38, 0.0, -0.0]
)
def test_one_value_of_32_bits_among_others(tensors, value):
    location = tensors()[1]["a"].inputs[0]
    values = torch.linspace(-1, 1, 100)
    values[50] = value
    found = source_reader._is_finite(memoryview(values.numpy().tobytes()), location)
    assert found == math.isfinite(value)
