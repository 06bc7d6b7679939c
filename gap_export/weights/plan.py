"""Where every weight of a bundle will lie, settled from indices alone.

A graph's initializers point into weight files beside it. A tensor that has the wanted dtype is
used as it lies in the checkpoint's own file, which is brought into the bundle whole; the others
are converted, or made of several, one by one into a new safetensors file.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from gap_export.checkpoint.index import Checkpoint
from gap_export.checkpoint.sources import TensorSource
from gap_export.checkpoint.tensor import TensorLocation
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

    @property
    def made_file(self) -> str:
        """Name of the file of tensors that are written anew."""
        return f"weights-{self.dtype}.safetensors"

    @property
    def ready(self) -> set[str]:
        """Names of the tensors that are used as they lie in a file that is brought whole."""
        return {name for name, place in self.placed.items() if place.file in self.shards}

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

    def lay_out(self, sources: Mapping[str, TensorSource]) -> WeightPlan:
        """The same files with what is known once graphs are traced and PyTorch was asked.

        Args:
            sources: How each tensor is made, in the order in which graphs name them, which is
                the one that they are written in. A tensor that is not among them is left out.
        """
        ready = {name: self.placed[name] for name in self.ready if name in sources}
        # A tensor that stands in under several names is written once.
        first: dict[int | TensorLocation, str] = {}
        made: dict[str, TensorSource] = {}
        places: dict[str, str] = {}
        for name, source in sources.items():
            if name not in ready:
                lies = source.make is None and source.encode is None
                identity = source.inputs[0] if lies else id(source)
                places[name] = first.setdefault(identity, name)
                made[places[name]] = source
        new = _made_places(made, self.dtype, self.made_file)
        placed = {name: ready[name] if name in ready else new[places[name]] for name in sources}
        return replace(self, placed=placed, made=made)


def plan_weights(
    checkpoint: Checkpoint,
    wanted: Mapping[str, TensorSource],
    *,
    dtype: str,
    changed: Collection[str] = (),
) -> WeightPlan:
    """Decide where every tensor of the graphs comes from and goes to.

    Args:
        checkpoint: The index of tensors, with its parts.
        wanted: Where each tensor that is needed comes from, by name.
        dtype: That the graphs want.
        changed: Names of tensors whose values will be others than those in their files.
    """
    names = _file_names(checkpoint)
    ready = {
        name: source
        for name, source in wanted.items()
        if name not in changed and lies_ready(source, dtype)
    }
    whole = {file: names[file] for file in sorted(_worthwhile_files(ready.values()))}
    placed = {
        name: StoredTensor(
            file=whole[source.inputs[0].file],
            offset=source.inputs[0].offset,
            dtype=dtype,
            shape=source.shape,
        )
        for name, source in ready.items()
        if source.inputs[0].file in whole
    }
    shards = {name: file for file, name in whole.items()}
    return WeightPlan(dtype=dtype, placed=placed, shards=shards, made={}).lay_out(wanted)


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


def _worthwhile_files(ready: Iterable[TensorSource]) -> set[Path]:
    """Files of which at least half is used as it lies; out of others, tensors are copied."""
    used = {source.inputs[0] for source in ready}
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
