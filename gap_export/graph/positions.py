"""The position mapping: which ID and which order every slot of the prompt gets.

    mode              visual slots hold     visual IDs        text after      first new ID
    gap               raster order I        s + I[r]          s + N + j       s + N + t
    compact           raster order I        s + r             s + K + j       s + K + t
    permuted          pruner's order J      s + I[r]          s + N + j       s + N + t
    permuted-compact  pruner's order J      s + r             s + K + j       s + K + t

s tokens before the picture, N patches, K kept, t tokens after. The first new ID is one more
than the last prompt token's, so the runtime counts on from there in every mode.

References:
    Grounding-Aware Token Pruning, arXiv:2506.21873. The ablation modes' formulas are ours.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from gap_runtime.layout import TokenLayout

# B batch (1), K kept, S prompt slots.

_RASTER: Final = frozenset({"gap", "compact"})
_COMPACT: Final = frozenset({"compact", "permuted-compact"})


def keeps_raster_order(mode: str) -> bool:
    """Whether kept patches lie in the order that they had before pruning."""
    return mode in _RASTER


def sort_ascending(index_BK: Tensor) -> Tensor:
    """Indices in ascending order.

    ONNX has no sort, so the K smallest of K are taken; float32 holds indices up to 2**24.
    """
    values = torch.topk(index_BK.to(torch.float32), index_BK.shape[1], largest=False).values
    return values.to(torch.int64)


def map_positions(layout: TokenLayout, raster_BK: Tensor, mode: str) -> Tensor:
    """Position IDs of all slots of the longest prompt, int64 [B, S].

    Args:
        layout: Token counts; without extra tokens.
        raster_BK: Kept patches in ascending order.
        mode: One of the modes above.
    """
    if mode in _COMPACT:
        return torch.arange(layout.prompt)[None]
    before = torch.arange(layout.prefix)[None]
    after = layout.prefix + layout.patches + torch.arange(layout.suffix)[None]
    return torch.cat([before, layout.prefix + raster_BK, after], dim=1)
