"""Weights from a checkpoint's files into a bundle, without ever holding them all.

A graph's initializers point into safetensors files beside it. A tensor that has the wanted dtype
is used as it lies in the checkpoint's own file, which is brought into the bundle whole; the
others are converted one by one into a new safetensors file.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import onnx_ir as ir
import torch

from gap_export.checkpoint import Checkpoint, TensorLocation
from gap_export.errors import CheckpointError, ExportError
from gap_export.tracing import Traced
from gap_runtime.display import format_bytes
from gap_runtime.tensors import ITEM_BYTES, StoredTensor

_FICLONE: Final = 0x40049409
"""Linux's request to share a file's blocks copy-on-write (reflink)."""
_SAFETENSORS: Final = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightPlan:
    """Where every tensor will lie: `shards` are brought as they are, `converted` rewritten."""

    dtype: str
    placed: dict[str, StoredTensor]
    shards: dict[str, Path]
    converted: tuple[TensorLocation, ...]
    converted_file: str

    @property
    def size(self) -> int:
        """Bytes of all weight files."""
        return sum(self.file_sizes().values())

    def file_sizes(self) -> dict[str, int]:
        """Size in bytes of every weight file of the bundle."""
        sizes = {name: path.stat().st_size for name, path in self.shards.items()}
        if self.converted:
            last = self.placed[self.converted[-1].key]
            sizes[self.converted_file] = last.offset + last.length
        return sizes


def plan_weights(
    checkpoint: Checkpoint,
    wanted: dict[str, tuple[int, ...]],
    *,
    dtype: str,
    canonical_name: Callable[[str], str],
    substitute: Callable[[str], str | None],
) -> WeightPlan:
    """Decide where every wanted tensor comes from and goes to.

    Args:
        checkpoint: The index of tensors.
        wanted: Shape of each tensor by canonical name.
        dtype: That the graphs want.
        canonical_name: Canonical name of a checkpoint key.
        substitute: Canonical name of the stand-in for a tensor that is missing.

    Raises:
        CheckpointError: A tensor is missing or has another shape than the config says.
    """
    found = {canonical_name(key): tensor for key, tensor in checkpoint.tensors.items()}
    sources: dict[str, TensorLocation] = {}
    for name, shape in wanted.items():
        stand_in = substitute(name) if name not in found else None
        source = found.get(stand_in or name)
        if source is None:
            raise CheckpointError(
                f"{checkpoint.folder}: tensor '{name}' is missing; found {len(found)} others; "
                "is this a checkpoint of the configured family?"
            )
        if source.shape != shape:
            raise CheckpointError(
                f"{source.file.name}: tensor '{source.key}' has shape {list(source.shape)}, "
                f"config.json asks for {list(shape)}"
            )
        sources[name] = source
    # Named as in the checkpoint folder, not as in a blob store behind it.
    names = {path.resolve(): path.name for path in checkpoint.folder.glob("*.safetensors")}
    whole = {
        file: names.get(file, file.name)
        for file in sorted(_worthwhile_files(checkpoint, sources.values(), dtype))
    }
    converted = {s.key: s for s in sources.values() if s.dtype != dtype or s.file not in whole}
    converted_file = f"weights-{dtype}.safetensors"
    moved = _converted_places(converted.values(), dtype, converted_file)
    placed = {
        name: moved[source.key]
        if source.key in moved
        else StoredTensor(
            file=whole[source.file],
            offset=source.offset,
            dtype=dtype,
            shape=source.shape,
        )
        for name, source in sources.items()
    }
    return WeightPlan(
        dtype=dtype,
        placed=placed | moved,
        shards={name: file for file, name in whole.items()},
        converted=tuple(converted.values()),
        converted_file=converted_file,
    )


def bind_weights(traced: Traced, plan: WeightPlan, folder: Path) -> None:
    """Point a graph's initializers at the files of the bundle folder."""
    for initializer in traced.model.graph.initializers.values():
        name = initializer.name
        assert name is not None
        if name not in traced.parameters:
            continue
        place = plan.placed[strip_stage(name)]
        initializer.const_value = ir.ExternalTensor(
            location=place.file,
            offset=place.offset,
            length=place.length,
            dtype=ir.DataType[place.dtype.upper().replace("FLOAT32", "FLOAT")],
            shape=ir.Shape(place.shape),
            name=name,
            base_dir=folder,
        )


def wanted_shapes(traced: Iterable[Traced]) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter that the graphs use, by canonical name."""
    wanted: dict[str, tuple[int, ...]] = {}
    for graph in traced:
        for initializer in graph.model.graph.initializers.values():
            if initializer.name in graph.parameters:
                assert initializer.shape is not None
                shape = tuple(int(size) for size in initializer.shape)  # type: ignore[arg-type]
                wanted[strip_stage(initializer.name)] = shape
    return wanted


def strip_stage(name: str) -> str:
    """Canonical name of a parameter: its path without the stage's own attribute."""
    return name.partition(".")[2]


def write_placeholders(plan: WeightPlan, folder: Path) -> None:
    """Empty files of the right sizes, so that graphs can be proved before bytes are moved."""
    for name, size in plan.file_sizes().items():
        with (folder / name).open("wb") as file:
            file.truncate(size)


def bring_weights(plan: WeightPlan, folder: Path, mode: str) -> None:
    """Put the weight files into a folder, over their placeholders.

    Args:
        plan: From plan_weights.
        folder: The bundle being made.
        mode: `clone` (shares blocks where the filesystem can, else copies) or `link`.

    Raises:
        ExportError: Not enough space, files on another filesystem, or values out of range.
    """
    _require_space(plan, folder, mode)
    for name, source in plan.shards.items():
        target = folder / name
        target.unlink(missing_ok=True)
        if mode == "link":
            _link(source, target)
        else:
            clone_file(source, target)
    if plan.converted:
        _convert(plan, folder / plan.converted_file)


def clone_file(source: Path, target: Path) -> None:
    """Copy a file, sharing its blocks where the filesystem can."""
    try:
        with source.open("rb") as read, target.open("wb") as write:
            fcntl.ioctl(write.fileno(), _FICLONE, read.fileno())
    except OSError:
        # copyfile copies inside the kernel, so the bytes do not pass through Python.
        shutil.copyfile(source, target)


def _worthwhile_files(
    checkpoint: Checkpoint, sources: Iterable[TensorLocation], dtype: str
) -> set[Path]:
    """Files of which at least half is used as it lies; out of others, tensors are copied."""
    lengths: dict[Path, int] = {}
    for tensor in checkpoint.tensors.values():
        lengths[tensor.file] = lengths.get(tensor.file, 0) + tensor.length
    used = {source.key: source for source in sources if source.dtype == dtype}
    for tensor in used.values():
        lengths[tensor.file] -= 2 * tensor.length
    return {tensor.file for tensor in used.values() if lengths[tensor.file] <= 0}


def _converted_places(
    tensors: Iterable[TensorLocation], dtype: str, file: str
) -> dict[str, StoredTensor]:
    """Where converted tensors will lie, by checkpoint key."""
    tensors = list(tensors)
    offset = len(_header(tensors, dtype))
    places = {}
    for tensor in tensors:
        place = StoredTensor(file=file, offset=offset, dtype=dtype, shape=tensor.shape)
        places[tensor.key] = place
        offset += place.length
    return places


def _header(tensors: list[TensorLocation], dtype: str) -> bytes:
    """A safetensors header; the library can only write files that it holds in memory."""
    entries, offset = {}, 0
    for tensor in tensors:
        length = tensor.length // ITEM_BYTES[tensor.dtype] * ITEM_BYTES[dtype]
        entries[tensor.key] = {
            "dtype": _SAFETENSORS[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + length],
        }
        offset += length
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _convert(plan: WeightPlan, path: Path) -> None:
    wanted = getattr(torch, plan.dtype)
    with path.open("wb") as file:
        file.write(_header(list(plan.converted), plan.dtype))
        for tensor in plan.converted:
            values = read_tensor(tensor)
            changed = values.to(wanted)
            lost = torch.isinf(changed) & torch.isfinite(values)
            if lost.any():
                wider = "bfloat16 or float32" if plan.dtype == "float16" else "float32"
                raise ExportError(
                    f"{tensor.file.name}: tensor '{tensor.key}' holds "
                    f"{values[lost].abs().max():.3g}, more than {plan.dtype} can; "
                    f"use --dtype {wider}"
                )
            file.write(changed.contiguous().view(torch.uint8).numpy().data)


def read_tensor(tensor: TensorLocation) -> torch.Tensor:
    """One tensor's values; read, not mapped, so that its memory is given back."""
    with tensor.file.open("rb") as file:
        file.seek(tensor.offset)
        data = np.fromfile(file, dtype=np.uint8, count=tensor.length)
    return torch.from_numpy(data).view(getattr(torch, tensor.dtype)).reshape(tensor.shape)


def _require_space(plan: WeightPlan, folder: Path, mode: str) -> None:
    sizes = plan.file_sizes()
    needed = sum(size for name, size in sizes.items() if mode != "link" or name not in plan.shards)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ExportError(
            f"{folder.parent}: {format_bytes(needed)} of weights, {format_bytes(free)} free; "
            "use --weights link or another --out"
        )


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in {errno.EXDEV, errno.EPERM, errno.EMLINK}:
            raise
        raise ExportError(
            f"{source}: cannot be hard-linked to {target.parent} ({error.strerror}); "
            "use --weights clone, or an --out on the same filesystem"
        ) from error
