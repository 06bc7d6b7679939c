"""A graph with a loop is refused by its bytes, whoever would run it."""

import pytest

from gap_runtime.bundle.onnx_file import require_no_loop
from gap_runtime.errors import BundleError

onnx = pytest.importorskip("onnx")


def make_model(operator, *, in_function=False):
    """A model whose one operator is of that name."""
    helper = onnx.helper
    body = helper.make_graph([], "body", [], [])
    attributes = {"body": body} if operator in {"Loop", "Scan"} else {}
    node = helper.make_node(operator, ["x"], ["y"], **attributes)
    opsets = [helper.make_opsetid("", 18)]
    functions = []
    if in_function:
        functions = [helper.make_function("own", "hidden", ["x"], ["y"], [node], opsets)]
        node = helper.make_node("hidden", ["x"], ["y"], domain="own")
        opsets.append(helper.make_opsetid("own", 1))
    value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = helper.make_graph([node], "Loop", [value], [value])
    return helper.make_model(graph, functions=functions, opset_imports=opsets)


@pytest.mark.parametrize("in_function", [False, True])
@pytest.mark.parametrize("operator", ["Loop", "Scan"])
def test_a_loop_is_found_wherever_it_is(tmp_path, operator, in_function):
    path = tmp_path / "vision.onnx"
    path.write_bytes(make_model(operator, in_function=in_function).SerializeToString())
    with pytest.raises(BundleError, match=f"has the operator {operator}, which no export has"):
        require_no_loop(path)


@pytest.mark.parametrize("tag", [b"\x22", b"\xa2\x00", b"\xa2\x80\x00"])
@pytest.mark.parametrize("length", [b"\x04", b"\x84\x00", b"\x84\x80\x00"])
def test_a_loop_in_longer_forms_of_its_numbers_is_found(tmp_path, tag, length):
    """protobuf reads them alike."""
    written = tag + length + b"Loop"
    node = onnx.NodeProto()
    node.ParseFromString(written)
    assert node.op_type == "Loop"
    path = tmp_path / "vision.onnx"
    path.write_bytes(b"..." + written)
    with pytest.raises(BundleError, match="the operator Loop"):
        require_no_loop(path)


def test_a_name_is_no_operator(tmp_path):
    """The graph of this model is called Loop."""
    path = tmp_path / "vision.onnx"
    path.write_bytes(make_model("Relu").SerializeToString())
    require_no_loop(path)
