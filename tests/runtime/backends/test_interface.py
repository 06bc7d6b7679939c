"""Graphs whose inputs and outputs are not the manifest's are refused when their session opens."""

from pathlib import Path

import pytest

from gap_runtime.backends._interface import GraphTensor, require_interface
from gap_runtime.backends.onnxruntime.loading import list_errors
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


def field(number, data):
    """A field of bytes, as ONNX files have them."""
    return bytes([number << 3 | 2, len(data)]) + data


def test_a_graph_whose_names_are_no_text_is_an_error_of_the_library():
    """Found by the fuzzer: a message that quotes such a name cannot become a text.

    It is a UnicodeDecodeError then; older versions have an error of their own.
    """
    ort = pytest.importorskip("onnxruntime")
    node = field(1, b"x") + field(2, b"y") + field(4, b"\xed" * 6)
    kind = field(2, field(1, b"\x08\x01"))
    sides = field(11, field(1, b"x") + kind) + field(12, field(1, b"y") + kind)
    graph = b"\x08\x08" + field(7, field(1, node) + field(2, b"g") + sides) + field(8, b"\x10\x12")
    with pytest.raises(list_errors(ort)):
        ort.InferenceSession(graph, providers=["CPUExecutionProvider"], enable_fallback=0)
