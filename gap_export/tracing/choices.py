"""Choices of many points: one node while a graph is made and tidied, written out at its end.

    Choose(distance, first, count=648) -> Gather, Gather, Min, ArgMax, ... , Concat

Each pass over a graph takes time for every node, and such a choice has thousands, which no pass
has anything to do for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypedDict, Unpack

import onnx_ir as ir
from onnx_ir import tape
from onnx_ir.passes import common
from torch.onnx._internal.exporter import _core

from gap_export.tracing.determinantal import translate_determinantal
from gap_export.tracing.farthest import translate_farthest

_DOMAIN: Final = "gap"
_TRANSLATIONS: Final[dict[str, Callable[..., Any]]] = {
    "ChooseFarthest": translate_farthest,
    "ChooseDeterminantal": translate_determinantal,
}


class _Attributes(TypedDict, total=False):
    """Those that choices are written with."""

    axis: int
    keepdims: int
    alpha: float
    transA: int
    value_float: float
    value_ints: list[int]


class _Operators:
    """The standard operators by their names; nodes come one behind the other."""

    def __init__(self) -> None:
        """Nothing was called yet."""
        self.tape = tape.Tape()

    def __getattr__(self, operator: str) -> Callable[..., ir.Value]:
        """What makes a node of an operator."""

        def make(*inputs: ir.Value, **attributes: Unpack[_Attributes]) -> ir.Value:
            given = dict[str, Any](attributes.items())
            return self.tape.op(operator, inputs, attributes=given)

        return make


def choose_farthest_whole(distance: Any, first: Any, count: int) -> ir.Value:
    """`gap_export.tracing.farthest.choose_farthest` as one node of the graph that is made."""
    return _call("ChooseFarthest", [distance, first], {"count": count})


def choose_determinantal_whole(
    cosine: Any, left: Any, weight: Any, count: int, least: float
) -> ir.Value:
    """`gap_export.tracing.determinantal.choose_determinantal` as one node, likewise."""
    numbers = {"count": count, "least": least}
    return _call("ChooseDeterminantal", [cosine, left, weight], numbers)


def write_out(model: ir.Model) -> None:
    """Put the standard operators in the place of every choice."""
    graph = model.graph
    found = [node for node in graph if node.domain == _DOMAIN and node.op_type in _TRANSLATIONS]
    for node in found:
        op, (before,) = _Operators(), node.outputs
        numbers = {name: each.value for name, each in node.attributes.items()}
        result = _TRANSLATIONS[node.op_type](op, *node.inputs, **numbers)
        for made in op.tape.nodes:
            # Whose the nodes are, which their names are made of.
            made.metadata_props.update(node.metadata_props)
        graph.insert_after(node, op.tape.nodes)
        result.dtype, result.shape = before.dtype, before.shape
        ir.convenience.replace_all_uses_with(before, result, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        result.name = before.name
    if found:
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        common.RemoveUnusedOpsetsPass()(model)


def _call(name: str, inputs: Sequence[Any], attributes: Mapping[str, float]) -> ir.Value:
    tracer = _core.current_tracer
    assert tracer is not None
    made = ir.convenience.convert_attributes(attributes)
    node = ir.Node(_DOMAIN, name, inputs, attributes=made, version=1)
    tracer.nodes.append(node)
    return node.outputs[0]
