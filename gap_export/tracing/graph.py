"""A traced graph, and the one form of all passes over it.

A pass is a function whose file says what becomes of which nodes:

    def a_pass(traced: Traced, ...) -> Traced

It changes the graph that it is given and gives the same graph with its interface and parameters
as they are then; what was passed in is not to be used again. Who needs a graph as it was takes a
`copy()` first. In this order:

    trace            module -> graph, tidied
    repeat_layers    few layers -> many
    join             tower, pruning stage -> vision graph
    quantize_graph   Gemm -> product that dequantizes
    keep_batch       Squeeze, Unsqueeze of the batch -> none
    pack_heads       products of queries, keys and values -> one
    quantize_cache   KV cache of the model's dtype -> of int8
    bind_weights     names -> places in files
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir

from gap_runtime.bundle.tensors import TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """A graph, its interface and the names of the initializers that have no values yet."""

    model: ir.Model
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parameters: frozenset[str]

    def copy(self) -> Traced:
        """The same with nodes of its own, for passes to change."""
        return replace(self, model=self.model.clone())


def strip_stage(name: str) -> str:
    """Canonical name of a graph's parameter: its path without the stage's own attribute."""
    return name.partition(".")[2]


def typed(value: Any, dtype: ir.DataType, *shape: int) -> Any:
    """The output of a node that is written by hand, with its dtype and shape."""
    value.dtype, value.shape = dtype, ir.Shape(shape)
    return value


def named_values(graph: ir.Graph) -> Iterator[ir.Value]:
    """Inputs, initializers and what nodes give."""
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs
