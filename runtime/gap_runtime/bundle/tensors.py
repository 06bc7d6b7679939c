"""What a tensor is called, holds and means; no values, no library."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

Dtype = Literal["float32", "float16", "bfloat16", "int64", "int32", "int8", "bool"]
"""What inputs and outputs of graphs may be."""

ITEM_BYTES: Final = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int8": 1,
    "bool": 1,
}
"""Bytes per element of every dtype that graphs and bundles use, whole bytes only."""

_WEIGHT_BITS: Final = {"int4": 4, "uint4": 4, "uint8": 8}
"""Bits of the dtypes that only quantized weights have."""

FREE_ROWS: Final = "rows"
"""The free dimension of the decoder: how many rows a call has."""
FREE_LOGITS: Final = "wanted_rows"
"""Its second one: of how many of them the logits are wanted."""
MOST_LOGITS: Final = 8
"""Rows whose logits one call gives at most: a token that was chosen, and a draft of others."""


def count_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Size of a tensor as it is stored; values of 4 bits lie two in a byte."""
    values = math.prod(shape)
    if dtype in _WEIGHT_BITS:
        return -(-values * _WEIGHT_BITS[dtype] // 8)
    return values * ITEM_BYTES[dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """An input or output of a stage. A dimension is an integer, or a name where it is free."""

    name: str
    dtype: Dtype
    shape: tuple[int | str, ...]
    meaning: str

    def shape_at(self, rows: int) -> tuple[int, ...]:
        """The shape in a call of a fixed number of rows, which gives as many logits as it may."""
        sizes = {FREE_ROWS: rows, FREE_LOGITS: min(rows, MOST_LOGITS)}
        return tuple(sizes[size] if isinstance(size, str) else size for size in self.shape)

    def fixed_shape(self) -> tuple[int, ...]:
        """The shape of a tensor that has no free dimension."""
        return tuple(int(size) for size in self.shape)

    def count_bytes(self) -> int:
        """Size of a tensor that has no free dimension."""
        return count_bytes(self.fixed_shape(), self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor that lies in a file as raw little-endian values from `offset` (bytes) on."""

    file: str
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def length(self) -> int:
        """Size in bytes."""
        return count_bytes(self.shape, self.dtype)
