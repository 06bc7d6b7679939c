"""What a graph takes and gives, held to the manifest when its session opens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gap_runtime.bundle.manifest import Stage
from gap_runtime.bundle.tensors import TensorSpec
from gap_runtime.errors import BundleError


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphTensor:
    """An input or output as a library has found it in a graph.

    A dimension is null where it is free; `dtype` is null where the library has a word of its own.
    """

    name: str
    dtype: str | None
    shape: tuple[int | None, ...]


def require_interface(
    path: Path, stage: Stage, inputs: Iterable[GraphTensor], outputs: Iterable[GraphTensor]
) -> None:
    """Refuse a graph whose inputs and outputs are not those that the manifest names.

    Args:
        path: Of the graph.
        stage: Its entry in the manifest.
        inputs: Of the graph.
        outputs: Of the graph.

    Raises:
        BundleError: With the first one that differs.
    """
    for what, specs, found in (
        ("input", stage.inputs, inputs),
        ("output", stage.outputs, outputs),
    ):
        wanted, held = {each.name: each for each in specs}, {each.name: each for each in found}
        lacking = sorted(wanted.keys() ^ held.keys())
        if lacking:
            where = "the manifest" if lacking[0] in wanted else "the graph"
            raise BundleError(f"{path}: {what} '{lacking[0]}' is in {where} alone; export again")
        for name, spec in wanted.items():
            if not _is_same(spec, held[name]):
                raise BundleError(
                    f"{path}: {what} '{name}' is {_describe(held[name].dtype, held[name].shape)}, "
                    f"the manifest says {_describe(spec.dtype, spec.shape)}; export again"
                )


def _is_same(spec: TensorSpec, found: GraphTensor) -> bool:
    shape = tuple(size if isinstance(size, int) else None for size in spec.shape)
    return shape == found.shape and found.dtype in {None, spec.dtype}


def _describe(dtype: str | None, shape: Iterable[int | str | None]) -> str:
    sizes = ", ".join("free" if size is None else str(size) for size in shape)
    return f"{dtype or ''} [{sizes}]".strip()
