"""Farthest points, one after another: one operator while a module is traced, three nodes a point.

The loop has as many rounds as points are chosen, often a thousand and more, and torch would pass
over every operator of it many times. As an operator of its own it is passed over once.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from gap_export.tracing.graph import typed

# N points, K chosen ones, B batch (1).


@torch.library.custom_op("gap::choose_farthest", mutates_args=())
def choose_farthest(distance_NN: Tensor, first_B1: Tensor, count: int) -> Tensor:
    """Points in the order of choice [B, K]: each the farthest from those before it.

    A tie goes to the lower index. A point is chosen again only if its distance to itself is not
    the least of all.

    Args:
        distance_NN: Of each point to each, in any measure.
        first_B1: The first point, int64.
        count: K, at least 1.
    """
    chosen, nearest_B1N = [first_B1], None
    for _ in range(1, count):
        row_B1N = distance_NN[chosen[-1]]
        nearest_B1N = row_B1N if nearest_B1N is None else torch.minimum(nearest_B1N, row_B1N)
        chosen.append(nearest_B1N.argmax(dim=-1))
    return torch.cat(chosen, dim=1)


@choose_farthest.register_fake
def _(distance_NN: Tensor, first_B1: Tensor, count: int) -> Tensor:
    del distance_NN
    return first_B1.new_empty((first_B1.shape[0], count))


def translate_farthest(op: Any, distance_NN: Any, first_B1: Any, count: int) -> Any:
    """The nodes of `choose_farthest`: a Gather, a Min and an ArgMax for each point.

    Args:
        op: The standard operators of an opset.
        distance_NN: As there, like all else.
        first_B1: As there.
        count: As there.
    """
    points = distance_NN.shape[0]
    chosen, nearest_B1N = [first_B1], None
    for _ in range(1, count):
        row_B1N = typed(op.Gather(distance_NN, chosen[-1]), distance_NN.dtype, 1, 1, points)
        nearest_B1N = (
            row_B1N
            if nearest_B1N is None
            else typed(op.Min(nearest_B1N, row_B1N), distance_NN.dtype, 1, 1, points)
        )
        best_B1 = op.ArgMax(nearest_B1N, axis=-1, keepdims=0)
        chosen.append(typed(best_B1, ir.DataType.INT64, 1, 1))
    return op.Concat(*chosen, axis=1)
