"""What TensorRT's parser takes of a graph, and what room a build needs; imports no library."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gap_runtime.bundle.bundle import Bundle
from gap_runtime.bundle.manifest import Stage
from gap_runtime.bundle.onnx_file import OnnxFile, OnnxNode, read_onnx
from gap_runtime.display import format_bytes
from gap_runtime.errors import BundleError, EngineError
from gap_runtime.machines.memory import free_memory
from gap_runtime.machines.target import Target

_SPARE_BYTES: Final = 512 * 2**20
"""What a build takes whatever the model: the library, its kernels and its tables."""
_PLAN_SHARE: Final = 1.1
"""Size of an engine by that of its weights; the rest are kernels."""

# The first opset that has an operator which older TensorRTs do not read.
_SINCE: Final = {
    "Gelu": 20,
    "Attention": 23,
    "RMSNormalization": 23,
    "RotaryEmbedding": 23,
    "Swish": 24,
    "TensorScatter": 24,
}
_OPEN_OPERATORS: Final = frozenset(
    {"Compress", "If", "Loop", "NonMaxSuppression", "NonZero", "Scan", "Unique"}
)
"""Control flow, and operators whose output's size depends on values."""

_IGNORED: Final = {("Attention", 6): "nonpad_kv_seqlen"}
"""Inputs, by operator and place, that TensorRT's parser takes and leaves out without a word."""


def read_graph(bundle: Bundle, stage: Stage, target: Target) -> OnnxFile:
    """The skeleton of a stage's graph, proved to be one that the target can build.

    Raises:
        EngineError: An input that nothing reads, an operator or an opset outside the target's.
        BundleError: A weight file is missing or too short.
    """
    path = bundle.folder / stage.file
    graph = read_onnx(path)
    opset = graph.opsets.get("", 0)
    if opset > target.opset:
        raise EngineError(
            f"{path}: opset {opset}, target '{target.name}' reads {target.opset} at most; export "
            f"again with gap-export MODEL --target {target.name}"
        )
    if graph.unused:
        raise EngineError(
            f"{path}: nothing reads the input '{graph.unused[0]}', so an engine would ignore it; "
            "export again"
        )
    for node in graph.nodes:
        reason = _find_objection(node, target)
        if reason:
            raise EngineError(
                f"{path}: node '{node.name}' is {node.operator}, {reason}; export again with "
                f"gap-export MODEL --target {target.name}"
            )
    _require_weights(bundle, path, graph)
    return graph


def _find_objection(node: OnnxNode, target: Target) -> str:
    """Why a target cannot build a node; empty where it may."""
    if node.domain not in ("", "ai.onnx"):
        return f"of the domain '{node.domain}', which TensorRT does not know"
    if node.operator in _OPEN_OPERATORS:
        return "whose output has no fixed size"
    since = _SINCE.get(node.operator, 0)
    if since > target.opset:
        return f"of opset {since}, target '{target.name}' reads {target.opset}"
    ignored = (_IGNORED.get((node.operator, k)) for k, name in enumerate(node.inputs) if name)
    return next((f"with the input {name}, which TensorRT ignores" for name in ignored if name), "")


def _require_weights(bundle: Bundle, path: Path, graph: OnnxFile) -> None:
    sizes: dict[str, int] = {}
    for weight in graph.weights:
        if weight.file not in sizes:
            file = bundle.folder / weight.file
            if not file.is_file():
                raise BundleError(
                    f"{file}: missing, {path.name} has its weights there; copy the bundle again "
                    "or export again"
                )
            sizes[weight.file] = file.stat().st_size
        if weight.offset + weight.length > sizes[weight.file]:
            raise BundleError(
                f"{bundle.folder / weight.file}: {sizes[weight.file]} bytes, weight "
                f"'{weight.name}' ends at {weight.offset + weight.length}; copy the bundle again"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildNeeds:
    """Bytes that a build needs: host memory, memory of the GPU, and disk."""

    memory: int
    device: int
    disk: int


def estimate_build(graph: OnnxFile, target: Target) -> BuildNeeds:
    """What building one stage takes.

    The weights are held once as parsed and once in the finished engine; on the GPU once, beside
    the scratch memory that the target allows.
    """
    weights = graph.weight_bytes
    engine = round(weights * _PLAN_SHARE)
    scratch = (target.workspace_mib or 0) * 2**20
    return BuildNeeds(
        memory=weights + engine + _SPARE_BYTES,
        device=engine + min(scratch, _SPARE_BYTES),
        disk=engine + 2**24,
    )


def require_room(
    folder: Path,
    stage: str,
    needs: BuildNeeds,
    *,
    free_device: int | None = None,
    is_shared: bool = False,
) -> None:
    """Refuse a build that would run out of disk or memory.

    Args:
        folder: Where the engine will lie.
        stage: Its name.
        needs: Of its build.
        free_device: Bytes of the GPU's own memory that are free, if it has its own.
        is_shared: The GPU has none of its own, so that both needs are taken from the machine's.

    Raises:
        EngineError: With what is needed and what is free.
    """
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free_disk = shutil.disk_usage(there).free
    if free_disk < needs.disk:
        raise EngineError(
            f"{there}: {format_bytes(free_disk)} free, the engine of {stage} needs about "
            f"{format_bytes(needs.disk)}; make room, or move the bundle to a larger disk"
        )
    free = free_memory(swap=True)
    memory = needs.memory + (needs.device if is_shared else 0)
    if free < memory:
        raise EngineError(
            f"{stage}: {format_bytes(free)} of memory free, its build needs about "
            f"{format_bytes(memory)}; close other programs, add swap, or export with "
            "--quantize int4"
        )
    if free_device is not None and free_device < needs.device:
        raise EngineError(
            f"{stage}: {format_bytes(free_device)} of GPU memory free, its build needs about "
            f"{format_bytes(needs.device)}; close other programs, or export with --quantize int4"
        )
