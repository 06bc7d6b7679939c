"""Quantized products of the same rows as one: queries, keys and values; gate and up.

    MatMul(x, DequantizeLinear(q)), MatMul(x, DequantizeLinear(k)), ...
      -> Split(MatMul(x, DequantizeLinear(q+k+...)))

Attention that takes queries, keys and values in one tensor needs no Split, and products of another
kind: `heads` makes those. Values lie side by side in the file, so that nothing is joined when a
graph is loaded: by the last axis, the outputs, or the first, where products are fused. A runtime
rounds the rows to 8 bits once in place of several times and has fewer operators to prepare. What
products give does not change: a column of one does not depend on the others.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common

from gap_export.checkpoint.sources import TensorSource
from gap_export.tracing.graph import Traced

_BETWEEN: Final = "+"
"""Between the names of the layers that a joined tensor is of."""
_WEIGHT: Final = ".weight"


def join_products(traced: Traced) -> Traced:
    """Make one product of those that multiply the same rows by weights that are alike.

    Args:
        traced: A graph, which is changed; its weights are quantized and encoded, not those of a
            checkpoint that came so.

    Returns:
        The graph with the joined tensors among its parameters, in place of their parts.
    """
    graph = traced.model.graph
    groups: dict[tuple[object, ...], list[ir.Node]] = {}
    for node in graph:
        weight = node.inputs[1].producer() if node.op_type == "MatMul" and node.inputs[1] else None
        if weight is not None and _can_join(weight, traced.parameters):
            groups.setdefault(_describe(node, weight), []).append(node)
    parameters = set(traced.parameters)
    for products in groups.values():
        if len(products) > 1:
            parameters |= _join(graph, products)
    common.RemoveUnusedNodesPass()(traced.model)
    sort_by_use(graph)
    return dataclasses.replace(
        traced, parameters=frozenset(parameters.intersection(graph.initializers))
    )


def find_sources(
    names: Iterable[str], sources: Mapping[str, TensorSource], *, axis: int
) -> dict[str, TensorSource]:
    """Where the tensors of graphs come from, by name, in the graphs' order.

    Args:
        names: Of all tensors that graphs use, joined ones among them.
        sources: Of the tensors before any were joined.
        axis: Of the outputs, by which tensors are joined: the first, 0, or the last, -1.
    """
    return {
        name: sources[name]
        if name in sources
        else _put_side_by_side([sources[part] for part in list_parts(name)], axis)
        for name in names
    }


def list_parts(name: str) -> list[str]:
    """Names of the tensors that a joined one, or one by itself, is made of.

    "a.q+k.weight.values" is made of "a.q.weight.values" and "a.k.weight.values".
    """
    path, _, suffix = name.rpartition(_WEIGHT)
    parent, dot, layers = path.rpartition(".")
    return [f"{parent}{dot}{layer}{_WEIGHT}{suffix}" for layer in layers.split(_BETWEEN)]


def _can_join(weight: ir.Node, parameters: frozenset[str]) -> bool:
    """Whether a weight is dequantized for one product, from numbers that fill whole bytes."""
    if weight.op_type != "DequantizeLinear" or len(list(weight.outputs[0].uses())) > 1:
        return False
    for value in weight.inputs:
        if value is None or value.name not in parameters or len(list(value.uses())) > 1:
            return False
        assert value.dtype is not None
        if _outputs(value) * value.dtype.bitwidth % 8:
            return False
    return True


def _describe(product: ir.Node, weight: ir.Node) -> tuple[object, ...]:
    """What products that can be one have in common."""
    values = weight.inputs[0]
    assert values is not None
    assert values.name is not None
    tensors = tuple(
        (each.dtype, each.shape[:-1] if each.shape else None) for each in weight.inputs if each
    )
    settings = tuple(sorted((name, each.value) for name, each in weight.attributes.items()))
    parent = values.name.rpartition(_WEIGHT)[0].rpartition(".")[0]
    return product.inputs[0], parent, settings, tensors


def _join(graph: ir.Graph, products: Sequence[ir.Node]) -> set[str]:
    """Make one product of several; the names of its parameters."""
    weights = [
        made for each in products if (value := each.inputs[1]) and (made := value.producer())
    ]
    first = weights[0]
    tensors = [
        declare(graph, [value for each in weights if (value := each.inputs[place])], axis=-1)
        for place in range(len(first.inputs))
    ]
    names = {str(each.name) for each in tensors}
    scope = str(tensors[0].name).rpartition(_WEIGHT)[0]
    widths = [_outputs(each.outputs[0]) for each in products]
    weight = ir.node(first.op_type, tensors, dict(first.attributes), name=f"{scope}/Gemm/weight")
    product = ir.node("MatMul", [products[0].inputs[0], weight.outputs[0]], name=f"{scope}/Gemm")
    sizes = ir.Value(
        name=f"{scope}.sizes",
        type=ir.TensorType(ir.DataType.INT64),
        shape=ir.Shape([len(widths)]),
        const_value=ir.tensor(np.array(widths, np.int64), name=f"{scope}.sizes"),
    )
    graph.initializers[str(sizes.name)] = sizes
    split = ir.node(
        "Split",
        [product.outputs[0], sizes],
        {"axis": -1},
        num_outputs=len(products),
        name=f"{scope}/Split",
    )
    _widen(weight.outputs[0], first.outputs[0], f"{scope}.weight", sum(widths))
    _widen(product.outputs[0], products[0].outputs[0], scope, sum(widths))
    graph.insert_before(products[0], [weight, product, split])
    for each, result in zip(products, split.outputs, strict=True):
        ir.convenience.replace_nodes_and_values(
            graph, each, [each], [], [each.outputs[0]], [result]
        )
    return names


def sort_by_use(graph: ir.Graph) -> None:
    """Put initializers, and so the file, in the order of layers, as checkpoints are read."""
    for node in graph:
        for value in node.inputs:
            if value is not None and value.is_initializer() and value.name:
                graph.initializers[value.name] = graph.initializers.pop(value.name)


def are_neighbours(parts: Sequence[ir.Value | None], parameters: frozenset[str]) -> bool:
    """Whether tensors are of weights of one module, and each is for one product alone."""
    parents = set()
    for value in parts:
        if value is None or value.name not in parameters or len(list(value.uses())) > 1:
            return False
        path, weight, _ = value.name.rpartition(_WEIGHT)
        parents.add(path.rpartition(".")[0] if weight else value.name)
    return len(parents) == 1


def declare(graph: ir.Graph, parts: Sequence[ir.Value], *, axis: int) -> ir.Value:
    """An initializer without a value, in place of several; `axis` as for `find_sources`."""
    first = parts[0]
    paths = [str(each.name).rpartition(_WEIGHT) for each in parts]
    parent = paths[0][0].rpartition(".")[0]
    layers = _BETWEEN.join(path.rpartition(".")[2] for path, *_ in paths)
    value = ir.Value()
    outputs = sum(_outputs(each, axis) for each in parts)
    _widen(value, first, f"{parent}.{layers}{_WEIGHT}{paths[0][2]}", outputs, axis)
    graph.initializers[str(value.name)] = value
    return value


def _widen(value: ir.Value, like: ir.Value, name: str, outputs: int, axis: int = -1) -> None:
    """Describe a value like another one, but for its name and its outputs."""
    assert like.shape is not None
    shape = list(like.shape)
    shape[axis] = outputs
    value.name, value.type, value.shape = name, like.type, ir.Shape(shape)


def _outputs(value: ir.Value, axis: int = -1) -> int:
    """Outputs of a layer that a value has."""
    assert value.shape is not None
    return int(value.shape[axis])  # type: ignore[arg-type]


def _put_side_by_side(parts: Sequence[TensorSource], axis: int) -> TensorSource:
    """A tensor [..., N] or [N, ...] of several encoded ones, by their outputs N."""
    encoders = [each.encode for each in parts if each.encode is not None]
    assert len(encoders) == len(parts), "tensors that are made, not encoded, stay apart"
    shape = list(parts[0].shape)
    width, outputs = shape[axis], sum(each.shape[axis] for each in parts)
    rows = math.prod(shape[:axis])
    shape[axis] = outputs

    def encode() -> npt.NDArray[np.uint8]:
        # One part after the other, so that no two are held beside the whole.
        piece = encoders[0]().view(np.uint8).reshape(rows, -1)
        whole = np.empty((rows, piece.shape[1] * outputs // width), np.uint8)
        start = piece.shape[1]
        whole[:, :start] = piece
        for take in encoders[1:]:
            piece = take().view(np.uint8).reshape(rows, -1)
            whole[:, start : start + piece.shape[1]] = piece
            start += piece.shape[1]
        return whole.reshape(-1)

    return TensorSource(
        shape=tuple(shape),
        inputs=tuple(dict.fromkeys(each for part in parts for each in part.inputs)),
        dtype=parts[0].dtype,
        encode=encode,
    )
