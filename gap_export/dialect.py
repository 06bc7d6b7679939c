"""What a dialect is: the operators that graphs are written in, for a kind of runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

# B batch (1), S rows, H query heads, G key/value heads, L cache slots, P positions, D width,
# d head width.


class Dialect(Protocol):
    """A module in gap_export.dialects."""

    OPSETS: frozenset[int]
    """Versions of the standard operators that it can be written in."""

    OPERATORS: frozenset[str]
    """All operators that its graphs may hold."""

    def rms_norm(self, x_BSD: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        """Root-mean-square norm over the last dimension, computed in float32."""

    def rotate(
        self, x_BHSd: Tensor, cosine_Pd: Tensor, sine_Pd: Tensor, position_ids_BS: Tensor
    ) -> Tensor:
        """Rotary embedding by position ID; tables hold head_dim / 2 columns."""

    def write_cache(self, cache_BGLd: Tensor, update_BGSd: Tensor, write_slot_B: Tensor) -> Tensor:
        """The cache with rows written from a slot on."""

    def attend(
        self, query_BHSd: Tensor, key_BGLd: Tensor, value_BGLd: Tensor, mask_BHSL: Tensor
    ) -> Tensor:
        """Grouped attention over the whole cache with a boolean mask."""

    translate_attention: Callable[..., Any] | None
    """A tower's attention in operators: (op, query, key, value, mask, scale) -> value.

    `op` is an ONNX builder, queries, keys and values are [B, H, T, d], `mask` is added to the
    scaled scores, None where there is none. None leaves it to torch's converter.
    """
