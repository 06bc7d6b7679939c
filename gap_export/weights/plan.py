"""Where every weight of a bundle will lie, settled from indices alone.

A graph's initializers point into weight files beside it. A tensor that has the wanted dtype is
used as it lies in the checkpoint's own file, which is brought into the bundle whole; the others
are converted, or made of several, one by one into a new safetensors file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gap_export.checkpoint.index import Checkpoint, TensorLocation
from gap_export.checkpoint.sources import TensorSource
from gap_runtime.bundle.tensors import StoredTensor, count_bytes

_SAFETENSORS: Final = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "int8": "I8",
    "uint8": "U8",
}
_PACKED: Final = "U8"
"""What the library's format calls values that share bytes: it has no 4-bit numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightPlan:
    """Where every tensor will lie: `shards` are brought as they are, `made` written anew."""

    dtype: str
    placed: dict[str, StoredTensor]
    shards: dict[str, Path]
    made: dict[str, TensorSource]
    made_file: str

    @property
    def size(self) -> int:
        """Bytes of all weight files."""
        return sum(self.file_sizes().values())

    def file_sizes(self) -> dict[str, int]:
        """Size in bytes of every weight file of the bundle."""
        sizes = {name: path.stat().st_size for name, path in self.shards.items()}
        if self.made:
            last = self.placed[next(reversed(self.made))]
            sizes[self.made_file] = last.offset + last.length
        return sizes


def plan_weights(
    checkpoint: Checkpoint,
    sources: dict[str, TensorSource],
    wanted: dict[str, tuple[int, ...]],
    *,
    dtype: str,
) -> WeightPlan:
    """Decide where every wanted tensor comes from and goes to.

    Args:
        checkpoint: The index of tensors, with its parts.
        sources: Where each tensor of the model comes from.
        wanted: Shape of each tensor that is needed.
        dtype: That the graphs want.
    """
    used = {name: sources[name] for name in wanted}
    assert all(used[name].shape == shape for name, shape in wanted.items())
    names = _file_names(checkpoint)
    whole = {file: names[file] for file in sorted(_worthwhile_files(used.values(), dtype))}
    # A tensor that stands in under several names is written once.
    first: dict[int | TensorLocation, str] = {}
    made: dict[str, TensorSource] = {}
    places: dict[str, str] = {}
    for name, source in used.items():
        if not (lies_ready(source, dtype) and source.inputs[0].file in whole):
            lies = source.make is None and source.encode is None
            identity = source.inputs[0] if lies else id(source)
            places[name] = first.setdefault(identity, name)
            made[places[name]] = source
    made_file = f"weights-{dtype}.safetensors"
    new = _made_places(made, dtype, made_file)
    placed = {
        name: new[places[name]]
        if name in places
        else StoredTensor(
            file=whole[source.inputs[0].file],
            offset=source.inputs[0].offset,
            dtype=dtype,
            shape=source.shape,
        )
        for name, source in used.items()
    }
    return WeightPlan(
        dtype=dtype,
        placed=placed,
        shards={name: file for file, name in whole.items()},
        made=made,
        made_file=made_file,
    )


def lies_ready(source: TensorSource, dtype: str) -> bool:
    """Whether a tensor can be used as it lies in the checkpoint's own file."""
    return (
        source.make is None
        and source.encode is None
        and source.inputs[0].dtype == dtype
        and source.inputs[0].strides is None
    )


def _file_names(checkpoint: Checkpoint) -> dict[Path, str]:
    """Names of the checkpoint's files in the bundle, by their real place.

    As in the checkpoint folder, not as in a blob store behind it; those of parts with the role.
    """
    names: dict[Path, str] = {}
    for role, each in (("", checkpoint), *sorted(checkpoint.parts.items())):
        shown = {path.resolve(): path.name for path in each.folder.iterdir() if path.is_file()}
        for file in {tensor.file for tensor in each.tensors.values()} - set(names):
            name = shown.get(file, file.name)
            names[file] = f"{role}-{name}" if role else name
    return names


def _worthwhile_files(sources: Iterable[TensorSource], dtype: str) -> set[Path]:
    """Files of which at least half is used as it lies; out of others, tensors are copied."""
    used = {source.inputs[0] for source in sources if lies_ready(source, dtype)}
    lengths: dict[Path, int] = {}
    for tensor in used:
        lengths[tensor.file] = lengths.get(tensor.file, 0) + tensor.length
    return {file for file, length in lengths.items() if 2 * length >= file.stat().st_size}


def _made_places(made: dict[str, TensorSource], dtype: str, file: str) -> dict[str, StoredTensor]:
    """Where the tensors will lie that are written anew."""
    offset = len(make_header(made, dtype))
    places = {}
    for name, source in made.items():
        places[name] = StoredTensor(
            file=file, offset=offset, dtype=source.dtype or dtype, shape=source.shape
        )
        offset += places[name].length
    return places


def make_header(made: dict[str, TensorSource], dtype: str) -> bytes:
    """The safetensors header of tensors that are made, in their order.

    The library itself can only write files that it holds in memory.
    """
    entries, offset = {}, 0
    for name, source in made.items():
        kind = source.dtype or dtype
        length = count_bytes(source.shape, kind)
        entries[name] = {
            "dtype": _SAFETENSORS.get(kind, _PACKED),
            "shape": list(source.shape) if kind in _SAFETENSORS else [length],
            "data_offsets": [offset, offset + length],
        }
        offset += length
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
