"""Weights from a checkpoint's files into a bundle, without ever holding them all.

A graph's initializers point into weight files beside it. A tensor that has the wanted dtype is
used as it lies in the checkpoint's own file, which is brought into the bundle whole; the others
are converted, or made of several, one by one into a new safetensors file.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import onnx_ir as ir
import torch

from gap_export.checkpoint.index import Checkpoint, TensorLocation, read_tensor
from gap_export.checkpoint.sources import TensorSource, cut_pieces, make_tensor
from gap_export.errors import ExportError
from gap_export.tracing.trace import Traced
from gap_runtime.bundle.hashes import new_hash
from gap_runtime.bundle.tensors import StoredTensor, count_bytes
from gap_runtime.display import format_bytes

_FICLONE: Final = 0x40049409
"""Linux's request to share a file's blocks copy-on-write (reflink)."""
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
NOT_FINITE: Final = "values that are no finite numbers; give the checkpoint as it was published"


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
            dtype=ir.DataType["FLOAT" if place.dtype == "float32" else place.dtype.upper()],
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


def bring_weights(
    plan: WeightPlan,
    folder: Path,
    mode: str,
    *,
    copy_of: Callable[[Path], Path | None] = lambda _: None,
) -> dict[str, str]:
    """Put the weight files into a folder, over their placeholders.

    Args:
        plan: From plan_weights.
        folder: The bundle being made.
        mode: `clone` (shares blocks where the filesystem can, else copies) or `link`.
        copy_of: A finished copy of a file on the same filesystem, to be moved there, if any.

    Returns:
        Hash of what was written anew, by file name.

    Raises:
        ExportError: Not enough space, files on another filesystem, or values out of range.
    """
    copies = {name: copy_of(source) for name, source in plan.shards.items()}
    require_space(plan, folder, mode, there=[name for name, copy in copies.items() if copy])
    for name, source in plan.shards.items():
        target, copy = folder / name, copies[name]
        target.unlink(missing_ok=True)
        if copy is not None:
            copy.rename(target)
        elif mode == "link":
            _link(source, target)
        elif not share_blocks(source, target):
            # copyfile copies inside the kernel, so the bytes do not pass through Python.
            shutil.copyfile(source, target)
    return {plan.made_file: _make(plan, folder / plan.made_file)} if plan.made else {}


def share_blocks(source: Path, target: Path) -> bool:
    """Make a file of the same blocks, which are copied when one of both changes.

    Returns:
        Whether the filesystem can do that; if not, there may be an empty file.
    """
    with source.open("rb") as read, target.open("wb") as write:
        try:
            fcntl.ioctl(write.fileno(), _FICLONE, read.fileno())
        except OSError:
            return False
    return True


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
    offset = len(_header(made, dtype))
    places = {}
    for name, source in made.items():
        places[name] = StoredTensor(
            file=file, offset=offset, dtype=source.dtype or dtype, shape=source.shape
        )
        offset += places[name].length
    return places


def _header(made: dict[str, TensorSource], dtype: str) -> bytes:
    """A safetensors header; the library can only write files that it holds in memory."""
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


def _make(plan: WeightPlan, path: Path) -> str:
    """Write all tensors that are made anew, a few rows at a time; the hash of the file."""
    wanted = getattr(torch, plan.dtype)
    with _HashedFile(path) as file:
        file.write(_header(plan.made, plan.dtype))
        for name, source in plan.made.items():
            if source.encode is not None:
                file.write(source.encode().data)
                continue
            for part in cut_pieces(source):
                values = make_tensor(part)
                _require_fit(plan, name, source, values)
                file.write(values.to(wanted).contiguous().view(torch.uint8).numpy().data)
    return file.hash


class _HashedFile:
    """A file that is written and hashed while what comes next is made."""

    def __init__(self, path: Path) -> None:
        self._path, self._digest = path, new_hash()
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._last: Future[None] | None = None

    def __enter__(self) -> Self:
        self._file = self._path.open("wb")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown()
        self._file.close()
        if kind is None and self._last is not None:
            self._last.result()

    def write(self, data: bytes | memoryview) -> None:
        """Take bytes that the caller leaves alone; one write at most is under way."""
        if self._last is not None:
            self._last.result()
        self._last = self._pool.submit(self._append, data)

    @property
    def hash(self) -> str:
        """Of all that was written, once the file is closed."""
        return self._digest.hexdigest()

    def _append(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)


def _require_fit(plan: WeightPlan, name: str, source: TensorSource, values: torch.Tensor) -> None:
    """Refuse values that are no numbers, or more than the dtype can hold."""
    if not values.numel():
        return
    # Both extremes are NaN where any value is.
    least, most = torch.aminmax(values)
    largest = max(abs(float(least)), abs(float(most)))
    if not (math.isfinite(float(least)) and math.isfinite(float(most))):
        broken = _find_broken(source)
        where, key = (broken.file.name, broken.key) if broken else (plan.made_file, name)
        raise ExportError(f"{where}: tensor '{key}' holds {NOT_FINITE}")
    # What rounds to more than the largest number becomes infinite.
    if torch.isinf(torch.tensor(largest, dtype=torch.float64).to(getattr(torch, plan.dtype))):
        wider = "bfloat16 or float32" if plan.dtype == "float16" else "float32"
        key = source.inputs[0].key if source.make is None else name
        files = ", ".join(sorted({each.file.name for each in source.inputs}))
        raise ExportError(
            f"{files}: tensor '{key}' holds {largest:.3g}, more than {plan.dtype} can; "
            f"use --dtype {wider}"
        )


def _find_broken(source: TensorSource) -> TensorLocation | None:
    """The input that is not finite; None where only what is made of them is not."""
    for location in source.inputs:
        if not torch.isfinite(read_tensor(location)).all():
            return location
    return None


def require_space(
    plan: WeightPlan, folder: Path, mode: str, *, more: int = 0, there: Collection[str] = ()
) -> None:
    """Compare the files that will be written with the free disk.

    Args:
        plan: From plan_weights.
        folder: The bundle being made.
        mode: As for bring_weights.
        more: Bytes that will be written besides.
        there: Names of files that were written already.

    Raises:
        ExportError: They do not fit.
    """
    sizes = plan.file_sizes()
    needed = more + sum(
        size
        for name, size in sizes.items()
        if name not in there and (mode != "link" or name not in plan.shards)
    )
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ExportError(
            f"{folder.parent}: {format_bytes(needed)} of weights, {format_bytes(free)} free; "
            "use --weights link or another --out"
        )


def require_linkable(plan: WeightPlan, folder: Path) -> None:
    """Hard-link every file that is to be linked, and take the links away again.

    Raises:
        ExportError: One cannot be linked there.
    """
    for name, source in plan.shards.items():
        _link(source, folder / name)
        (folder / name).unlink()


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
