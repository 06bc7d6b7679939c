"""Where a bundle's numbers stop being finite: the first tensor, and the node that made it.

float16 holds nothing above 65,504, so a model that was trained in bfloat16 or float32 may overflow
in it. Every floating-point tensor of a graph is looked at, in the order of the graph.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from PIL import Image

from gap_runtime.bundle.bundle import Bundle
from gap_runtime.bundle.manifest import RatioEntry, Stage
from gap_runtime.grounding.grounder import Grounder

_FLOATS: Final = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
_AT_ONCE: Final = 64
"""Tensors that are looked at in one run, so that memory does not grow with the graph."""

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class BadTensor:
    """The first tensor that is not finite: in which graph, made by which node."""

    stage: str
    tensor: str
    node: str

    def __str__(self) -> str:
        """For an error message."""
        return f"{self.stage}: tensor '{self.tensor}' of node '{self.node}'"


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """The first tensor that is not finite; null where all are."""

    bad: BadTensor | None


def find_bad_tensor(
    bundle: Bundle, picture: Image.Image, phrase: str, entry: RatioEntry
) -> BadTensor | None:
    """The first tensor that is not finite for a picture and a phrase; None where all are.

    Raises:
        EngineError: onnxruntime cannot run the graphs.
    """
    try:
        Grounder(bundle, _Watch(), ratio=entry.ratio).run_stages(picture, phrase, entry, most=1)
    except _FoundError as found:
        return found.tensor
    return None


class _FoundError(Exception):
    """Carries what was found out of the stages."""

    def __init__(self, tensor: BadTensor) -> None:
        self.tensor = tensor


class _Watch:
    """A backend that looks at all that the graphs compute; fits gap_runtime.backends.Backend."""

    def open_stage(self, bundle: Bundle, stage: Stage, device: str) -> _WatchedStage:
        del device
        return _WatchedStage(bundle, stage)

    def open_decoder(self, bundle: Bundle, stage: Stage, device: str) -> _WatchedDecoder:
        del device
        return _WatchedDecoder(bundle, stage)


class _WatchedStage:
    """A graph that is run a few tensors at a time."""

    def __init__(self, bundle: Bundle, stage: Stage) -> None:
        self._bundle, self._stage = bundle, stage

    def run(self, inputs: Arrays) -> Arrays:
        return run_watched(self._bundle.folder / self._stage.file, self._stage, inputs)


class _WatchedDecoder:
    """The decoder with an empty cache; one call is all that is asked of it."""

    def __init__(self, bundle: Bundle, stage: Stage) -> None:
        self._bundle, self._stage = bundle, stage

    def fit(self, rows: int) -> int:
        """Any number of rows will do."""
        return rows

    def run(
        self,
        embeddings: np.ndarray,
        position_ids: np.ndarray,
        write_slot: int,
        logits_rows: np.ndarray,
    ) -> np.ndarray:
        caches = {
            spec.name: np.zeros([int(size) for size in spec.shape], spec.dtype)
            for spec in self._stage.inputs
            if spec.name.startswith("cache_")
        }
        given = {
            "embeddings": embeddings,
            "position_ids": position_ids,
            "write_slot": np.array([write_slot]),
            "logits_rows": logits_rows,
        }
        path = self._bundle.folder / self._stage.file
        logits: np.ndarray = run_watched(path, self._stage, given | caches)["logits"]
        return logits


def run_watched(path: Path, stage: Stage, inputs: Arrays) -> Arrays:
    """The graph's outputs by name, once all that it computes is known to be finite."""
    model = ir.load(path)
    graph = model.graph
    outputs = list(graph.outputs)
    made_by = {
        value.name: node
        for node in graph
        for value in node.outputs
        if value.dtype in _FLOATS and value.name is not None
    }
    names = list(made_by)
    for start in range(0, len(names), _AT_ONCE):
        wanted = names[start : start + _AT_ONCE]
        values = {value.name: value for node in graph for value in node.outputs}
        graph.outputs.clear()
        graph.outputs.extend(values[name] for name in wanted)
        with _written_beside(model, path) as copy:
            found = _run(copy, inputs, wanted)
        for name, value in found.items():
            # Rows behind the prompt are padding, and slots behind them empty: both stay finite.
            if not np.isfinite(value).all():
                node = made_by[name]
                raise _FoundError(
                    BadTensor(stage=stage.name, tensor=name, node=f"{node.name} ({node.op_type})")
                )
    graph.outputs.clear()
    graph.outputs.extend(outputs)
    return _run(path, inputs, [spec.name for spec in stage.outputs])


def _run(path: Path, inputs: Arrays, names: list[str]) -> Arrays:
    ort: Any = import_module("onnxruntime")
    options = ort.SessionOptions()
    # What it would log of an error it raises as well, which is one line of ours.
    options.log_severity_level = 4
    # Fused kernels would keep what is between them to themselves.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    known = {each.name for each in session.get_inputs()}
    given = {name: value for name, value in inputs.items() if name in known}
    return dict(zip(names, session.run(names, given), strict=True))


@contextmanager
def _written_beside(model: ir.Model, path: Path) -> Iterator[Path]:
    """A changed graph in the bundle's folder, where its weights are, for as long as it is used."""
    copy = path.with_name(f".probe-{os.getpid()}.onnx")
    try:
        ir.save(model, copy)
        yield copy
    finally:
        copy.unlink(missing_ok=True)
