"""Two graphs in a row as one: second(first(x), y), of the inputs x and y.

Values meet by name: what the first gives and the second does not take is dropped, what the second
takes and the first does not give is an input of the whole, behind the first's.
"""

from __future__ import annotations

import onnx_ir as ir

from gap_export.tracing.graph import Traced, named_values
from gap_export.tracing.tidy import tidy


def join(first: Traced, second: Traced) -> Traced:
    """Feed the outputs of a graph into another's inputs of the same names.

    Args:
        first: A graph, which becomes the whole.
        second: Another, which is used up; its nodes and values are called `prune.*`.
    """
    graph, rest = first.model.graph, second.model.graph
    given = {spec.name: value for spec, value in zip(first.outputs, graph.outputs, strict=True)}
    inputs = list(first.inputs)
    for value, spec in zip(list(rest.inputs), second.inputs, strict=True):
        if spec.name in given:
            ir.convenience.replace_all_uses_with(value, given[spec.name])
        else:
            rest.inputs.remove(value)
            graph.inputs.append(value)
            inputs.append(spec)
    kept_names = second.parameters | {spec.name for spec in (*second.outputs, *second.inputs)}
    for value in list(named_values(rest)):
        if value.name not in kept_names:
            value.name = f"prune.{value.name}"
    outputs = list(rest.outputs)
    rest.outputs.clear()
    for initializer in list(rest.initializers.values()):
        name = initializer.name
        assert name is not None
        rest.initializers.pop(name)
        graph.initializers[name] = initializer
    for node in list(rest):
        rest.remove(node)
        node.name = f"prune.{node.name}"
        graph.append(node)
    graph.outputs.clear()
    graph.outputs.extend(outputs)
    return tidy(
        Traced(
            model=first.model,
            inputs=tuple(inputs),
            outputs=second.outputs,
            parameters=first.parameters | second.parameters,
        ),
        is_folded=True,
    )
