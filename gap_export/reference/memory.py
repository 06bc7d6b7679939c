"""What the reference takes of this machine's memory, and whether its weights can all be there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gap_export.checkpoint.sources import TensorSource
from gap_export.errors import ExportError
from gap_export.interfaces.family import ModelSpec
from gap_runtime.bundle.tensors import ITEM_BYTES
from gap_runtime.display import format_bytes
from gap_runtime.machines.memory import free_memory

REFERENCE_DTYPE: Final = "float32"
_MIB: Final = 2**20
WORK_BYTES: Final = 192 * _MIB
"""What tracing or asking takes at least, besides the libraries, which are loaded by now."""
_MOST_KEPT_BYTES: Final = 512 * _MIB
"""Weights of a reference that is read layer by layer that stay in memory."""
_KEPT_SHARE: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNeed:
    """What a reference takes of memory, in bytes.

    `weights` are all of them, `layers` is the least where they are read layer by layer.
    `kept_mib` is the setting `check.memory_mib`, of the checkpoint in `folder`.
    """

    folder: Path
    weights: int
    layers: int
    kept_mib: int | None

    def settle(self, otherwise: str) -> int | None:
        """Compare it with the memory that is free.

        Args:
            otherwise: What to do on, where it is not enough: "use".

        Returns:
            Bytes of weights that may stay in memory while they are read layer by layer; None
            where all of them fit.

        Raises:
            ExportError: There is not enough even so.
        """
        free = free_memory()
        if self.kept_mib is None and self.weights + WORK_BYTES <= free:
            return None
        if self.layers > free:
            raise ExportError(
                f"{self.folder}: PyTorch's reference in {REFERENCE_DTYPE} takes "
                f"{format_bytes(self.weights)} of memory, layer by layer "
                f"{format_bytes(self.layers)}, and {format_bytes(free)} is free; {otherwise} a "
                "larger machine"
            )
        if self.kept_mib is not None:
            return self.kept_mib * _MIB
        return min(free // _KEPT_SHARE, _MOST_KEPT_BYTES)

    def describe(self, kept: int) -> str:
        """Why weights are read layer by layer, for people; `kept` bytes of them stay."""
        why = f"{format_bytes(free_memory())} of memory is free"
        if self.kept_mib is not None:
            why = "check.memory_mib is set"
        return (
            f"PyTorch's weights take {format_bytes(self.weights)} in {REFERENCE_DTYPE}, {why}: "
            f"they are read layer by layer for every token, and {format_bytes(kept)} of them kept"
        )


def measure_memory(
    sources: Mapping[str, TensorSource],
    spec: ModelSpec,
    *,
    embedding: str,
    slots: int,
    folder: Path,
    kept_mib: int | None,
) -> MemoryNeed:
    """What the reference of a checkpoint takes.

    Args:
        sources: All tensors of the model by name.
        spec: Facts about the model.
        embedding: Name of the table that is read row by row.
        slots: Of the longest prompt and answer.
        folder: Of the checkpoint.
        kept_mib: The setting `check.memory_mib`.
    """
    sizes = {name: float_bytes(source) for name, source in sources.items()}
    largest = max(size for name, size in sizes.items() if name != embedding)
    decoder = spec.decoder
    rows = 2 * decoder.layers * decoder.cache_heads * decoder.head_dim
    return MemoryNeed(
        folder=folder,
        weights=sum(sizes.values()),
        layers=WORK_BYTES + largest + slots * rows * ITEM_BYTES[REFERENCE_DTYPE],
        kept_mib=kept_mib,
    )


def float_bytes(source: TensorSource) -> int:
    """Bytes of a tensor in float32."""
    return math.prod(source.shape) * ITEM_BYTES[REFERENCE_DTYPE]
