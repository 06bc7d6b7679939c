"""The KV cache of a decoder session: in one place, or in two that change sides.

The underscore keeps this file from being taken for a backend.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

import numpy as np

from gap_runtime.bundle.manifest import Stage
from gap_runtime.bundle.tensors import TensorSpec
from gap_runtime.errors import EngineError

M = TypeVar("M")
"""What a backend has of a tensor in its device's memory."""
_ALIGNMENT: Final = 64


def cache_specs(stage: Stage) -> list[TensorSpec]:
    """The inputs of a decoder graph that are its cache; the output of each is `next_<name>`."""
    return [spec for spec in stage.inputs if spec.name.startswith("cache_")]


def make_arrays(specs: Sequence[TensorSpec]) -> dict[str, np.ndarray]:
    """Zeroed arrays by name, side by side in one piece of memory.

    numpy asks the system for huge pages from 4 MiB on, which a single tensor of a cache seldom
    has; a step of a decoder reads them all.
    """
    sizes = [math.prod(spec.fixed_shape()) * np.dtype(spec.dtype).itemsize for spec in specs]
    places = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
    whole, arrays, start = np.zeros(sum(places), np.uint8), {}, 0
    for spec, size, place in zip(specs, sizes, places, strict=True):
        part = whole[start : start + size].view(spec.dtype)
        arrays[spec.name] = part.reshape(spec.fixed_shape())
        start += place
    return arrays


def require_room(write_slot: int, rows: int, capacity: int, where: str = "") -> None:
    """Refuse rows of a call that a cache has no slots for: a kernel would write behind it.

    Args:
        write_slot: The slot of the first row.
        rows: Of the call.
        capacity: Slots of the cache.
        where: What the message begins with.

    Raises:
        EngineError: They do not fit.
    """
    if write_slot < 0 or write_slot + rows > capacity:
        raise EngineError(
            f"{where}rows {write_slot} to {write_slot + rows - 1} do not fit the cache of "
            f"{capacity} slots"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotCopy(Generic[M]):
    """The first slots of every tensor, outside the cache; fits gap_runtime.backends.SavedSlots."""

    count: int
    tensors: dict[str, M]
    size: int


class KvCache(Generic[M]):
    """Memory of every tensor of the cache.

    A graph that writes its cache in place is given the same memory as input and as output. Any
    other makes a new cache of the old one, so there are two, which change sides at every call.
    """

    def __init__(
        self, stage: Stage, allocate: Callable[[TensorSpec], M], *, in_place: bool
    ) -> None:
        """Make it.

        Args:
            stage: The decoder's graph.
            allocate: Zeroed memory for a tensor: slots that are masked are still multiplied by 0.
            in_place: Whether the graph writes where it reads.
        """
        specs = cache_specs(stage)
        self._sides = [
            {spec.name: allocate(spec) for spec in specs} for _ in range(1 if in_place else 2)
        ]
        self.side = 0

    @property
    def sides(self) -> int:
        """How many places there are: 1 or 2."""
        return len(self._sides)

    def inputs(self, side: int) -> dict[str, M]:
        """What a call reads when that side is read, by the name of the graph's input."""
        return self._sides[side]

    def outputs(self, side: int) -> dict[str, M]:
        """What the same call writes, by the name of the graph's output."""
        written = self._sides[(side + 1) % self.sides]
        return {f"next_{name}": memory for name, memory in written.items()}

    def turn(self) -> None:
        """Read in the next call what was written in this one."""
        self.side = (self.side + 1) % self.sides
