"""A stranger's graph that would never end, on real backends."""

import onnx
import pytest

from gap_runtime.backends import open_backend
from gap_runtime.bundle.bundle import Bundle
from gap_runtime.errors import BundleError


@pytest.mark.parametrize("backend", ["onnxruntime:cpu", "openvino"])
def test_a_graph_with_a_loop_is_not_begun(export, tmp_path, backend):
    """Of 2^62 turns, over values that the library would compute when it loads the graph."""
    if backend == "openvino":
        pytest.importorskip("openvino")
    folder = export("refshapes", tmp_path / "b", target="portable", reference=False)
    bundle = Bundle.open(folder)
    path = next(folder.glob("vision-*.onnx"))
    model = onnx.load(path, load_external_data=False)
    helper, graph = onnx.helper, model.graph
    kind = graph.output[0].type.tensor_type.elem_type
    name = graph.output[0].name
    for node in graph.node:
        node.output[:] = ["before" if each == name else each for each in node.output]
    value = [helper.make_tensor_value_info(each, kind, None) for each in ("v", "w")]
    flags = [helper.make_tensor_value_info(each, onnx.TensorProto.BOOL, []) for each in ("c", "d")]
    turn = helper.make_tensor_value_info("i", onnx.TensorProto.INT64, [])
    nodes = [helper.make_node("Identity", [a], [b]) for a, b in (("c", "d"), ("v", "w"))]
    body = helper.make_graph(nodes, "body", [turn, flags[0], value[0]], [flags[1], value[1]])
    graph.initializer.append(helper.make_tensor("turns", onnx.TensorProto.INT64, [], [2**62]))
    graph.initializer.append(helper.make_tensor("on", onnx.TensorProto.BOOL, [], [True]))
    graph.node.append(helper.make_node("Loop", ["turns", "on", "before"], [name], body=body))
    path.write_bytes(model.SerializeToString())
    stage = next(each for each in bundle.manifest.stages if each.file == path.name)
    runner, device = open_backend(backend)
    with pytest.raises(BundleError, match="has the operator Loop"):
        runner.open_stage(bundle, stage, device)
