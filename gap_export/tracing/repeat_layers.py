"""A stack of many layers from the graph of few: its layers are alike but for their names.

Tracing takes time and memory for every layer. So few are traced, and one of them is copied node
by node: what an export costs hardly depends on the depth of the model.

    h1 = layer.0(x), h2 = layer.1(h1), y = layer.2(h2)
      -> h1 = layer.0(x), h2 = layer.1(h1), h3 = layer.2(h2), ..., y = layer.N(hN)

Layers 2 to N - 1 are copies of layer 1 with parameters, inputs and outputs of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Final

import onnx_ir as ir

from gap_export.tracing.graph import Traced
from gap_runtime.bundle.tensors import TensorSpec

_COPIED: Final = 1


def repeat_layer(
    traced: Traced,
    stack: str,
    more: int,
    *,
    inputs: Sequence[TensorSpec] = (),
    outputs: Sequence[TensorSpec] = (),
) -> Traced:
    """Put copies of the second layer of a stack behind it; later layers are numbered anew.

    Args:
        traced: A graph, which is changed.
        stack: Path of the list of layers, for example `decoder.language_model.layers`.
        more: How many copies.
        inputs: Of the graph that the copies have for themselves, copy by copy; the second layer
            is the last then, and its own are the last of the graph.
        outputs: Likewise.
    """
    if not more:
        return traced
    graph = traced.model.graph
    parameters = _renumber(traced, stack, more)
    layer = _find_layer(traced, stack, len(inputs) // more)
    hidden, place = layer.result, layer.result.producer()
    assert place is not None
    # What reads the result of the layer shall read that of its last copy.
    readers = [use for use in hidden.uses() if use.node not in layer.nodes]
    for k in range(more):
        path = f"{stack}.{_COPIED + 1 + k}"
        own = [
            each[k * len(each) // more : (k + 1) * len(each) // more] for each in (inputs, outputs)
        ]
        nodes, hidden = _copy(graph, layer, path, hidden, *own)
        graph.insert_after(place, nodes)
        place = nodes[-1]
        parameters |= {f"{path}.{_tail(name, layer.path)}" for name in layer.parameters}
    for node, index in readers:
        node.replace_input_with(index, hidden)
    return dataclasses.replace(
        traced,
        inputs=(*traced.inputs, *inputs),
        outputs=(*traced.outputs, *outputs),
        parameters=frozenset(parameters),
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """The part of a graph that is one layer: `entry` and `result` join it to its neighbours."""

    path: str
    nodes: dict[ir.Node, None]
    parameters: tuple[str, ...]
    entry: ir.Value
    result: ir.Value
    inputs: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]


def _renumber(traced: Traced, stack: str, more: int) -> set[str]:
    """Make room for copies in the names of a graph; the names of its parameters then."""
    graph = traced.model.graph

    def rename(name: str) -> str:
        if not name.startswith(f"{stack}."):
            return name
        number, mark, rest = _split(_tail(name, stack))
        later = number > _COPIED
        return f"{stack}.{number + more}{mark}{rest}" if later else name

    for node in graph:
        node.name = rename(node.name or "")
    # The last first, so that no name is taken.
    for name in sorted(graph.initializers, reverse=True):
        if name in traced.parameters and rename(name) != name:
            value = graph.initializers.pop(name)
            value.name = rename(name)
            graph.initializers[value.name] = value
    return {rename(name) for name in traced.parameters}


def _find_layer(traced: Traced, stack: str, own: int) -> _Layer:
    """The second layer by the names of its nodes, proved to meet its neighbours in one value."""
    graph, path, before = traced.model.graph, f"{stack}.{_COPIED}", f"{stack}.{_COPIED - 1}"
    nodes = {node: None for node in graph if _is_below(node.name, path)}
    made = [value for node in nodes for value in node.outputs]
    taken = {value: None for node in nodes for value in node.inputs if value is not None}
    earlier = _reached(graph, _below(traced, before))
    entries = [v for v in taken if v in earlier and v.producer() not in nodes]
    # A cache that is written is an output of the graph besides being read in its layer.
    exits = [v for v in made if any(use.node not in nodes for use in v.uses())]
    inputs = tuple(graph.inputs[len(graph.inputs) - own :])
    outputs = tuple(graph.outputs[len(graph.outputs) - own :])
    assert len(entries) == len(exits) == 1, (path, entries, exits)
    assert {v for v in made if v.is_graph_output()} == set(outputs), path
    parameters = _below(traced, path)
    for value in (*inputs, *(v for v in taken if v.name in parameters)):
        assert all(use.node in nodes for use in value.uses()), value
    return _Layer(
        path=path,
        nodes=nodes,
        parameters=tuple(parameters),
        entry=entries[0],
        result=exits[0],
        inputs=inputs,
        outputs=outputs,
    )


def _copy(
    graph: ir.Graph,
    layer: _Layer,
    path: str,
    hidden: ir.Value,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
) -> tuple[list[ir.Node], ir.Value]:
    """The nodes of one more layer that reads `hidden`, and its result."""
    known = {layer.entry: hidden}
    for value, spec in zip(layer.inputs, inputs, strict=True):
        known[value] = _like(value, spec.name)
        graph.inputs.append(known[value])
    for name in layer.parameters:
        if name in graph.initializers:
            value, new = graph.initializers[name], f"{path}.{_tail(name, layer.path)}"
            known[value] = graph.initializers[new] = _like(value, new)
    names = {value: spec.name for value, spec in zip(layer.outputs, outputs, strict=True)}
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
    graph.outputs.extend(known[value] for value in layer.outputs)
    return nodes, known[layer.result]


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


def _split(text: str) -> tuple[int, str, str]:
    """A number, the dot or slash behind it, and the rest."""
    digits = text[: len(text) - len(text.lstrip("0123456789"))]
    return int(digits), text[len(digits) : len(digits) + 1], text[len(digits) + 1 :]


def _is_below(name: str | None, path: str) -> bool:
    """Whether a node comes from the module at a path, or from one in it."""
    return name is not None and name.startswith((f"{path}.", f"{path}/"))
