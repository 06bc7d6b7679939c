"""Where a model's tensors come from: what a checkpoint holds against what the modules want."""

import pytest
import torch
from safetensors.torch import save_file

from gap_export.checkpoint.index import open_checkpoint
from gap_export.checkpoint.sources import expected_shapes, match_tensors, require_shape, stored
from gap_export.errors import CheckpointError

EXPECTED = {"embed": (11, 4), "weight": (5, 4), "bias": (5,)}


def some_tensors():
    torch.manual_seed(0)
    return {
        "x.embed": torch.randn(11, 4),
        "x.weight": torch.randn(5, 4),
        "x.bias": torch.randn(5),
    }


@pytest.fixture
def make(tmp_path):
    """A function that opens a checkpoint of these tensors in one file."""

    def write(tensors):
        save_file(
            {key: value.contiguous() for key, value in tensors.items()},
            tmp_path / "model.safetensors",
        )
        return open_checkpoint(str(tmp_path))

    return write


def rename(key):
    return key.removeprefix("y.").removeprefix("x.")


def match(checkpoint, expected=None, **options):
    return match_tensors(
        checkpoint, EXPECTED if expected is None else expected, rename=rename, **options
    )


def refusal(checkpoint, expected=None, **options):
    with pytest.raises(CheckpointError) as caught:
        match(checkpoint, expected, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_tensor_is_found_under_its_name(make):
    checkpoint = make(some_tensors())
    found = match(checkpoint)
    assert found == {key.removeprefix("x."): at for key, at in checkpoint.tensors.items()}
    for name, location in found.items():
        source = stored(location)
        assert (source.shape, source.inputs, source.make) == (EXPECTED[name], (location,), None)


def test_a_missing_tensor_is_named_with_the_folder(make):
    checkpoint = make(some_tensors())
    message = refusal(checkpoint, EXPECTED | {"gate": (4, 4)})
    for part in (str(checkpoint.folder), "'gate'", "missing", "3 others", "another family"):
        assert part in message


def test_a_wrong_shape_names_file_tensor_and_both_shapes(make):
    message = refusal(make(some_tensors()), EXPECTED | {"weight": (5, 3)})
    for part in ("model.safetensors", "'x.weight'", "[5, 4]", "[5, 3]"):
        assert part in message
    assert "transposed" not in message


def test_a_transposed_tensor_is_said_to_be_one(make):
    message = refusal(make(some_tensors()), EXPECTED | {"weight": (4, 5)})
    for part in ("model.safetensors", "'x.weight'", "[5, 4]", "[4, 5]", "it lies transposed"):
        assert part in message


def test_shapes_of_one_dimension_are_not_transposed(make):
    assert "transposed" not in refusal(make(some_tensors()), EXPECTED | {"bias": (6,)})


def test_a_tensor_that_no_module_has_is_named_with_its_file(make):
    checkpoint = make(some_tensors() | {"x.gate": torch.zeros(2)})
    message = refusal(checkpoint)
    for part in ("model.safetensors", "'x.gate'", str(checkpoint.folder), "family"):
        assert part in message


def test_what_is_ignored_may_have_any_shape(make):
    tensors = some_tensors() | {"x.rotary.inv_freq": torch.zeros(2), "x.counts": torch.zeros(3)}
    found = match(make(tensors), ignored=(r"inv_freq$", r"^x\.counts"))
    assert set(found) == set(EXPECTED)


def test_nothing_is_ignored_where_nothing_is_said(make):
    assert "'x.gate'" in refusal(make(some_tensors() | {"x.gate": torch.zeros(2)}), ignored=())


def test_one_tensor_under_two_names_is_refused_with_both(make):
    message = refusal(make(some_tensors() | {"y.bias": torch.zeros(5)}))
    for part in ("'x.bias'", "'y.bias'", "remove one"):
        assert part in message


def test_an_optional_tensor_may_be_missing(make):
    checkpoint = make(some_tensors())
    expected = EXPECTED | {"head": (11, 4)}
    assert set(match(checkpoint, expected, optional=frozenset({"head"}))) == set(EXPECTED)
    assert "'head' is missing" in refusal(checkpoint, expected)


def test_an_optional_tensor_that_is_there_is_taken(make):
    checkpoint = make(some_tensors() | {"x.head": torch.randn(11, 4)})
    found = match(checkpoint, EXPECTED | {"head": (11, 4)}, optional=frozenset({"head"}))
    assert found["head"].key == "x.head"


def test_an_optional_tensor_that_is_there_must_fit(make):
    checkpoint = make(some_tensors() | {"x.head": torch.randn(12, 4)})
    message = refusal(checkpoint, EXPECTED | {"head": (11, 4)}, optional=frozenset({"head"}))
    assert "[12, 4]" in message


def test_a_tensor_of_a_dtype_that_cannot_be_used_is_named_with_it(make):
    tensors = some_tensors() | {"x.weight": torch.zeros(5, 4, dtype=torch.int8)}
    message = refusal(make(tensors))
    for part in ("'x.weight'", "I8", "float32, float16 or bfloat16"):
        assert part in message
    assert "missing" not in message


def test_an_optional_tensor_of_such_a_dtype_is_not_left_out(make):
    tensors = some_tensors() | {"x.head": torch.zeros(11, 4, dtype=torch.float64)}
    message = refusal(make(tensors), EXPECTED | {"head": (11, 4)}, optional=frozenset({"head"}))
    assert "'x.head'" in message
    assert "F64" in message


def test_unreadable_tensors_that_nobody_wants_are_no_reason_to_stop(make):
    tensors = some_tensors() | {"x.counts": torch.zeros(3, dtype=torch.float64)}
    assert set(match(make(tensors))) == set(EXPECTED)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool])
def test_whole_numbers_are_no_weights(make, dtype):
    """Readable, because some files hold position numbers, but not to be used as a parameter."""
    tensors = some_tensors() | {"x.weight": torch.zeros(5, 4, dtype=dtype)}
    message = refusal(make(tensors))
    for part in ("model.safetensors", "'x.weight'", str(dtype).removeprefix("torch.")):
        assert part in message


def test_require_shape_lets_the_right_one_pass(make):
    tensor = make(some_tensors()).tensors["x.weight"]
    require_shape(tensor, (5, 4))
    with pytest.raises(CheckpointError, match=r"\[5, 4\], expected \[20\]"):
        require_shape(tensor, (20,))


def test_expected_shapes_take_no_memory():
    """A matrix of 4 TiB."""

    def build():
        return torch.nn.ModuleDict(
            {"a": torch.nn.Linear(2**20, 2**20), "b": torch.nn.LayerNorm(3)}
        )

    assert expected_shapes(build) == {
        "a.weight": (2**20, 2**20),
        "a.bias": (2**20,),
        "b.weight": (3,),
        "b.bias": (3,),
    }


@pytest.mark.parametrize("sizes", [(2**31, 2**31), (-1, 3)])
def test_sizes_beyond_any_tensor_are_one_line(sizes):
    with pytest.raises(CheckpointError, match="no module can be built") as caught:
        expected_shapes(lambda: torch.nn.Linear(*sizes))
    assert str(caught.value).isprintable()
