"""Graphs and weight files joined: which parameters graphs use, and where each points."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir

from gap_export.tracing.graph import Traced, strip_stage
from gap_export.weights.plan import WeightPlan


def bind_weights(traced: Traced, plan: WeightPlan, folder: Path) -> Traced:
    """Give each parameter of a graph the place of its values in the bundle's files.

    Args:
        traced: A graph, which is changed.
        plan: Where all values lie.
        folder: Of the bundle.
    """
    for initializer in traced.model.graph.initializers.values():
        name = initializer.name
        assert name is not None
        if name not in traced.parameters:
            continue
        place = plan.placed[strip_stage(name)]
        assert initializer.shape == place.shape, name
        initializer.const_value = ir.ExternalTensor(
            location=place.file,
            offset=place.offset,
            length=place.length,
            dtype=ir.DataType["FLOAT" if place.dtype == "float32" else place.dtype.upper()],
            shape=ir.Shape(place.shape),
            name=name,
            base_dir=folder,
        )
    return traced


def used_parameters(graphs: Iterable[Traced]) -> list[str]:
    """Canonical names of the parameters that graphs use, in the order in which they name them."""
    return list(
        dict.fromkeys(
            strip_stage(name)
            for traced in graphs
            for name in traced.model.graph.initializers
            if name in traced.parameters
        )
    )
