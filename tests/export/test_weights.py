"""Weights into a bundle: whole files cloned or linked, other dtypes converted one by one."""

import errno
import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from gap_export.checkpoint import open_checkpoint
from gap_export.errors import CheckpointError, ExportError
from gap_export.weights import bring_weights, plan_weights, write_placeholders

CONVERTED = "weights-float16.safetensors"


def some_tensors():
    torch.manual_seed(0)
    return {
        "x.embed": torch.randn(11, 4) * 3,
        "x.weight": torch.randn(5, 4),
        "x.bias": torch.tensor([1e-8, -65504.0, 0.1, 1.0000001, 3e-5]),
        "x.unused": torch.randn(3),
    }


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of two files: the third tensor lies alone in the second."""
    home = tmp_path / "checkpoint"
    home.mkdir()
    (home / "config.json").write_text("{}", encoding="utf-8")
    tensors, places = some_tensors(), {}
    for name, keys in {
        "model-1.safetensors": ["x.embed", "x.weight"],
        "model-2.safetensors": ["x.bias", "x.unused"],
    }.items():
        save_file({key: tensors[key] for key in keys}, home / name)
        places |= dict.fromkeys(keys, name)
    index = json.dumps({"weight_map": places})
    (home / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    return home


@pytest.fixture
def bundle(tmp_path):
    """The folder that weights are brought into."""
    path = tmp_path / "bundle"
    path.mkdir()
    return path


WANTED = {"embed": (11, 4), "weight": (5, 4), "bias": (5,)}


def plan(folder, wanted=None, *, dtype="float32", substitute={}.get):
    return plan_weights(
        open_checkpoint(str(folder)),
        WANTED if wanted is None else wanted,
        dtype=dtype,
        canonical_name=lambda key: key.removeprefix("x."),
        substitute=substitute,
    )


def bring(made, bundle, mode="clone"):
    write_placeholders(made, bundle)
    sizes = {path.name: path.stat().st_size for path in bundle.iterdir()}
    bring_weights(made, bundle, mode)
    assert {path.name: path.stat().st_size for path in bundle.iterdir()} == sizes
    assert sizes == made.file_sizes()
    assert made.size == sum(sizes.values())


def read_placed(made, bundle, name):
    """A tensor's values from where the plan says that they lie."""
    place = made.placed[name]
    with (bundle / place.file).open("rb") as file:
        file.seek(place.offset)
        data = bytearray(file.read(place.length))
    return torch.frombuffer(data, dtype=getattr(torch, place.dtype)).reshape(place.shape)


@pytest.mark.parametrize("mode", ["clone", "link"])
def test_files_come_as_they_are(folder, bundle, mode):
    made = plan(folder)
    bring(made, bundle, mode)
    assert sorted(path.name for path in bundle.iterdir()) == [
        "model-1.safetensors",
        "model-2.safetensors",
    ]
    for path in bundle.iterdir():
        source = folder / path.name
        assert path.read_bytes() == source.read_bytes()
        assert not path.is_symlink()
        assert path.stat().st_nlink == (2 if mode == "link" else 1)
        assert (path.stat().st_ino == source.stat().st_ino) == (mode == "link")
    for name in WANTED:
        assert torch.equal(read_placed(made, bundle, name), some_tensors()[f"x.{name}"])


def test_files_without_a_wanted_tensor_stay_behind(folder, bundle):
    made = plan(folder, {"embed": (11, 4)})
    bring(made, bundle)
    assert [path.name for path in bundle.iterdir()] == ["model-1.safetensors"]


def test_a_cloned_file_does_not_follow_its_source(folder, bundle):
    bring(plan(folder), bundle)
    before = (bundle / "model-1.safetensors").read_bytes()
    with (folder / "model-1.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")
    assert (bundle / "model-1.safetensors").read_bytes() == before


def test_links_of_a_hub_cache_come_as_files_with_their_names(folder, bundle, tmp_path):
    for k, path in enumerate(sorted(folder.glob("*.safetensors"))):
        path.rename(tmp_path / f"blob{k}")
        path.symlink_to(tmp_path / f"blob{k}")
    bring(plan(folder), bundle, "link")
    for k, name in enumerate(("model-1.safetensors", "model-2.safetensors")):
        assert not (bundle / name).is_symlink()
        assert (bundle / name).stat().st_ino == (tmp_path / f"blob{k}").stat().st_ino


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("mode", ["clone", "link"])
def test_conversion_is_torchs_own_cast(folder, bundle, dtype, mode):
    made = plan(folder, dtype=dtype)
    bring(made, bundle, mode)
    file = f"weights-{dtype}.safetensors"
    assert [path.name for path in bundle.iterdir()] == [file]
    with safe_open(bundle / file, framework="pt") as stored:
        assert set(stored.keys()) == {"x.embed", "x.weight", "x.bias"}
        for name in WANTED:
            expected = some_tensors()[f"x.{name}"].to(getattr(torch, dtype))
            assert stored.get_tensor(f"x.{name}").dtype == expected.dtype
            assert torch.equal(stored.get_tensor(f"x.{name}"), expected)
            assert torch.equal(read_placed(made, bundle, name), expected)
            assert made.placed[name].dtype == dtype
            assert made.placed[name].offset % expected.element_size() == 0


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_conversion_up_is_exact(folder, bundle, stored):
    values = some_tensors()["x.weight"].to(stored)
    save_file({"x.bias": torch.ones(50), "x.unused": values}, folder / "model-2.safetensors")
    made = plan(folder, {"unused": (5, 4), "bias": (50,)})
    bring(made, bundle)
    assert torch.equal(read_placed(made, bundle, "unused"), values.float())
    assert sorted(made.file_sizes()) == ["model-2.safetensors", "weights-float32.safetensors"]


def test_only_tensors_of_another_dtype_are_converted(folder, bundle):
    tensors = some_tensors()
    mixed = {"x.embed": tensors["x.embed"].half(), "x.weight": tensors["x.weight"]}
    save_file(mixed, folder / "model-1.safetensors")
    made = plan(folder, {"embed": (11, 4), "weight": (5, 4)}, dtype="float16")
    bring(made, bundle)
    assert made.placed["embed"].file == "model-1.safetensors"
    assert made.placed["weight"].file == CONVERTED
    assert torch.equal(read_placed(made, bundle, "embed"), mixed["x.embed"])
    assert torch.equal(read_placed(made, bundle, "weight"), tensors["x.weight"].half())


@pytest.mark.parametrize("value", [65520.0, -1e6])
def test_values_that_overflow_are_refused_by_name(folder, bundle, value):
    tensors = some_tensors()
    tensors["x.bias"][2] = value
    save_file({k: tensors[k] for k in ("x.bias", "x.unused")}, folder / "model-2.safetensors")
    with pytest.raises(ExportError) as caught:
        bring(plan(folder, dtype="float16"), bundle)
    for part in ("model-2.safetensors", "'x.bias'", "float16", "bfloat16 or float32"):
        assert part in str(caught.value)


def test_a_missing_tensor_is_named(folder):
    with pytest.raises(CheckpointError) as caught:
        plan(folder, WANTED | {"gate": (4, 4)})
    for part in (str(folder), "'gate'", "missing"):
        assert part in str(caught.value)


def test_a_wrong_shape_names_file_tensor_and_both_shapes(folder):
    with pytest.raises(CheckpointError) as caught:
        plan(folder, WANTED | {"weight": (4, 5)})
    for part in ("model-1.safetensors", "'x.weight'", "[5, 4]", "[4, 5]"):
        assert part in str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_tied_head_lies_where_the_embedding_lies(folder, bundle, dtype):
    made = plan(
        folder,
        WANTED | {"head": (11, 4)},
        dtype=dtype,
        substitute={"head": "embed"}.get,
    )
    bring(made, bundle)
    assert made.placed["head"] == made.placed["embed"]
    expected = some_tensors()["x.embed"].to(getattr(torch, dtype))
    assert torch.equal(read_placed(made, bundle, "head"), expected)


def test_a_head_that_is_there_is_not_replaced(folder):
    made = plan(folder, {"weight": (5, 4)}, substitute={"weight": "embed"}.get)
    assert made.placed["weight"].shape == (5, 4)


def test_a_missing_stand_in_is_reported_as_what_was_wanted(folder):
    with pytest.raises(CheckpointError, match="'head' is missing"):
        plan(folder, {"head": (11, 4)}, substitute={"head": "table"}.get)


def space(monkeypatch, free):
    usage = shutil.disk_usage("/")._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)


def test_too_little_space_is_said_before_anything_is_written(folder, bundle, monkeypatch):
    made = plan(folder)
    space(monkeypatch, made.size - 1)
    with pytest.raises(ExportError) as caught:
        bring_weights(made, bundle, "clone")
    assert str(bundle.parent) in str(caught.value)
    assert "free" in str(caught.value)
    assert not list(bundle.iterdir())


def test_just_enough_space_is_enough(folder, bundle, monkeypatch):
    made = plan(folder)
    space(monkeypatch, made.size)
    bring(made, bundle)


def test_links_need_no_space_but_conversion_does(folder, bundle, monkeypatch):
    made = plan(folder)
    space(monkeypatch, 0)
    bring(made, bundle, "link")
    with pytest.raises(ExportError, match="free"):
        bring_weights(plan(folder, dtype="float16"), bundle, "link")


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_files_that_cannot_be_linked(folder, bundle, monkeypatch, number):
    def refuse(source, target):
        raise OSError(number, os.strerror(number), source, None, target)

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(ExportError) as caught:
        bring_weights(plan(folder), bundle, "link")
    for part in ("model-1.safetensors", "--weights clone", "same filesystem"):
        assert part in str(caught.value)


def test_a_file_that_is_hardly_used_is_not_brought_whole(folder, bundle):
    tensors = {"x.bias": some_tensors()["x.bias"], "x.unused": torch.randn(1000)}
    save_file(tensors, folder / "model-2.safetensors")
    made = plan(folder)
    bring(made, bundle)
    assert sorted(path.name for path in bundle.iterdir()) == [
        "model-1.safetensors",
        "weights-float32.safetensors",
    ]
    assert torch.equal(read_placed(made, bundle, "bias"), tensors["x.bias"])
