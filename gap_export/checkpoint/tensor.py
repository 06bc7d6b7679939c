"""A tensor in a file: where it lies, and how its values are read."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gap_export.errors import CheckpointError
from gap_runtime.bundle.tensors import ITEM_BYTES
from gap_runtime.records.files import open_file

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorLocation:
    """A tensor in a file; `offset` in bytes from the start of the file.

    `shown` is how errors name the file: in its folder, where `file` may be a cache's blob.
    `strides` are in elements; None where the values lie in order, as they do in safetensors.
    """

    key: str
    file: Path
    shown: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None

    @property
    def length(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def span(self) -> int:
        """Bytes of the file from the first value to the last; `length` where they lie in order."""
        if self.strides is None:
            return self.length
        steps = zip(self.shape, self.strides, strict=True)
        return (1 + sum((size - 1) * step for size, step in steps)) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileIndex:
    """Tensors of one file, and the dtypes of those that no graph can use."""

    tensors: dict[str, TensorLocation]
    unreadable: dict[str, str]


def cut_rows(tensor: TensorLocation, start: int, stop: int) -> TensorLocation:
    """The place of some rows (first axis) of a tensor; of fewer where it ends before."""
    rows = tensor.shape[0]
    start, stop = min(start, rows), min(stop, rows)
    step = math.prod(tensor.shape[1:]) if tensor.strides is None else tensor.strides[0]
    return replace(
        tensor,
        offset=tensor.offset + start * step * ITEM_BYTES[tensor.dtype],
        shape=(stop - start, *tensor.shape[1:]),
    )


def read_tensor(tensor: TensorLocation) -> torch.Tensor:
    """One tensor's values; read, not mapped, so that its memory is given back.

    Raises:
        CheckpointError: The file has become shorter.
    """
    import torch  # noqa: PLC0415 - slow to import, and an index needs none of it

    data = torch.empty(tensor.span, dtype=torch.uint8)
    with open_file(tensor.file, CheckpointError) as file:
        file.seek(tensor.offset)
        # Straight into the tensor's memory, which every reader of bytes can.
        read = file.readinto(data.numpy().data)  # type: ignore[attr-defined]
    if read != tensor.span:
        raise CheckpointError(
            f"{tensor.shown}: ends inside tensor '{tensor.key}'; was it changed while in use?"
        )
    values = data.view(getattr(torch, tensor.dtype))
    if tensor.strides is None:
        return values.reshape(tensor.shape)
    return values.as_strided(tensor.shape, tensor.strides).contiguous()
