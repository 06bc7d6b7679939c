"""The decoder as onnxruntime's CUDA runs it in one CUDA graph; all else as in `onnxruntime`.

A CUDA graph launches what was once recorded: nothing of a step may be computed on the CPU. So the
length of the cache that `GroupQueryAttention` is told on the host is a constant, its capacity; the
slots in use, which it reads on the device, are counted there and not from a tensor's shape. Its
kernel of a step counts positions by slot, so that queries and keys are turned before it.

Patches are cut and multiplied, as onnxruntime's only kernel of a convolution on CUDA is cuDNN's,
several hundred megabytes for one operator.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from gap_export.dialects import native, onnxruntime
from gap_export.interfaces.dialect import Rows, multiply_patches

# B batch (1), S rows, L cache slots, d head width.

OPSETS: Final = onnxruntime.OPSETS
OPERATORS: Final = onnxruntime.OPERATORS
FUSES_WHOLE: Final = False
"""Its kernels for 8 bits were not tried."""

rms_norm = onnxruntime.rms_norm
attend = onnxruntime.attend_turned
takes_int8_cache = onnxruntime.takes_int8_cache
translate_attention: Final = onnxruntime.translate_attention
translate_convolution: Final = multiply_patches


def plan_rows(rows: Rows, cache_BGLd: Tensor) -> tuple[Tensor, ...]:
    """Slots in use after the run, less one [B], and the capacity as a scalar, both int32."""
    if not onnxruntime.fuses_attention(cache_BGLd.shape[-1]):
        return native.plan_rows(rows, cache_BGLd)
    first_BS = rows.cosine_BSd[..., 0]
    # As many ones as there are rows: their number itself would be a shape, known to the CPU.
    count_B = torch.eq(first_BS, first_BS).to(torch.int32).sum(1, dtype=torch.int32)
    last_B = rows.write_slot_B.to(torch.int32) + count_B - 1
    return last_B, torch.scalar_tensor(cache_BGLd.shape[2], dtype=torch.int32)
