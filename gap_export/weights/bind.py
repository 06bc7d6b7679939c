"""Graphs and weight files joined: which parameters graphs use, and where each points."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir

from gap_export.tracing.trace import Traced
from gap_export.weights.plan import WeightPlan


def bind_weights(traced: Traced, plan: WeightPlan, folder: Path) -> None:
    """Point a graph's initializers at the files of the bundle folder."""
    for initializer in traced.model.graph.initializers.values():
        name = initializer.name
        assert name is not None
        if name not in traced.parameters:
            continue
        place = plan.placed[strip_stage(name)]
        initializer.const_value = ir.ExternalTensor(
            location=place.file,
            offset=place.offset,
            length=place.length,
            dtype=ir.DataType["FLOAT" if place.dtype == "float32" else place.dtype.upper()],
            shape=ir.Shape(place.shape),
            name=name,
            base_dir=folder,
        )


def wanted_shapes(traced: Iterable[Traced]) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter that the graphs use, by canonical name."""
    wanted: dict[str, tuple[int, ...]] = {}
    for graph in traced:
        for initializer in graph.model.graph.initializers.values():
            if initializer.name in graph.parameters:
                assert initializer.shape is not None
                shape = tuple(int(size) for size in initializer.shape)  # type: ignore[arg-type]
                wanted[strip_stage(initializer.name)] = shape
    return wanted


def strip_stage(name: str) -> str:
    """Canonical name of a parameter: its path without the stage's own attribute."""
    return name.partition(".")[2]
