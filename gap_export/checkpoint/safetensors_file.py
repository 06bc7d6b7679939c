"""Tensors of a safetensors file, by its header alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

from gap_export.checkpoint.folder import refuse_pointer
from gap_export.checkpoint.tensor import FileIndex, TensorLocation
from gap_export.errors import CheckpointError
from gap_runtime.records.files import SMALL_BYTES, open_file
from gap_runtime.records.plain import parse_json

_DTYPES: Final = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "BOOL": "bool",
}


def index_safetensors_file(path: Path, shown: Path) -> FileIndex:
    """Tensors of one safetensors file, which must be as long as its header says.

    The safetensors library does not tell where a tensor lies in the file, so the header (its
    length in 8 bytes, then JSON) is read here.
    """
    advice = "the file is cut short or no safetensors file; download it again"
    with open_file(path, CheckpointError, advice="download it again") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(64)
        refuse_pointer(head, shown)
        start = 8 + int.from_bytes(head[:8], "little")
        file.seek(8)
        if size < 8 or start > size:
            raise CheckpointError(f"{shown}: {size} bytes hold no complete header; {advice}")
        if start > SMALL_BYTES:
            raise CheckpointError(f"{shown}: a header of {start:,} bytes; {advice}")
        header = parse_json(
            file.read(start - 8), f"{shown}: its header cannot be read", CheckpointError, advice
        )
        try:
            entries = {key: value for key, value in header.items() if key != "__metadata__"}
            spans = {key: _read_span(entry) for key, entry in entries.items()}
            end = start + max((last for _, last in spans.values()), default=0)
            tensors = {
                key: TensorLocation(
                    key=key,
                    file=path,
                    shown=shown,
                    offset=start + spans[key][0],
                    dtype=_DTYPES[entry["dtype"]],
                    shape=tuple(map(_read_whole, entry["shape"])),
                )
                for key, entry in entries.items()
                if entry["dtype"] in _DTYPES
            }
            # Quantized or index tensors that no graph asks for are no reason to stop.
            unreadable = {
                key: str(entry["dtype"]) for key, entry in entries.items() if key not in tensors
            }
        except (ValueError, AttributeError, LookupError, TypeError) as error:
            raise CheckpointError(f"{shown}: its header cannot be read; {advice}") from error
    if end != size:
        raise CheckpointError(f"{shown}: {size} bytes, expected {end}; {advice}")
    for key, tensor in tensors.items():
        first, last = spans[key]
        if min(tensor.shape, default=0) < 0 or tensor.length != last - first:
            raise CheckpointError(
                f"{shown}: tensor '{key}' of shape {list(tensor.shape)} lies in "
                f"{last - first} bytes; {advice}"
            )
    return FileIndex(tensors=tensors, unreadable=unreadable)


def _read_span(entry: Any) -> tuple[int, int]:
    """First byte and end of a tensor's values, counted from the header's end."""
    first, last = map(_read_size, entry["data_offsets"])
    if first > last:
        raise ValueError(f"values from {first} to {last}")
    return first, last


def _read_size(value: Any) -> int:
    """A number of bytes."""
    size = _read_whole(value)
    if size < 0:
        raise ValueError(f"{size} bytes")
    return size


def _read_whole(value: Any) -> int:
    """A whole number that a machine can hold."""
    if type(value) is not int or abs(value) >= 2**63:
        raise TypeError(f"{value!r:.40} is no whole number")
    return value
