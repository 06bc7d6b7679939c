"""A greedy determinantal choice: one operator while a module is traced, 15 nodes a point.

As for `farthest`: torch would pass over every operator of the unrolled loop many times.
"""

from __future__ import annotations

from typing import Any, Final

import onnx_ir as ir
import torch
from torch import Tensor

from gap_export.tracing.graph import typed

# N points, K chosen ones, B batch (1), S points chosen so far.

_CHOSEN: Final = -1.0
"""The weight of a point that is chosen: below that of any other."""


@torch.library.custom_op("gap::choose_determinantal", mutates_args=())
def choose_determinantal(
    cosine_NN: Tensor, left_BN: Tensor, weight_BN: Tensor, count: int, least: float
) -> Tensor:
    """Points in the order of choice [B, K], by a Cholesky factor that grows by a row for each.

    Always the one whose weight times what is left of it is most. A tie goes to the lower index.

    Args:
        cosine_NN: Of each point's direction with each.
        left_BN: What is left of each point's direction, before any is chosen.
        weight_BN: Of each point, at least 0.
        count: K, at least 1.
        least: What is always left of a direction.
    """
    index_N = torch.arange(cosine_NN.shape[0])
    chosen = [(weight_BN * left_BN).argmax(dim=-1)]
    factor_SN = cosine_NN[:0]
    while len(chosen) < count:
        last = chosen[-1]
        row_BN = torch.addmm(cosine_NN[last], factor_SN[:, last].T, factor_SN, alpha=-1)
        # A cosine by its nature; without the limit noise could grow beyond all bounds.
        row_BN = (row_BN / left_BN[:, last].sqrt()).clamp(-1.0, 1.0)
        factor_SN = torch.cat([factor_SN, row_BN])
        left_BN = (left_BN - row_BN * row_BN).clamp(min=least)
        weight_BN = torch.where(index_N == last, _CHOSEN, weight_BN)
        chosen.append((weight_BN * left_BN).argmax(dim=-1))
    return torch.stack(chosen, dim=1)


@choose_determinantal.register_fake
def _(cosine_NN: Tensor, left_BN: Tensor, weight_BN: Tensor, count: int, least: float) -> Tensor:
    del cosine_NN, weight_BN, least
    return left_BN.new_empty((left_BN.shape[0], count), dtype=torch.int64)


def translate_determinantal(
    op: Any, cosine_NN: Any, left_BN: Any, weight_BN: Any, count: int, least: float
) -> Any:
    """The nodes of `choose_determinantal`.

    Args:
        op: The standard operators of an opset.
        cosine_NN: As there, like all else.
        left_BN: As there.
        weight_BN: As there.
        count: As there.
        least: As there.
    """
    dtype, points = cosine_NN.dtype, cosine_NN.shape[0]

    def row(value: Any) -> Any:
        return typed(value, dtype, 1, points)

    def choose() -> Any:
        rated = row(op.Mul(weight_BN, left_BN))
        return typed(op.ArgMax(rated, axis=-1, keepdims=0), ir.DataType.INT64, 1)

    floor, spent, low, high = (
        op.Constant(value_float=each) for each in (least, _CHOSEN, -1.0, 1.0)
    )
    index_N = op.Constant(value_ints=list(range(points)))
    chosen, factor_SN = [choose()], None
    while len(chosen) < count:
        last, steps = chosen[-1], len(chosen) - 1
        row_BN = row(op.Gather(cosine_NN, last))
        if factor_SN is not None:
            own_SB = typed(op.Gather(factor_SN, last, axis=1), dtype, steps, 1)
            row_BN = row(op.Gemm(own_SB, factor_SN, row_BN, alpha=-1.0, transA=1))
        left_B1 = typed(op.Gather(left_BN, last, axis=1), dtype, 1, 1)
        root_B1 = typed(op.Sqrt(left_B1), dtype, 1, 1)
        row_BN = row(op.Clip(row(op.Div(row_BN, root_B1)), low, high))
        factor_SN = (
            row_BN
            if factor_SN is None
            else typed(op.Concat(factor_SN, row_BN, axis=0), dtype, steps + 1, points)
        )
        left_BN = row(op.Sub(left_BN, row(op.Mul(row_BN, row_BN))))
        left_BN = row(op.Clip(left_BN, floor))
        is_last = typed(op.Equal(index_N, last), ir.DataType.BOOL, points)
        weight_BN = row(op.Where(is_last, spent, weight_BN))
        chosen.append(choose())
    order_K = typed(op.Concat(*chosen, axis=0), ir.DataType.INT64, count)
    return op.Reshape(order_K, op.Constant(value_ints=[1, count]))
