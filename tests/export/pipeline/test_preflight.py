"""What an export needs is looked at before any work, and said in one line."""

import dataclasses
import errno
import math
import os
import shutil
from pathlib import Path

import psutil
import pytest
from makers import checkpoints

from gap_export.errors import CheckpointError, ExportError
from gap_export.pipeline import preflight
from gap_export.pipeline import run as pipeline
from gap_export.pipeline.asking import measure_reference
from gap_export.pipeline.parameters import HEAD
from gap_export.quantization.scheme import VALUES
from gap_export.reference import memory as reference_memory
from gap_runtime.display import Display
from gap_runtime.machines import memory

MIB = 2**20


@pytest.fixture(autouse=True)
def no_work(monkeypatch):
    """Whatever starts to trace or ask PyTorch has passed the checks."""

    def refuse(*_, **__):
        raise AssertionError("work was begun")

    monkeypatch.setattr(pipeline, "_trace", refuse)


def export(plan):
    return pipeline.export(plan, Display(quiet=True))


def refused(plan, kind):
    """The message of an export that was refused and left nothing behind."""
    with pytest.raises(kind) as caught:
        export(plan)
    assert "\n" not in str(caught.value)
    assert not list(Path(plan.out).parent.iterdir())
    return str(caught.value)


def limit_memory(monkeypatch, free):
    for module in (preflight, reference_memory):
        monkeypatch.setattr(module, "free_memory", lambda: free)


def limit_disk(monkeypatch, free):
    usage = shutil.disk_usage("/")._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)


def test_an_export_that_may_begin(tiny_llava, tmp_path, make_plan):
    with pytest.raises(AssertionError, match="work was begun"):
        export(make_plan(tiny_llava, tmp_path / "out"))


def test_a_full_disk(tiny_llava, tmp_path, make_plan, monkeypatch):
    size = (tiny_llava / "model.safetensors").stat().st_size
    limit_disk(monkeypatch, size - 1)
    message = refused(make_plan(tiny_llava, tmp_path / "out"), ExportError)
    assert str(tmp_path) in message
    assert "--bring link" in message
    limit_disk(monkeypatch, size)
    with pytest.raises(AssertionError, match="work was begun"):
        export(make_plan(tiny_llava, tmp_path / "out"))


def test_links_take_no_disk_but_converted_weights_do(tiny_llava, tmp_path, make_plan, monkeypatch):
    limit_disk(monkeypatch, 0)
    with pytest.raises(AssertionError, match="work was begun"):
        export(make_plan(tiny_llava, tmp_path / "out", bring="link"))
    plan = make_plan(tiny_llava, tmp_path / "out", bring="link", dtype="float16")
    assert "free" in refused(plan, ExportError)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_the_disk_of_quantized_weights(
    tmp_path, tmp_path_factory, make_plan, monkeypatch, weights
):
    """To the byte: a place is known for every tensor before any graph is traced."""
    folder = checkpoints.make_llava_checkpoint(
        tmp_path_factory.mktemp("wide") / "wide", image_size=70, width=64, heads=4, mlp=128
    )
    plan = make_plan(folder, tmp_path / "out", quantize__weights=weights, dtype="float16")
    names = {name for name, source in plan.sources.items() if len(source.shape) == 2}
    text = {name for name in names if name.startswith("language_model.layers") or name == HEAD}
    assert set(plan.schemes) == text
    assert text.isdisjoint(plan.weights.placed)
    assert {name + VALUES for name in text} < set(plan.weights.placed)
    limit_disk(monkeypatch, plan.weights.size - 1)
    assert "free" in refused(plan, ExportError)
    limit_disk(monkeypatch, plan.weights.size)
    with pytest.raises(AssertionError, match="work was begun"):
        export(plan)


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM])
def test_files_that_cannot_be_linked(tiny_llava, tmp_path, make_plan, monkeypatch, number):
    def refuse(source, target):
        raise OSError(number, os.strerror(number), source, None, target)

    monkeypatch.setattr(os, "link", refuse)
    plan = make_plan(tiny_llava, tmp_path / "out", bring="link")
    assert "--bring copy" in refused(plan, ExportError)
    with pytest.raises(AssertionError, match="work was begun"):
        export(make_plan(tiny_llava, tmp_path / "out"))


@pytest.mark.parametrize("name", ["model.safetensors", "picture.png"])
def test_a_file_that_may_not_be_read(
    tiny_llava, tmp_path, tmp_path_factory, make_plan, monkeypatch, name
):
    samples = tmp_path_factory.mktemp("samples")
    (samples / "picture.png").write_bytes(b"")
    (samples / "samples.json").write_text(
        '[{"image": "picture.png", "phrase": "x"}]', encoding="utf-8"
    )
    plan = make_plan(tiny_llava, tmp_path / "out", reference=True, check__samples=str(samples))
    real = os.open

    def guarded(path, *arguments, **named):
        if Path(path).name == name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *arguments, **named)

    monkeypatch.setattr(os, "open", guarded)
    message = refused(plan, CheckpointError)
    assert name in message
    assert "Permission denied" in message


def test_a_shard_that_may_not_be_read_is_said_when_it_is_indexed(
    tiny_llava, tmp_path, make_plan, monkeypatch
):
    real = os.open

    def guarded(path, *arguments, **named):
        if str(path).endswith(".safetensors"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *arguments, **named)

    monkeypatch.setattr(os, "open", guarded)
    with pytest.raises(CheckpointError, match="cannot be read \\(Permission denied\\)"):
        make_plan(tiny_llava, tmp_path / "out")


def test_no_memory_to_work_in(tiny_llava, tmp_path, make_plan, monkeypatch):
    limit_memory(monkeypatch, 10 * MIB)
    message = refused(make_plan(tiny_llava, tmp_path / "out"), ExportError)
    assert "10.5 MB is free" in message


def settle(plan):
    return measure_reference(plan).settle("use")


def test_a_reference_fits_or_is_read_layer_by_layer(tiny_llava, tmp_path, make_plan, monkeypatch):
    plan = make_plan(tiny_llava, tmp_path / "out", reference=True)
    need = measure_reference(plan)
    shapes = [source.shape for source in plan.sources.values()]
    assert need.weights == sum(4 * math.prod(shape) for shape in shapes)
    whole = need.weights + 192 * MIB
    limit_memory(monkeypatch, whole)
    assert settle(plan) is None
    assert need.layers < whole
    limit_memory(monkeypatch, whole - 1)
    assert settle(plan) == (whole - 1) // 8
    limit_memory(monkeypatch, need.layers)
    assert settle(plan) == need.layers // 8
    limit_memory(monkeypatch, need.layers - 1)
    with pytest.raises(ExportError, match=r"layer by layer .* use a larger machine"):
        settle(plan)
    message = refused(plan, ExportError)
    assert "export with --no-reference, or on a larger machine" in message


def test_the_weights_that_stay_are_never_many(tiny_llava, tmp_path, make_plan, monkeypatch):
    need = measure_reference(make_plan(tiny_llava, tmp_path / "out", reference=True))
    limit_memory(monkeypatch, 2**50)
    assert dataclasses.replace(need, weights=2**60).settle("use") == 512 * MIB


def test_a_reference_is_nobodys_concern_without_one(tiny_llava, tmp_path, make_plan, monkeypatch):
    plan = make_plan(tiny_llava, tmp_path / "out", check__memory_mib=0)
    monkeypatch.setattr(reference_memory, "free_memory", lambda: 0)
    with pytest.raises(AssertionError, match="work was begun"):
        export(plan)


@pytest.mark.parametrize("mib", [0, 7])
def test_the_setting_wins(tiny_llava, tmp_path, make_plan, mib):
    plan = make_plan(tiny_llava, tmp_path / "out", reference=True, check__memory_mib=mib)
    assert settle(plan) == mib * MIB


def test_memory_is_that_of_the_machine():
    """Another reader of the same figures agrees."""
    found = memory.read_memory()
    assert found.total == psutil.virtual_memory().total
    assert 0 < found.free <= psutil.virtual_memory().available + 2**28
