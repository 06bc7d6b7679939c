"""A quantized decoder's hidden states with their batch of one, for onnxruntime's own operators.

Linear layers are traced in two dimensions, as Gemm wants them, while its attention wants three.
Products with quantized weights take either, so that nothing between them has to put the batch on
and off: that would be four nodes in each layer of every step.

    op(Squeeze(x), ...)      -> Squeeze(op(x, ...)), op any that can do without it
    Unsqueeze(Squeeze(x))    -> x
"""

from __future__ import annotations

from typing import Final

import onnx_ir as ir
from onnx_ir.passes import common

from gap_export.interfaces.dialect import FUSED
from gap_export.tracing.graph import Traced

_FLAT: Final = 2
_ELEMENTWISE: Final = frozenset({"Add", "Cast", "Mul", "Sigmoid", "Swish"})


def keep_batch(traced: Traced) -> Traced:
    """Move every Squeeze of the batch behind the nodes that can do without it, and merge it there.

    Args:
        traced: A graph, which is changed; sorted. What needs two dimensions still has them.
    """
    graph = traced.model.graph
    for node in list(graph):
        squeezes = {k: made for k, value in enumerate(node.inputs) if (made := _squeeze(value))}
        if not squeezes:
            continue
        if _is_of_batch(node, "Unsqueeze") and not node.outputs[0].is_graph_output():
            whole = squeezes[0].inputs[0]
            assert whole is not None
            ir.convenience.replace_all_uses_with(node.outputs[0], whole)
        elif _takes_batch(node, list(squeezes)):
            for k, squeeze in squeezes.items():
                node.replace_input_with(k, squeeze.inputs[0])
            axes = next(iter(squeezes.values())).inputs[1]
            _squeeze_behind(graph, node, axes)
    common.RemoveUnusedNodesPass()(traced.model)
    return traced


def _squeeze(value: ir.Value | None) -> ir.Node | None:
    """The Squeeze of the batch that makes a value [S, ...]; None where something else does."""
    node = value.producer() if value is not None else None
    if node is None or not _is_of_batch(node, "Squeeze"):
        return None
    return node if _rank(node.outputs[0]) == _FLAT else None


def _is_of_batch(node: ir.Node, op_type: str) -> bool:
    """Whether a node is a Squeeze or Unsqueeze of the first dimension."""
    axes = node.inputs[1] if node.op_type == op_type and len(node.inputs) > 1 else None
    tensor = ir.convenience.get_const_tensor(axes) if axes is not None else None
    return tensor is not None and tensor.numpy().tolist() == [0]


def _takes_batch(node: ir.Node, batched: list[int]) -> bool:
    """Whether a node does the same with a batch of one before these inputs [S, ...]."""
    if node.op_type in _ELEMENTWISE:
        # Against a third dimension, the first of two is no batch.
        return all(x is not None and _rank(x) <= _FLAT for x in node.inputs)
    if batched != [0] or _rank(node.outputs[0]) != _FLAT:
        return False
    axis = node.attributes.get_int("axis", 0)
    if node.op_type == "Gather":
        return axis >= 0
    if node.op_type == "RMSNormalization":
        return axis == -1
    return node.op_type == "MatMul" or f"{node.domain}.{node.op_type}" == FUSED


def _rank(value: ir.Value) -> int:
    assert value.shape is not None
    return value.shape.rank()


def _squeeze_behind(graph: ir.Graph, node: ir.Node, axes: ir.Value | None) -> None:
    """Give a node's result the batch, and all who want it the result of a Squeeze."""
    if node.op_type == "Gather":
        axis = node.attributes.get_int("axis", 0)
        node.attributes["axis"] = ir.AttrInt64("axis", axis + 1)
    result = node.outputs[0]
    squeeze = ir.node("Squeeze", [result, axes], name=f"{node.name}/squeeze")
    flat = squeeze.outputs[0]
    flat.name, flat.shape, flat.type = result.name, result.shape, result.type
    result.name = f"{result.name}.batched"
    ir.convenience.replace_all_uses_with(result, flat, replace_graph_outputs=True)
    squeeze.replace_input_with(0, result)
    assert flat.shape is not None
    result.shape = ir.Shape([1, *flat.shape])
    graph.insert_after(node, squeeze)
