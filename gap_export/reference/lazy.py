"""Tensors that are made when they are asked for, and what is merged of several.

What is added to a weight (differences, LoRA) is said here once, for models in memory and for
those that are read layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

# S rows that are asked for.


@dataclass(frozen=True, slots=True, kw_only=True)
class LazyTensor:
    """A tensor of the model, made when it is asked for.

    `length` is its number of rows. `read` gives it whole and `rows` those of an index [S], both in
    the model's dtype and in memory of their own, which may be changed.
    """

    length: int
    read: Callable[[], Tensor]
    rows: Callable[[Tensor], Tensor]


def change_tensor(tensor: LazyTensor, change: Callable[[Tensor], Tensor]) -> LazyTensor:
    """A tensor that something is done to as a whole."""
    return LazyTensor(
        length=tensor.length,
        read=lambda: change(tensor.read()),
        rows=lambda index: change(tensor.read())[index],
    )


def sum_tensors(first: LazyTensor, second: LazyTensor) -> LazyTensor:
    """`first` with `second`, which may have fewer rows, added to its first rows."""

    def read() -> Tensor:
        made, more = first.read(), second.read()
        made[: len(more)] += more
        return made

    def rows(index_S: Tensor) -> Tensor:
        made, both = first.rows(index_S), index_S < second.length
        made[both] += second.rows(index_S[both])
        return made

    return LazyTensor(length=first.length, read=read, rows=rows)


def add_product(tensor: LazyTensor, up: LazyTensor, down: LazyTensor, scale: float) -> LazyTensor:
    """A weight with `scale * up @ down` added, as LoRA's two matrices are."""

    def add(weight: Tensor) -> Tensor:
        weight += up.read() @ down.read() * scale
        return weight

    return change_tensor(tensor, add)


def rename_tensors(
    tensors: Mapping[str, LazyTensor], prefixes: Mapping[str, str]
) -> dict[str, LazyTensor]:
    """Tensors by other names: the first of the prefixes that a key has is replaced."""
    renamed = {}
    for key, tensor in tensors.items():
        old = next((each for each in prefixes if key.startswith(each)), "")
        renamed[prefixes.get(old, "") + key.removeprefix(old)] = tensor
    return renamed
