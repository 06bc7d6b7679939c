"""Graphs whose inputs and outputs are not the manifest's are refused when their session opens."""

from pathlib import Path

import pytest

from gap_runtime.backends._interface import GraphTensor, require_interface
from gap_runtime.bundle.manifest import Stage
from gap_runtime.bundle.tensors import TensorSpec
from gap_runtime.errors import BundleError

SPECS = (("embeddings", "float32", (1, "rows", 8)), ("write_slot", "int64", (1,)))
OUTPUT = ("logits", "float32", ("wanted_rows", 16))
STAGE = Stage(
    name="decoder",
    role="decoder",
    file="decoder.onnx",
    bucket=None,
    ratio=None,
    kept=None,
    inputs=tuple(
        TensorSpec(name=name, dtype=dtype, shape=shape, meaning="") for name, dtype, shape in SPECS
    ),
    outputs=(TensorSpec(name=OUTPUT[0], dtype=OUTPUT[1], shape=OUTPUT[2], meaning=""),),
)


def found(name, dtype, shape):
    return GraphTensor(
        name=name,
        dtype=dtype,
        shape=tuple(size if isinstance(size, int) else None for size in shape),
    )


def check(inputs=SPECS, outputs=(OUTPUT,)):
    require_interface(
        Path("decoder.onnx"), STAGE, [found(*each) for each in inputs], map_all(outputs)
    )


def map_all(outputs):
    return [found(*each) for each in outputs]


def test_the_same_is_taken_in_any_order():
    check()
    check(inputs=SPECS[::-1])
    # A library whose word for a dtype is not known.
    check(inputs=[(name, None, shape) for name, _, shape in SPECS])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"inputs": SPECS[:1]}, "input 'write_slot' is in the manifest alone"),
        ({"inputs": (*SPECS, ("more", "int64", (1,)))}, "input 'more' is in the graph alone"),
        ({"outputs": ()}, "output 'logits' is in the manifest alone"),
        (
            {"inputs": (SPECS[0], ("write_slot", "int32", (1,)))},
            "input 'write_slot' is int32 [1], the manifest says int64 [1]",
        ),
        (
            {"outputs": (("logits", "float32", ("n", 17)),)},
            "output 'logits' is float32 [free, 17], the manifest says float32 [wanted_rows, 16]",
        ),
        (
            {"inputs": (("embeddings", "float32", (1, 5, 8)), SPECS[1])},
            "input 'embeddings' is float32 [1, 5, 8]",
        ),
    ],
)
def test_anything_else_is_named(changes, said):
    with pytest.raises(BundleError, match=r"decoder\.onnx: ") as caught:
        check(**changes)
    assert said in str(caught.value)
