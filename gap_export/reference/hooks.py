"""What modules of the library give while it runs, written down."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def record_outputs(modules: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """A list of the modules' outputs, in the order in which they run.

    Args:
        modules: For example what makes the queries [V, T, C] of each block.
    """
    outputs: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda _m, _i, output: outputs.append(output))
        for module in modules
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
