"""What modules of the library give while it runs, written down."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def record_outputs(
    blocks: Iterable[tuple[nn.Module, nn.Module]],
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Two lists, of the outputs of the first and of the second module of every block, in order.

    Args:
        blocks: For example what makes queries and what makes keys [V, T, C] of each block.
    """
    first: list[Tensor] = []
    second: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda _m, _i, out, record=record: record.append(out))
        for pair in blocks
        for module, record in zip(pair, (first, second), strict=True)
    ]
    try:
        yield first, second
    finally:
        for handle in handles:
            handle.remove()
