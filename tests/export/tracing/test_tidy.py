"""Folding asks the library for shapes only where nobody has said them."""

import onnx_ir as ir
import pytest
from onnxscript.optimizer import _constant_folding

from gap_export.tracing.graph import Traced
from gap_export.tracing.tidy import tidy


def make_graph(*, is_known):
    """Two times x, whose type and shape are said or not."""
    dtype, shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([2, 3])
    x = ir.Value(name="x", type=dtype, shape=shape)
    node = ir.Node("", "Add", [x, x], name="add")
    last = ir.Node("", "Neg", [node.outputs[0]], name="neg")
    if is_known:
        node.outputs[0].type, node.outputs[0].shape = dtype, shape
    last.outputs[0].type, last.outputs[0].shape = dtype, shape
    last.outputs[0].name = "y"
    graph = ir.Graph([x], last.outputs, nodes=[node, last], opset_imports={"": 20}, name="g")
    model = ir.Model(graph, ir_version=10)
    return Traced(model=model, inputs=(), outputs=(), parameters=frozenset())


@pytest.mark.parametrize(("is_known", "asked"), [(True, []), (False, ["add"])])
def test_only_what_is_unknown_is_inferred(monkeypatch, is_known, asked):
    library, found = _constant_folding.FoldConstantsPass._do_inference, []

    def infer(self, node):
        found.append(node.name)
        library(self, node)

    monkeypatch.setattr(_constant_folding.FoldConstantsPass, "_do_inference", infer)
    traced = tidy(make_graph(is_known=is_known))
    assert found == asked
    (value,) = next(iter(traced.model.graph)).outputs
    assert (value.dtype, list(value.shape)) == (ir.DataType.FLOAT, [2, 3])
