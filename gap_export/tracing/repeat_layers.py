"""A stack of many layers from the graph of few: those that are alike are traced once.

Tracing takes time and memory for every layer. So layers that are proved to be like an earlier one
(gap_export.tracing.alike) are left out of what is traced: a single node stands for each run of
them, and gives way to copies of the earlier ones' nodes. What an export costs hardly depends on
the depth of the model. What cannot be proved is traced.

    h1 = layer.0(x), h2 = layer.1(h1), h3 = CopiedLayers(h2), y = rest(h3)
      -> h1 = layer.0(x), h2 = layer.1(h1), ..., hN = layer.N(h), y = rest(hN)

Copies have parameters, inputs and outputs of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_unflatten

from gap_export.interfaces.dialect import Dialect
from gap_export.tracing.alike import Copy, Joints, find_copies
from gap_export.tracing.graph import Traced
from gap_export.tracing.trace import trace
from gap_runtime.bundle.tensors import TensorSpec

_DOMAIN: Final = "gap"
_OPERATOR: Final = "CopiedLayers"
_RUN: Final = "layers"


def trace_stack(
    build: Callable[[], nn.Module],
    stack: str,
    *,
    dtype: str,
    dialect: Dialect,
    opset: int,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    finish: Callable[[nn.Module], None] | None = None,
    nested: int | None = None,
) -> Traced:
    """Trace a module with a stack of layers, as `gap_export.tracing.trace.trace` would.

    Args:
        build: As there, like all else.
        stack: Path of the list of layers, for example `decoder.language_model.layers`.
        dtype: Of the module's parameters.
        dialect: What the graph is written in.
        opset: One of the dialect's.
        inputs: Inputs by position.
        outputs: Outputs by position.
        finish: Gives values to buffers.
        nested: How many of the last inputs the module takes as one list.

    Raises:
        ExportError: torch.onnx could not trace it.
    """
    copies: dict[int, Copy] = {}

    def shorten(module: nn.Module, arguments: Sequence[Any]) -> None:
        copies.update(find_copies(module, stack, arguments))
        layers: Any = module.get_submodule(stack)
        for number, copy in copies.items():
            run = _find_run(copies, number)
            layers[number] = _Stub(layers[number], copy.layer, run)

    def go(before: Callable[[nn.Module, Sequence[Any]], None] | None) -> Traced:
        return trace(
            build,
            dtype=dtype,
            dialect=dialect,
            opset=opset,
            inputs=inputs,
            outputs=outputs,
            finish=finish,
            nested=nested,
            before=before,
        )

    traced = go(shorten)
    try:
        return repeat_layers(traced, stack, copies)
    except _JoinedError:
        return go(None)


class _JoinedError(Exception):
    """A layer's nodes in a graph are tied to others by more than one value."""


def _find_run(copies: Mapping[int, Copy], number: int) -> list[Copy]:
    """The copies that come one behind the other up to a layer; empty where it is not the last."""
    if copies[number].layer.is_chained and number + 1 in copies:
        return []
    first = number
    while first - 1 in copies and copies[first - 1].layer.is_chained:
        first -= 1
    return [copies[k] for k in range(first, number + 1)]


class _Stub(nn.Module):
    """Stands for a layer; the last of a run is a single operator, those before it are nothing.

    What others ask of the layer it has as well.
    """

    def __init__(self, layer: nn.Module, joints: Joints, run: Sequence[Copy]) -> None:
        """Stand for a layer, whose parameters are not this module's."""
        super().__init__()
        self.layer = (layer,)
        self.joints = joints
        self.run = [copy.layer.number for copy in run]

    def __getattr__(self, name: str) -> Any:
        """An attribute of the layer."""
        return getattr(self.__dict__["layer"][0], name)

    def forward(self, *args: Any) -> Any:
        """Results of the right shapes; outputs of the graph are replaced later."""
        leaves = tree_leaves(args)
        if self.run:
            hidden: Tensor = leaves[self.joints.hidden]
            leaves[self.joints.hidden] = torch.onnx.ops.symbolic(
                f"{_DOMAIN}::{_OPERATOR}",
                [hidden],
                {_RUN: self.run},
                dtype=hidden.dtype,
                shape=hidden.shape,
                version=1,
            )
        return tree_unflatten([leaves[place] for place in self.joints.like], self.joints.result)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """The part of a graph that is one layer: `given` and `results` join it to the others."""

    path: str
    nodes: dict[ir.Node, None]
    parameters: tuple[str, ...]
    given: tuple[ir.Value, ...]
    results: tuple[ir.Value, ...]


def repeat_layers(traced: Traced, stack: str, copies: Mapping[int, Copy]) -> Traced:
    """The graph with a copy of its source's nodes in place of every node that is a layer.

    Raises:
        _JoinedError: A source is tied to its neighbours by more than its proof knows.
    """
    graph = traced.model.graph
    layers: dict[int, _Layer] = {}
    parameters = set(traced.parameters)
    for stub in [node for node in graph if node.domain == _DOMAIN]:
        hidden, place = stub.inputs[0], stub
        assert hidden is not None
        for number in stub.attributes[_RUN].as_ints():
            copy, path = copies[number], f"{stack}.{number}"
            source = copy.source.number
            # Only now, as the copies before it have changed what it reads.
            if source not in layers:
                layers[source] = _find_layer(traced, stack, copy.source)
            nodes, hidden = _put_copy(traced, layers[source], copy, hidden, path)
            graph.insert_after(place, nodes)
            place = nodes[-1]
            below = layers[source].parameters
            parameters |= {f"{path}.{_tail(name, layers[source].path)}" for name in below}
        ir.convenience.replace_all_uses_with(stub.outputs[0], hidden)
        graph.remove(stub, safe=True)
    # An input that was passed on as an output took that one's name.
    for value, spec in zip(graph.inputs, traced.inputs, strict=True):
        value.name = spec.name
    common.RemoveUnusedNodesPass()(traced.model)
    common.RemoveUnusedOpsetsPass()(traced.model)
    return dataclasses.replace(traced, parameters=frozenset(parameters))


def _find_layer(traced: Traced, stack: str, joints: Joints) -> _Layer:
    """The source of a copy by the names of its nodes, held against the proof."""
    graph, path = traced.model.graph, f"{stack}.{joints.number}"
    parameters = _below(traced, path)
    nodes = {node: None for node in graph if _is_below(node.name, path)}
    made = [value for node in nodes for value in node.outputs]
    taken = {value: None for node in nodes for value in node.inputs if value is not None}
    earlier = _reached(
        graph, {name for k in range(joints.number) for name in _below(traced, f"{stack}.{k}")}
    )
    entries = [v for v in taken if v in earlier and v.producer() not in nodes]
    # A cache that is written is an output of the graph besides being read in its layer.
    exits = [v for v in made if any(use.node not in nodes for use in v.uses())]
    inputs = [graph.inputs[k] for k in joints.inputs]
    outputs = [graph.outputs[k] for k in joints.outputs if k is not None]
    own = [*inputs, *(v for v in taken if v.name in parameters)]
    if (
        len(entries) != 1
        or len(exits) != 1
        or {v for v in made if v.is_graph_output()} != set(outputs)
        or any(use.node not in nodes for value in own for use in value.uses())
    ):
        raise _JoinedError
    return _Layer(
        path=path,
        nodes=nodes,
        parameters=tuple(parameters),
        given=(entries[0], *inputs),
        results=tuple(exits[0] if k is None else graph.outputs[k] for k in joints.outputs),
    )


def _put_copy(
    traced: Traced, layer: _Layer, copy: Copy, hidden: ir.Value, path: str
) -> tuple[list[ir.Node], ir.Value]:
    """The nodes of one more layer that reads `hidden`, and its result."""
    graph = traced.model.graph
    inputs = [graph.inputs[k] for k in copy.layer.inputs]
    known = dict(zip(layer.given, (hidden, *inputs), strict=True))
    for name in layer.parameters:
        if name in graph.initializers:
            value, new = graph.initializers[name], f"{path}.{_tail(name, layer.path)}"
            known[value] = graph.initializers[new] = _like(value, new)
    ends = list(zip(layer.results, copy.layer.outputs, strict=True))
    names = {value: traced.outputs[k].name for value, k in ends if k is not None}
    nodes = []
    for node in layer.nodes:
        for value in node.outputs:
            known[value] = _like(value, names.get(value) or f"{path}.{value.name}")
        nodes.append(
            ir.Node(
                node.domain,
                node.op_type,
                [value if value is None else known.get(value, value) for value in node.inputs],
                node.attributes.values(),
                version=node.version,
                outputs=[known[value] for value in node.outputs],
                name=f"{path}{node.name[len(layer.path) :]}",  # type: ignore[index]
            )
        )
    for value, k in ends:
        if k is not None:
            graph.outputs[k] = known[value]
    return nodes, next(known[value] for value, k in ends if k is None)


def _like(value: ir.Value, name: str) -> ir.Value:
    return ir.Value(name=name, shape=value.shape, type=value.type)


def _reached(graph: ir.Graph, parameters: Collection[str]) -> set[ir.Value]:
    """Every value that depends on one of the parameters."""
    reached = {value for name, value in graph.initializers.items() if name in parameters}
    for node in graph:
        if any(value in reached for value in node.inputs):
            reached.update(node.outputs)
    return reached


def _below(traced: Traced, path: str) -> list[str]:
    """Parameters of the module at a path, sorted."""
    return sorted(name for name in traced.parameters if name.startswith(f"{path}."))


def _tail(name: str, path: str) -> str:
    return name[len(path) + 1 :]


def _is_below(name: str | None, path: str) -> bool:
    """Whether a node comes from the module at a path, or from one in it."""
    return name is not None and name.startswith((f"{path}.", f"{path}/"))
