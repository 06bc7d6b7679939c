"""Tensors of a safetensors file, by its header alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from gap_export.checkpoint.tensor import FileIndex, TensorLocation
from gap_export.errors import CheckpointError

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
    size = path.stat().st_size
    advice = "the file is cut short or no safetensors file; download it again"
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if size < 8 or start > size:
            raise CheckpointError(f"{shown}: {size} bytes hold no complete header; {advice}")
        try:
            header = json.loads(file.read(start - 8))
            entries = {key: value for key, value in header.items() if key != "__metadata__"}
            end = start + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
            tensors = {
                key: TensorLocation(
                    key=key,
                    file=path,
                    shown=shown,
                    offset=start + entry["data_offsets"][0],
                    dtype=_DTYPES[entry["dtype"]],
                    shape=tuple(entry["shape"]),
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
        first, last = entries[key]["data_offsets"]
        if min(tensor.shape, default=0) < 0 or tensor.length != last - first:
            raise CheckpointError(
                f"{shown}: tensor '{key}' of shape {list(tensor.shape)} lies in "
                f"{last - first} bytes; {advice}"
            )
    return FileIndex(tensors=tensors, unreadable=unreadable)
