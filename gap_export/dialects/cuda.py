"""The decoder as onnxruntime's CUDA runs it in one CUDA graph; all else as in `onnxruntime`.

A CUDA graph launches what was once recorded: nothing of a step may be computed on the CPU. So the
length of the cache that `GroupQueryAttention` is told on the host is a constant, its capacity; the
slots in use, which it reads on the device, are counted there and not from a tensor's shape.

Patches are cut and multiplied, as onnxruntime's only kernel of a convolution on CUDA is cuDNN's,
several hundred megabytes for one operator.
"""

from __future__ import annotations

from typing import Any, Final

import onnx_ir as ir
import torch
from torch import Tensor

from gap_export.dialects import native, onnxruntime
from gap_export.interfaces.dialect import Rows

# B batch (1), S rows, L cache slots, d head width, V views, C width, p side of a patch, h and w
# patches of a column and a row.

OPSETS: Final = onnxruntime.OPSETS
OPERATORS: Final = onnxruntime.OPERATORS

rms_norm = onnxruntime.rms_norm
attend = onnxruntime.attend
translate_attention: Final = onnxruntime.translate_attention


def plan_rows(rows: Rows, cache_BGLd: Tensor) -> tuple[Tensor, ...]:
    """Slots in use after the run, less one [B], and the capacity as a scalar, both int32."""
    if not onnxruntime.fuses_attention(cache_BGLd):
        return native.plan_rows(rows, cache_BGLd)
    first_BS = rows.cosine_BSd[..., 0]
    # As many ones as there are rows: their number itself would be a shape, known to the CPU.
    count_B = torch.eq(first_BS, first_BS).to(torch.int32).sum(1, dtype=torch.int32)
    last_B = rows.write_slot_B.to(torch.int32) + count_B - 1
    return last_B, torch.scalar_tensor(cache_BGLd.shape[2], dtype=torch.int32)


def translate_convolution(op: Any, pixels: Any, weight: Any, bias: Any) -> Any:
    """A patch embedding as one product: [V, 3, h * p, w * p] to [V, C, h, w].

    The kernel of a convolution whose patches do not overlap is the matrix [C, 3 * p * p] as it
    lies in the file: a row of it runs over channels, then rows, then columns, as patches do.
    """
    width, channels, side, _ = weight.shape
    views, _, height, length = pixels.shape
    rows, columns, inner = height // side, length // side, channels * side * side

    def reshape(x: Any, *shape: int) -> Any:
        result = op.Reshape(x, op.Constant(value_ints=list(shape)))
        result.shape, result.dtype = ir.Shape(shape), weight.dtype
        return result

    cut = reshape(pixels, views, channels, rows, side, columns, side)
    patches = reshape(op.Transpose(cut, perm=[0, 2, 4, 1, 3, 5]), views * rows * columns, inner)
    product = op.Gemm(patches, reshape(weight, width, inner), bias, transB=1)
    product.shape, product.dtype = ir.Shape([views * rows * columns, width]), weight.dtype
    return op.Transpose(reshape(product, views, rows, columns, width), perm=[0, 3, 1, 2])
