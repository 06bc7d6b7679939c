"""What weights weigh in an engine with a profile for prompts, for drafts and for steps.

They exist once, whatever the profiles: written as `[out, in]` for a Gemm, as exports have them.
"""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tools.engines import build

WIDTH = 1536
KERNELS = 600_000
"""What an engine has besides weights, at the most."""
PROFILES = [{"x": (rows, WIDTH)} for rows in (300, 8, 1)]


def make_values(dtype):
    """Random integers as an initializer's bytes."""
    draw = np.random.default_rng(0)
    bits = 4 if dtype == TensorProto.INT4 else 8
    raw = draw.integers(0, 256, WIDTH * WIDTH * bits // 8, dtype=np.uint8).tobytes()
    return helper.make_tensor("w.values", dtype, (WIDTH, WIDTH), raw, raw=True)


def write_product(path, kind):
    """One linear layer, as graphs of a bundle have it."""
    draw = np.random.default_rng(1)
    if kind == "float16":
        weight = draw.standard_normal((WIDTH, WIDTH)).astype(np.float16)
        weights = [numpy_helper.from_array(weight, "w")]
        nodes = [helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)]
    else:
        block = {"int4": 128}.get(kind)
        shape = (WIDTH,) if block is None else (WIDTH // block, WIDTH)
        scales = draw.uniform(0.5, 1, shape).astype(np.float16)
        dtype = TensorProto.INT4 if kind == "int4" else TensorProto.INT8
        weights = [make_values(dtype), numpy_helper.from_array(scales, "w.scales")]
        settings = {"axis": 1} if block is None else {"axis": 0, "block_size": block}
        nodes = [
            helper.make_node("DequantizeLinear", ["w.values", "w.scales"], ["w"], **settings),
            helper.make_node("MatMul", ["x", "w"], ["y"]),
        ]
    rows = ("rows", WIDTH)
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT16, rows)
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT16, rows)
    graph = helper.make_graph(nodes, "product", [given], [made], weights)
    opsets = [helper.make_opsetid("", 24)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=11), path)


@pytest.mark.parametrize(("kind", "size"), [("float16", 2), ("int8", 1), ("int4", 0.52)])
def test_weights_are_in_an_engine_once(tmp_path, kind, size):
    write_product(tmp_path / "p.onnx", kind)
    _, _, found = build(tmp_path / "p.onnx", PROFILES)
    expected = WIDTH * WIDTH * size
    assert expected <= found <= expected + KERNELS
