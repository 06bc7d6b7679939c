"""What graphs say of quantized weights: a product that dequantizes in place of a linear layer.

In the graph a weight is a standard DequantizeLinear before a MatMul, which TensorRT builds as it
is and onnxruntime fuses to one kernel; in a dialect that has that kernel, blocks are written for
it at once, so that loading rearranges nothing.

    Gemm(x, W, b)  -> Add(MatMul(x, DequantizeLinear(values, scales, zeros)), b)
                   -> Add(MatMulNBits(x, values, scales, zeros), b)
                   -> Add(MatMulNBits(x, values, Expand(scales)), b)    one scale for each output

Where values lie in the order in which a method sorted the inputs, x is Gather(x, order) besides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Final

import numpy as np
import onnx_ir as ir

from gap_export.interfaces.dialect import FUSED
from gap_export.quantization.scheme import ORDER, SCALES, VALUES, Scheme
from gap_export.tracing.graph import Traced, strip_stage

_ROUNDED_INPUTS: Final = 4
"""MatMulNBits' accuracy level at which inputs are rounded to 8 bits, each row in blocks."""


def quantize_graph(traced: Traced, schemes: Mapping[str, Scheme]) -> Traced:
    """Put quantized weights in place of those of linear layers.

    Args:
        traced: A graph, which is changed; its linear layers are Gemm with weights [out, in].
        schemes: Of weights, by canonical name; others stay.

    Returns:
        The graph with its new parameters.
    """
    graph = traced.model.graph
    found: dict[str, Scheme] = {}
    for node in list(graph):
        weight = node.inputs[1] if node.op_type == "Gemm" else None
        if weight is None or weight.name not in traced.parameters:
            continue
        scheme = schemes.get(strip_stage(weight.name))
        if scheme is None:
            continue
        assert node.attributes.get_int("transB", 0) == 1
        found[weight.name] = scheme
        _replace_gemm(graph, node, weight, scheme)
    new = set()
    for name, scheme in found.items():
        weight = graph.initializers.pop(name)
        new |= {name + suffix for suffix in scheme.tensors(_static_shape(weight), "")}
    graph.sort()
    parameters = (traced.parameters - set(found)) | new
    return dataclasses.replace(traced, parameters=frozenset(parameters))


def _static_shape(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None
    return tuple(int(size) for size in value.shape)  # type: ignore[arg-type]


def _dequantize(
    before: ir.Node, weight: ir.Value, scheme: Scheme, found: dict[str, ir.Value]
) -> ir.Node:
    """The node that gives a weight [in, out] from what stands for it."""
    outputs, inputs = _static_shape(weight)
    attributes = {"axis": 1} if scheme.block is None else {"axis": 0, "block_size": scheme.block}
    node = ir.node(
        "DequantizeLinear", list(found.values()), attributes, name=f"{before.name}/weight"
    )
    result = node.outputs[0]
    result.name = f"{before.outputs[0].name}.weight"
    result.shape, result.type = ir.Shape((inputs, outputs)), found[SCALES].type
    return node


def _declare(graph: ir.Graph, name: str, shape: tuple[int, ...], dtype: ir.DataType) -> ir.Value:
    """An initializer without a value, once for all who use it."""
    if name not in graph.initializers:
        graph.initializers[name] = ir.Value(
            name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape)
        )
    return graph.initializers[name]


def _replace_gemm(graph: ir.Graph, gemm: ir.Node, weight: ir.Value, scheme: Scheme) -> None:
    """A product and a sum instead of a Gemm, of inputs in the weight's own order."""
    x, old = gemm.inputs[0], gemm.outputs[0]
    assert x is not None
    assert weight.dtype is not None
    bias = gemm.inputs[2] if len(gemm.inputs) > 2 else None
    tensors = scheme.tensors(_static_shape(weight), weight.dtype.name)
    found = {
        suffix: _declare(graph, f"{weight.name}{suffix}", shape, ir.DataType[dtype.upper()])
        for suffix, (dtype, shape) in tensors.items()
    }
    order = found.pop(ORDER, None)
    nodes = []
    if order is not None:
        gather = ir.node("Gather", [x, order], {"axis": 1}, name=f"{gemm.name}/order")
        gather.outputs[0].name = f"{old.name}.ordered"
        gather.outputs[0].shape, gather.outputs[0].type = x.shape, x.type
        nodes, x = [gather], gather.outputs[0]
    if scheme.is_fused:
        if scheme.block is None:
            blocks = tensors[VALUES][1][1]
            nodes.append(spread_scales(graph, found[SCALES], blocks, gemm.name or ""))
            found[SCALES] = nodes[-1].outputs[0]
        product = _fuse(gemm, x, weight, scheme, found)
    else:
        # One for each use: kernels fuse it with the product, and TensorRT dies of a shared one.
        nodes.append(_dequantize(gemm, weight, scheme, found))
        product = ir.node("MatMul", [x, nodes[-1].outputs[0]], name=gemm.name)
    nodes.append(product)
    result = product.outputs[0]
    result.name, result.shape, result.type = old.name, old.shape, old.type
    if bias is not None:
        result.name = f"{old.name}.product"
        added = ir.node("Add", [result, bias], name=f"{gemm.name}/bias")
        added.outputs[0].name, added.outputs[0].shape = old.name, old.shape
        added.outputs[0].type = old.type
        nodes.append(added)
    ir.convenience.replace_nodes_and_values(
        graph, gemm, [gemm], nodes, [old], [nodes[-1].outputs[0]]
    )


def spread_scales(graph: ir.Graph, scales: ir.Value, blocks: int, scope: str) -> ir.Node:
    """The scale of each output [out, 1] for each of its blocks; runtimes do it when they load."""
    shape = (_static_shape(scales)[0], blocks)
    name = f"blocks.{shape[0]}.{shape[1]}"
    if name not in graph.initializers:
        graph.initializers[name] = ir.Value(
            name=name,
            type=ir.TensorType(ir.DataType.INT64),
            shape=ir.Shape([len(shape)]),
            const_value=ir.tensor(np.array(shape), name=name),
        )
    node = ir.node("Expand", [scales, graph.initializers[name]], name=f"{scope}/scales")
    node.outputs[0].name = f"{scope}.scales"
    node.outputs[0].shape, node.outputs[0].type = ir.Shape(shape), scales.type
    return node


def _fuse(
    gemm: ir.Node, x: ir.Value, weight: ir.Value, scheme: Scheme, found: dict[str, ir.Value]
) -> ir.Node:
    """The product with what stands for a weight, in one node."""
    outputs, inputs = _static_shape(weight)
    domain, _, op_type = FUSED.rpartition(".")
    assert gemm.graph is not None
    gemm.graph.opset_imports.setdefault(domain, 1)
    return ir.node(
        op_type,
        [x, *found.values()],
        {
            "K": inputs,
            "N": outputs,
            "bits": scheme.bits,
            "block_size": scheme.kernel_block,
            "accuracy_level": _ROUNDED_INPUTS,
        },
        domain=domain,
        name=gemm.name,
    )
