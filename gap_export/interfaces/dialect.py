"""What a dialect is: the operators that graphs are written in, for a kind of runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from torch import Tensor

# B batch (1), S rows, H query heads, G key/value heads, L cache slots, D width, d head width,
# P positions, E = H * d, F = G * d; V views, C width of a tower, p side of a patch, h and w
# patches of a column and a row.

FUSED: Final = "com.microsoft.MatMulNBits"
"""onnxruntime's product with weights in blocks, by its full name."""
ATTENTION: Final = "com.microsoft.GroupQueryAttention"
"""onnxruntime's attention on a KV cache, by its full name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RotaryTables:
    """Cosines and sines of every position, d / 2 columns of float32, and the rows' positions."""

    cosine_Pd: Tensor
    sine_Pd: Tensor
    position_BS: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What turns the rows of one run, and the cache slot that the first of them goes to.

    Cosines and sines, d / 2 columns of float32, were chosen by position already. `tables` are
    what they were chosen from; None where a token has several positions.
    """

    cosine_BSd: Tensor
    sine_BSd: Tensor
    write_slot_B: Tensor
    tables: RotaryTables | None = None


class Dialect(Protocol):
    """A module in gap_export.dialects."""

    OPSETS: frozenset[int]
    """Versions of the standard operators that it can be written in."""

    OPERATORS: frozenset[str]
    """All operators that its graphs may hold."""

    FUSES_WHOLE: bool
    """Whether products with 8-bit weights that have one scale for each output are FUSED too."""

    def rms_norm(self, x_SD: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        """Root-mean-square norm over the last dimension, computed in float32."""

    def takes_int8_cache(self, head_dim: int) -> bool:
        """Whether its attention can read and write a KV cache of int8, heads being so wide."""

    def plan_rows(self, rows: Rows, cache_BGLd: Tensor) -> tuple[Tensor, ...]:
        """What attention of every layer needs to know of the rows, computed once for all.

        Args:
            rows: Where the rows belong.
            cache_BGLd: Any of the caches; all are alike.
        """

    def attend(
        self,
        query_SE: Tensor,
        key_SF: Tensor,
        value_SF: Tensor,
        cache: tuple[Tensor, Tensor],
        rows: Rows,
        planned: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Causal grouped attention on a cache of fixed capacity.

        Queries and keys are turned, keys and values written from the write slot
        on, and every row sees its own slot and those before it.

        Args:
            query_SE: Of all query heads, side by side.
            key_SF: Of all key heads.
            value_SF: Of all key heads.
            cache: Keys and values so far, each [B, G, L, d].
            rows: Where the rows belong.
            planned: What `plan_rows` gave.

        Returns:
            The mixed values [S, E], and both caches written.
        """

    translate_attention: Callable[..., Any] | None
    """A tower's attention in operators: (op, query, key, value, mask, scale) -> value.

    `op` is an ONNX builder, queries, keys and values are [B, H, T, d], `mask` is added to the
    scaled scores, None where there is none. None leaves it to torch's converter.
    """

    translate_convolution: Callable[..., Any] | None
    """A tower's patch embedding in operators: (op, pixels, weight, bias) -> grid.

    Pixels are [V, 3, height, width], weights [C, 3, p, p], the grid [V, C, height / p, width / p];
    patches do not overlap. None leaves it to torch's converter, a `Conv`.
    """


def split_heads(x_SE: Tensor, head_dim: int) -> Tensor:
    """[S, heads * d] to [B, heads, S, d]."""
    # The number of heads as it is: TensorRT does not find it beside rows that are free.
    heads = x_SE.shape[1] // head_dim
    return x_SE.reshape(1, x_SE.shape[0], heads, head_dim).transpose(1, 2)


def merge_heads(x_BHSd: Tensor) -> Tensor:
    """[B, heads, S, d] to [S, heads * d]."""
    return x_BHSd.transpose(1, 2).flatten(2).squeeze(0)


def slot_causal_mask(rows: Rows, slots: int) -> Tensor:
    """Boolean mask [B, 1, S, L]: a row sees its own slot and those before it.

    Slots, not positions: padded prompt rows lie behind the real ones and stay unseen.
    """
    row_slot_BS = rows.write_slot_B[:, None] + torch.arange(rows.cosine_BSd.shape[1])
    return torch.arange(slots) <= row_slot_BS[:, None, :, None]


def multiply_patches(op: Any, pixels: Any, weight: Any, bias: Any) -> Any:
    """A patch embedding as one product: [V, 3, h * p + i, w * p + j] to [V, C, h, w].

    Pixels behind the last whole patch, i < p rows and j < p columns, are not seen, as in a
    convolution: SigLIP's pictures have sides of 384 and patches of 14. The kernel of a
    convolution whose patches do not overlap is the matrix [C, 3 * p * p] as it lies in the file:
    a row of it runs over channels, then rows, then columns, as patches do.
    """
    import onnx_ir as ir  # noqa: PLC0415 - a plan asks dialects, and needs no ONNX

    width, channels, side, _ = weight.shape
    views, _, height, length = pixels.shape
    rows, columns, inner = height // side, length // side, channels * side * side

    def reshape(x: Any, *shape: int) -> Any:
        result = op.Reshape(x, op.Constant(value_ints=list(shape)))
        result.shape, result.dtype = ir.Shape(shape), weight.dtype
        return result

    whole = rows * side, columns * side
    if whole != (height, length):
        starts, ends, axes = (op.Constant(value_ints=list(x)) for x in ((0, 0), whole, (2, 3)))
        pixels = op.Slice(pixels, starts, ends, axes)
        pixels.shape, pixels.dtype = ir.Shape([views, channels, *whole]), weight.dtype
    cut = reshape(pixels, views, channels, rows, side, columns, side)
    patches = reshape(op.Transpose(cut, perm=[0, 2, 4, 1, 3, 5]), views * rows * columns, inner)
    product = op.Gemm(patches, reshape(weight, width, inner), bias, transB=1)
    product.shape, product.dtype = ir.Shape([views * rows * columns, width]), weight.dtype
    return op.Transpose(reshape(product, views, rows, columns, width), perm=[0, 3, 1, 2])
