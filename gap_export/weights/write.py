"""Weights from a checkpoint's files into a bundle, without ever holding them all."""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final, Self

import torch

from gap_export.checkpoint.sources import NOT_FINITE, TensorSource, cut_pieces, make_tensor
from gap_export.checkpoint.tensor import TensorLocation, read_tensor
from gap_export.errors import ExportError
from gap_export.weights.plan import WeightPlan, make_header
from gap_runtime.bundle.hashes import new_hash
from gap_runtime.display import format_bytes

_FICLONE: Final = 0x40049409
"""Linux's request to share a file's blocks copy-on-write (reflink)."""


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
    on_bytes: Callable[[int], None] = lambda _: None,
) -> dict[str, str]:
    """Put the weight files into a folder, over their placeholders.

    Args:
        plan: From plan_weights.
        folder: The bundle being made.
        mode: `copy` (shares blocks where the filesystem can, else copies) or `link`.
        copy_of: A finished copy of a file on the same filesystem, to be moved there, if any.
        on_bytes: Told how many more are in their place.

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
        on_bytes(target.stat().st_size)
    if not plan.made:
        return {}
    return {plan.made_file: _make(plan, folder / plan.made_file, on_bytes)}


def share_blocks(source: Path, target: Path) -> bool:
    """Make a file of the same blocks, which are copied when one of both changes.

    Returns:
        Whether system and filesystem can do that; if not, there may be an empty file.
    """
    try:
        import fcntl  # noqa: PLC0415 - not on every system
    except ImportError:
        return False
    with source.open("rb") as read, target.open("wb") as write:
        try:
            fcntl.ioctl(write.fileno(), _FICLONE, read.fileno())
        except OSError:
            return False
    return True


def _make(plan: WeightPlan, path: Path, on_bytes: Callable[[int], None]) -> str:
    """Write all tensors that are made anew, a few rows at a time; the hash of the file."""
    wanted = getattr(torch, plan.dtype)
    with _HashedFile(path, on_bytes) as file:
        file.write(make_header(plan.made, plan.dtype))
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

    def __init__(self, path: Path, on_bytes: Callable[[int], None]) -> None:
        self._path, self._digest, self._on_bytes = path, new_hash(), on_bytes
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
        self._on_bytes(memoryview(data).nbytes)

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
        where, key = (broken.shown, broken.key) if broken else (plan.made_file, name)
        raise ExportError(f"{where}: tensor '{key}' holds {NOT_FINITE}")
    # What rounds to more than the largest number becomes infinite.
    if torch.isinf(torch.tensor(largest, dtype=torch.float64).to(getattr(torch, plan.dtype))):
        wider = "bfloat16 or float32" if plan.dtype == "float16" else "float32"
        key = source.inputs[0].key if source.make is None else name
        files = ", ".join(sorted({str(each.shown) for each in source.inputs}))
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
    plan: WeightPlan, folder: Path, mode: str, *, there: Collection[str] = ()
) -> None:
    """Compare the files that will be written with the free disk.

    Args:
        plan: From plan_weights.
        folder: The bundle being made.
        mode: As for bring_weights.
        there: Names of files that were written already.

    Raises:
        ExportError: They do not fit.
    """
    sizes = plan.file_sizes()
    needed = sum(
        size
        for name, size in sizes.items()
        if name not in there and (mode != "link" or name not in plan.shards)
    )
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ExportError(
            f"{folder.parent}: {format_bytes(needed)} of weights, {format_bytes(free)} free; "
            "use --bring link or another --out"
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
            "use --bring copy, or an --out on the same filesystem"
        ) from error
