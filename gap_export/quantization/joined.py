"""Tensors of several quantized weights as one of the file: they lie one behind the other.

A graph that takes them as one needs nothing joined when it is loaded. Outputs are the first axis
of what fused products read, so the bytes of one weight stand behind those of the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from gap_export.checkpoint.sources import TensorSource

_BETWEEN: Final = "+"
"""Between the names of the layers that a joined tensor is of."""
_WEIGHT: Final = ".weight"


def find_sources(
    names: Iterable[str], sources: Mapping[str, TensorSource]
) -> dict[str, TensorSource]:
    """Where the tensors of graphs come from, by name, in the graphs' order.

    Args:
        names: Of all tensors that graphs use, joined ones among them.
        sources: Of the tensors before any were joined.
    """
    return {
        name: sources[name]
        if name in sources
        else _put_in_a_row([sources[part] for part in list_parts(name)])
        for name in names
    }


def list_parts(name: str) -> list[str]:
    """Names of the tensors that a joined one, or one by itself, is made of.

    "a.q+k.weight.values" is made of "a.q.weight.values" and "a.k.weight.values".
    """
    path, _, suffix = name.rpartition(_WEIGHT)
    parent, dot, layers = path.rpartition(".")
    return [f"{parent}{dot}{layer}{_WEIGHT}{suffix}" for layer in layers.split(_BETWEEN)]


def are_neighbours(parts: Sequence[ir.Value | None], parameters: frozenset[str]) -> bool:
    """Whether tensors are of weights of one module, and each is for one product alone."""
    parents = set()
    for value in parts:
        if value is None or value.name not in parameters or len(list(value.uses())) > 1:
            return False
        path, weight, _ = value.name.rpartition(_WEIGHT)
        parents.add(path.rpartition(".")[0] if weight else value.name)
    return len(parents) == 1


def declare(graph: ir.Graph, parts: Sequence[ir.Value]) -> ir.Value:
    """An initializer [N, ...] without a value, in place of several by their outputs N."""
    first = parts[0]
    assert first.shape is not None
    paths = [str(each.name).rpartition(_WEIGHT) for each in parts]
    parent = paths[0][0].rpartition(".")[0]
    layers = _BETWEEN.join(path.rpartition(".")[2] for path, *_ in paths)
    value = ir.Value(
        name=f"{parent}.{layers}{_WEIGHT}{paths[0][2]}",
        type=first.type,
        shape=ir.Shape([sum(map(_outputs, parts)), *first.shape[1:]]),
    )
    graph.initializers[str(value.name)] = value
    return value


def _outputs(value: ir.Value) -> int:
    assert value.shape is not None
    return int(value.shape[0])  # type: ignore[arg-type]


def sort_by_use(graph: ir.Graph) -> None:
    """Put initializers, and so the file, in the order of layers, as checkpoints are read."""
    for node in graph:
        for value in node.inputs:
            if value is not None and value.is_initializer() and value.name:
                graph.initializers[value.name] = graph.initializers.pop(value.name)


def _put_in_a_row(parts: Sequence[TensorSource]) -> TensorSource:
    """A tensor [N, ...] of several encoded ones, by their outputs N."""
    encoders = [each.encode for each in parts if each.encode is not None]
    assert len(encoders) == len(parts), "tensors that are made, not encoded, stay apart"

    def encode() -> npt.NDArray[np.uint8]:
        return np.concatenate([each().view(np.uint8).reshape(-1) for each in encoders])

    first = parts[0]
    return TensorSource(
        shape=(sum(each.shape[0] for each in parts), *first.shape[1:]),
        inputs=tuple(dict.fromkeys(each for part in parts for each in part.inputs)),
        dtype=first.dtype,
        encode=encode,
    )
