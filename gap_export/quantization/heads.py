"""Queries, keys and values of quantized layers as one product, which rounds its inputs once.

    MatMulNBits(x, q), MatMulNBits(x, k), MatMulNBits(x, v) -> GroupQueryAttention(q, k, v, ...)
      -> MatMulNBits(x, q+k+v) -> GroupQueryAttention(qkv, , , ...)

The weights lie side by side in the file (gap_export.quantization.joined). Those that came
quantized stay three tensors, Concat(q, k, v): a runtime joins them once, when it loads the graph.
Where something stands between a product and attention (a bias, a norm, rotary embedding of its
own), or the three are quantized in different ways, all stays as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Final

import onnx_ir as ir
from onnx_ir.passes import common

from gap_export.interfaces.dialect import ATTENTION, FUSED
from gap_export.quantization.graph import spread_scales
from gap_export.quantization.joined import are_neighbours, declare, sort_by_use
from gap_export.tracing.graph import Traced

_OUTPUTS: Final = "N"


def pack_heads(traced: Traced, *, joins: bool) -> Traced:
    """Make one product of those of queries, keys and values, wherever attention takes them so.

    Args:
        traced: A decoder, which is changed; its weights are quantized.
        joins: Whether tensors may be joined in the file.

    Returns:
        The graph, with joined tensors among its parameters in place of their parts.
    """
    graph = traced.model.graph
    parameters = traced.parameters if joins else frozenset[str]()
    before = {*graph.initializers}
    for node in list(graph):
        if f"{node.domain}.{node.op_type}" != ATTENTION:
            continue
        products = [made for value in node.inputs[:3] if value and (made := value.producer())]
        if len(products) == 3 and _are_alike(products):
            _pack(graph, node, products, parameters)
    common.RemoveUnusedNodesPass()(traced.model)
    sort_by_use(graph)
    new = {
        name
        for name, value in graph.initializers.items()
        if name not in before and value.const_value is None
    }
    left = traced.parameters.intersection(graph.initializers)
    return dataclasses.replace(traced, parameters=left | new)


def _are_alike(products: Sequence[ir.Node]) -> bool:
    """Whether they multiply the same rows in the same way, for nobody but attention."""

    def describe(node: ir.Node) -> tuple[object, ...]:
        settings = {k: each.value for k, each in node.attributes.items() if k != _OUTPUTS}
        uses = len(list(node.outputs[0].uses()))
        return node.domain, node.op_type, node.inputs[0], len(node.inputs), settings, uses

    first = describe(products[0])
    is_fused = f"{products[0].domain}.{products[0].op_type}" == FUSED
    return is_fused and first[-1] == 1 and all(describe(each) == first for each in products)


def _pack(
    graph: ir.Graph,
    attention: ir.Node,
    products: Sequence[ir.Node],
    parameters: frozenset[str],
) -> None:
    scope = f"{(attention.name or '').rpartition('/')[0]}.qkv_proj"
    outputs = sum(each.attributes.get_int(_OUTPUTS, 0) for each in products)
    nodes, joined = list[ir.Node](), list[ir.Value]()
    for place in range(1, len(products[0].inputs)):
        parts = [value for each in products if (value := each.inputs[place])]
        value, made = _join(graph, parts, parameters, f"{scope}.{place}")
        nodes += made
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


def _join(
    graph: ir.Graph, parts: Sequence[ir.Value], parameters: frozenset[str], name: str
) -> tuple[ir.Value, list[ir.Node]]:
    """Tensors as one by their outputs, the first axis: in the file, or by a node at load.

    Returns:
        The whole, and the nodes that give it, if there are any.
    """
    spread = [node for each in parts if (node := each.producer())]
    stored = [value for each in spread if (value := each.inputs[0])] or parts
    shapes = [each.shape for each in parts if each.shape]
    if are_neighbours(stored, parameters):
        value = declare(graph, stored)
        if not spread:
            return value, []
        node = spread_scales(graph, value, _size(shapes[0], 1), name)
    else:
        node = ir.node("Concat", parts, {"axis": 0}, name=f"{name}/Concat")
        value = node.outputs[0]
        value.name, value.type = name, parts[0].type
        outputs = sum(_size(shape, 0) for shape in shapes)
        value.shape = ir.Shape([outputs, *shapes[0][1:]])
    return node.outputs[0], [node]


def _size(shape: ir.Shape, axis: int) -> int:
    return int(shape[axis])  # type: ignore[arg-type]
