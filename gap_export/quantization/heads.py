"""Queries, keys and values of quantized layers as one product, which rounds its inputs once.

    MatMulNBits(x, q), MatMulNBits(x, k), MatMulNBits(x, v) -> GroupQueryAttention(q, k, v, ...)
      -> MatMulNBits(x, Concat(q, k, v)) -> GroupQueryAttention(qkv, , , ...)

The weights stay three tensors of their files; a runtime joins them once, when it loads the graph.
Where something stands between a product and attention (a bias, a norm, rotary embedding of its
own), or the three are quantized in different ways, all stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import onnx_ir as ir
from onnx_ir.passes import common

from gap_export.interfaces.dialect import ATTENTION, FUSED
from gap_export.tracing.graph import Traced

_OUTPUTS: Final = "N"


def pack_heads(traced: Traced) -> Traced:
    """Make one product of those of queries, keys and values, wherever attention takes them so.

    Args:
        traced: A decoder, which is changed; its weights are quantized.
    """
    graph = traced.model.graph
    for node in list(graph):
        if f"{node.domain}.{node.op_type}" != ATTENTION:
            continue
        products = [made for value in node.inputs[:3] if value and (made := value.producer())]
        if len(products) == 3 and _are_alike(products):
            _pack(graph, node, products)
    common.RemoveUnusedNodesPass()(traced.model)
    return traced


def _are_alike(products: Sequence[ir.Node]) -> bool:
    """Whether they multiply the same rows in the same way, for nobody but attention."""

    def describe(node: ir.Node) -> tuple[object, ...]:
        settings = {k: each.value for k, each in node.attributes.items() if k != _OUTPUTS}
        uses = len(list(node.outputs[0].uses()))
        return node.domain, node.op_type, node.inputs[0], len(node.inputs), settings, uses

    first = describe(products[0])
    is_fused = f"{products[0].domain}.{products[0].op_type}" == FUSED
    return is_fused and first[-1] == 1 and all(describe(each) == first for each in products)


def _pack(graph: ir.Graph, attention: ir.Node, products: Sequence[ir.Node]) -> None:
    scope = f"{(attention.name or '').rpartition('/')[0]}.qkv_proj"
    outputs = sum(each.attributes.get_int(_OUTPUTS, 0) for each in products)
    nodes, joined = [], []
    for place in range(1, len(products[0].inputs)):
        parts = [each.inputs[place] for each in products]
        node = ir.node("Concat", parts, {"axis": 0}, name=f"{scope}/Concat_{place}")
        first, value = parts[0], node.outputs[0]
        assert first is not None
        assert first.shape is not None
        # Values, scales and zero points lie by output.
        value.name, value.type = f"{scope}.{place}", first.type
        value.shape = ir.Shape([outputs, *first.shape[1:]])
        nodes.append(node)
        joined.append(value)
    settings = dict(products[0].attributes) | {_OUTPUTS: ir.AttrInt64(_OUTPUTS, outputs)}
    product = ir.node(
        products[0].op_type,
        [products[0].inputs[0], *joined],
        domain=products[0].domain,
        name=f"{scope}/Gemm",
    )
    product.attributes.update(settings)
    result, old = product.outputs[0], products[0].outputs[0]
    assert old.shape is not None
    result.name, result.type = scope, old.type
    result.shape = ir.Shape([*old.shape[:-1], outputs])
    graph.insert_before(attention, [*nodes, product])
    attention.replace_input_with(0, result)
    attention.replace_input_with(1, None)
    attention.replace_input_with(2, None)
