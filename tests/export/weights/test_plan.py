"""Weights into a bundle: whole files cloned or linked, other dtypes converted one by one."""

import dataclasses
import errno
import json
import os
import shutil
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from gap_export.checkpoint.index import open_checkpoint
from gap_export.checkpoint.sources import TensorSource, make_tensor, stored
from gap_export.errors import ExportError
from gap_export.weights.plan import plan_weights
from gap_export.weights.write import bring_weights, write_placeholders

CONVERTED = "weights-float16.safetensors"


def some_tensors():
    torch.manual_seed(0)
    return {
        "x.embed": torch.randn(160, 4) * 3,
        "x.weight": torch.randn(60, 4),
        "x.bias": torch.tensor([1e-8, -65504.0, 0.1, 1.0000001, 3e-5]).repeat(20),
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


WANTED = {"embed": (160, 4), "weight": (60, 4), "bias": (100,)}


def find(folder):
    """Every tensor of the checkpoint as it lies, under its name without `x.`."""
    tensors = open_checkpoint(str(folder)).tensors
    return {key.removeprefix("x."): stored(tensor) for key, tensor in tensors.items()}


def plan(folder, wanted=None, *, dtype="float32", more=None):
    sources = find(folder) | (more or {})
    return plan_weights(
        open_checkpoint(str(folder)),
        {name: sources[name] for name in (WANTED if wanted is None else wanted)},
        dtype=dtype,
    )


def bring(made, bundle, mode="copy"):
    write_placeholders(made, bundle)
    sizes = {path.name: path.stat().st_size for path in bundle.iterdir()}
    told = []
    bring_weights(made, bundle, mode, on_bytes=told.append)
    assert sum(told) == made.size
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


@pytest.mark.parametrize("mode", ["copy", "link"])
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
    made = plan(folder, {"embed": (160, 4)})
    bring(made, bundle)
    assert [path.name for path in bundle.iterdir()] == ["model-1.safetensors"]


def test_a_cloned_file_does_not_follow_its_source(folder, bundle):
    bring(plan(folder), bundle)
    before = (bundle / "model-1.safetensors").read_bytes()
    with (folder / "model-1.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")
    assert (bundle / "model-1.safetensors").read_bytes() == before


def test_a_system_that_cannot_share_blocks_copies_them(folder, bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    bring(plan(folder), bundle)
    for name in ("model-1.safetensors", "model-2.safetensors"):
        assert (bundle / name).read_bytes() == (folder / name).read_bytes()


def test_links_of_a_hub_cache_come_as_files_with_their_names(folder, bundle, tmp_path):
    for k, path in enumerate(sorted(folder.glob("*.safetensors"))):
        path.rename(tmp_path / f"blob{k}")
        path.symlink_to(tmp_path / f"blob{k}")
    bring(plan(folder), bundle, "link")
    for k, name in enumerate(("model-1.safetensors", "model-2.safetensors")):
        assert not (bundle / name).is_symlink()
        assert (bundle / name).stat().st_ino == (tmp_path / f"blob{k}").stat().st_ino


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("mode", ["copy", "link"])
def test_conversion_is_torchs_own_cast(folder, bundle, dtype, mode):
    made = plan(folder, dtype=dtype)
    bring(made, bundle, mode)
    file = f"weights-{dtype}.safetensors"
    assert [path.name for path in bundle.iterdir()] == [file]
    with safe_open(bundle / file, framework="pt") as written:
        assert set(written.keys()) == set(WANTED)
        for name in WANTED:
            expected = some_tensors()[f"x.{name}"].to(getattr(torch, dtype))
            assert written.get_tensor(name).dtype == expected.dtype
            assert torch.equal(written.get_tensor(name), expected)
            assert torch.equal(read_placed(made, bundle, name), expected)
            assert made.placed[name].dtype == dtype
            assert made.placed[name].offset % expected.element_size() == 0


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16])
def test_conversion_up_is_exact(folder, bundle, narrow):
    values = some_tensors()["x.weight"].to(narrow)
    save_file({"x.bias": torch.ones(500), "x.unused": values}, folder / "model-2.safetensors")
    made = plan(folder, {"unused": (60, 4), "bias": (500,)})
    bring(made, bundle)
    assert torch.equal(read_placed(made, bundle, "unused"), values.float())
    assert sorted(made.file_sizes()) == ["model-2.safetensors", "weights-float32.safetensors"]


def test_only_tensors_of_another_dtype_are_converted(folder, bundle):
    tensors = some_tensors()
    mixed = {"x.embed": tensors["x.embed"].half(), "x.weight": tensors["x.weight"]}
    save_file(mixed, folder / "model-1.safetensors")
    made = plan(folder, {"embed": (160, 4), "weight": (60, 4)}, dtype="float16")
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


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_tied_head_lies_where_the_embedding_lies(folder, bundle, dtype):
    made = plan(
        folder,
        WANTED | {"head": (160, 4)},
        dtype=dtype,
        more={"head": find(folder)["embed"]},
    )
    bring(made, bundle)
    assert made.placed["head"] == made.placed["embed"]
    expected = some_tensors()["x.embed"].to(getattr(torch, dtype))
    assert torch.equal(read_placed(made, bundle, "head"), expected)


def twice_joined(folder):
    """A tensor made of two: twice the weight, with the first row of the embedding below it."""
    found = find(folder)
    return TensorSource(
        shape=(61, 4),
        inputs=(*found["weight"].inputs, *found["embed"].inputs),
        make=lambda weight, embed: torch.cat([2 * weight, embed[:1]]),
    )


@pytest.mark.parametrize("mode", ["copy", "link"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_tensor_may_be_made_of_several(folder, bundle, dtype, mode):
    """In float32, and only then in the wanted dtype."""
    tensors = some_tensors()
    tensors = {key: tensors[key].half() for key in ("x.embed", "x.weight")}
    save_file(tensors, folder / "model-1.safetensors")
    made = plan(
        folder,
        WANTED | {"joined": (61, 4)},
        dtype=dtype,
        more={"joined": twice_joined(folder)},
    )
    bring(made, bundle, mode)
    values = {key: value.float() for key, value in tensors.items()}
    expected = torch.cat([2 * values["x.weight"], values["x.embed"][:1]])
    assert torch.equal(make_tensor(twice_joined(folder)), expected)
    assert made.placed["joined"].file == f"weights-{dtype}.safetensors"
    placed = read_placed(made, bundle, "joined")
    assert torch.equal(placed, expected.to(getattr(torch, dtype)))


def test_what_is_made_once_stands_in_under_every_name(folder, bundle):
    one = twice_joined(folder)
    made = plan(folder, {"a": (61, 4), "b": (61, 4)}, more={"a": one, "b": one})
    bring(made, bundle)
    assert made.placed["a"] == made.placed["b"]
    with safe_open(bundle / "weights-float32.safetensors", framework="pt") as written:
        assert list(written.keys()) == ["a"]


def test_a_file_is_not_brought_for_what_is_made_of_it(folder, bundle):
    made = plan(folder, {"joined": (61, 4)}, more={"joined": twice_joined(folder)})
    bring(made, bundle)
    assert [path.name for path in bundle.iterdir()] == ["weights-float32.safetensors"]


def test_a_made_tensor_of_another_shape_is_our_own_mistake(folder, bundle):
    wrong = TensorSource(shape=(60, 4), inputs=find(folder)["weight"].inputs, make=torch.t)
    made = plan(folder, {"wrong": (60, 4)}, more={"wrong": wrong})
    with pytest.raises(AssertionError):
        bring_weights(made, bundle, "copy")


def test_made_values_that_overflow_name_the_files_that_they_are_made_of(folder, bundle):
    found = find(folder)
    huge = TensorSource(
        shape=(100,),
        inputs=(*found["bias"].inputs, *found["weight"].inputs),
        make=lambda bias, weight: bias * weight.abs().max().ceil(),
    )
    with pytest.raises(ExportError) as caught:
        bring(plan(folder, {"huge": (100,)}, dtype="float16", more={"huge": huge}), bundle)
    for part in ("model-1.safetensors", "model-2.safetensors", "'huge'", "bfloat16 or float32"):
        assert part in str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_values_that_do_not_lie_in_order_are_put_in_order(tmp_path, bundle, dtype):
    home = tmp_path / "torch"
    home.mkdir()
    weight = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))
    tensors = {"x.weight": weight.t(), "x.bias": torch.arange(5.0)}
    torch.save(tensors, home / "pytorch_model.bin")
    made = plan(home, {"weight": (5, 8), "bias": (5,)}, dtype=dtype)
    bring(made, bundle)
    assert made.placed["weight"].file == f"weights-{dtype}.safetensors"
    placed = read_placed(made, bundle, "weight")
    assert torch.equal(placed, weight.t().to(getattr(torch, dtype)))


def test_a_torch_file_comes_as_it_is(tmp_path, bundle):
    home = tmp_path / "torch"
    home.mkdir()
    tensors = {"x.weight": torch.randn(40, 30), "x.bias": torch.randn(30)}
    torch.save(tensors, home / "pytorch_model.bin")
    made = plan(home, {"weight": (40, 30), "bias": (30,)})
    bring(made, bundle)
    assert [path.name for path in bundle.iterdir()] == ["pytorch_model.bin"]
    for name in ("weight", "bias"):
        assert torch.equal(read_placed(made, bundle, name), tensors[f"x.{name}"])


def test_files_of_parts_have_their_role_before_their_name(folder, bundle, tmp_path):
    """A part's file may have the name of one of the checkpoint's own."""
    home = tmp_path / "part"
    home.mkdir()
    table = torch.randn(60, 3)
    save_file({"x.table": table}, home / "model.safetensors")
    save_file(
        {key: some_tensors()[key] for key in ("x.embed", "x.weight")},
        folder / "model.safetensors",
    )
    (folder / "model.safetensors.index.json").unlink()
    part = open_checkpoint(str(home))
    checkpoint = dataclasses.replace(open_checkpoint(str(folder)), parts={"clip": part})
    sources = find(folder) | find(home)
    made = plan_weights(
        checkpoint,
        {name: sources[name] for name in ("embed", "weight", "table")},
        dtype="float32",
    )
    bring(made, bundle)
    assert sorted(path.name for path in bundle.iterdir()) == [
        "clip-model.safetensors",
        "model.safetensors",
    ]
    assert torch.equal(read_placed(made, bundle, "table"), table)
    assert torch.equal(read_placed(made, bundle, "embed"), some_tensors()["x.embed"])


def space(monkeypatch, free):
    usage = shutil.disk_usage("/")._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)


def test_too_little_space_is_said_before_anything_is_written(folder, bundle, monkeypatch):
    made = plan(folder)
    space(monkeypatch, made.size - 1)
    with pytest.raises(ExportError) as caught:
        bring_weights(made, bundle, "copy")
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
    for part in ("model-1.safetensors", "--bring copy", "same filesystem"):
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
