"""The checkpoint's files, read once while graphs are traced: hashed, looked through and copied.

None of it needs the interpreter lock, so that it costs the tracing little.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from threading import Event
from typing import Final, Self

import numpy as np

from gap_export.checkpoint.sources import NOT_FINITE, TensorSource
from gap_export.checkpoint.tensor import TensorLocation
from gap_export.errors import ExportError
from gap_export.weights.plan import WeightPlan
from gap_export.weights.write import share_blocks
from gap_runtime.bundle.hashes import new_hash

_BLOCK_BYTES: Final = 2**20
"""A core keeps them near while they are read, hashed and looked through."""
_INFINITIES: Final = {
    "float32": (4, 0x7F800000),
    "float16": (2, 0x7C00),
    "bfloat16": (2, 0x7F80),
}
"""Bytes and bits of infinity, by the dtypes whose values are looked at."""


class SourceReader:
    """Reads every file that holds tensors which are used as they lie."""

    def __init__(self, ready: Mapping[str, TensorSource], copies: Mapping[Path, Path]) -> None:
        """Begin.

        Args:
            ready: Tensors that are used as they lie, by name, in files that are brought whole.
            copies: Where files are to be copied to, by their own place.
        """
        self._stop = Event()
        self._copies = copies
        self._locations = {name: source.inputs[0] for name, source in ready.items()}
        tensors: dict[Path, set[TensorLocation]] = {}
        for tensor in self._locations.values():
            tensors.setdefault(tensor.file, set()).add(tensor)
        self._before = {file: _fingerprint(file) for file in tensors}
        self._pool = ThreadPoolExecutor()
        self._found: dict[Path, Future[_Found]] = {
            file: self._pool.submit(_read, file, found, copies.get(file), self._stop)
            for file, found in sorted(tensors.items())
        }

    def __enter__(self) -> Self:
        """Nothing more to do."""
        return self

    def __exit__(self, *_: object) -> None:
        """End at once: a failed export does not wait for gigabytes that nobody asks for."""
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def wait(self) -> None:
        """Until no file is being copied any more, one that nobody asked for included."""
        wait(self._found.values())

    def require_finite(self, weights: WeightPlan) -> None:
        """Refuse a checkpoint in which a tensor that is used holds NaN or infinity."""
        for name, tensor in self._locations.items():
            if name in weights.placed and tensor in self._found[tensor.file].result().broken:
                raise ExportError(f"{tensor.shown}: tensor '{tensor.key}' holds {NOT_FINITE}")

    def hash(self, file: Path) -> str:
        """The hash of a file that has not changed since the export began."""
        digest = self._found[file].result().digest
        if _fingerprint(file) != self._before[file]:
            raise ExportError(f"{file}: changed during the export; export again")
        return digest

    def copy_of(self, file: Path) -> Path | None:
        """The finished copy of a file, which the caller may take; None where there is none."""
        if file not in self._copies or file not in self._found:
            return None
        self._found[file].result()
        return self._copies[file]


@dataclass(frozen=True, slots=True)
class _Found:
    digest: str
    broken: frozenset[TensorLocation]


def _read(file: Path, tensors: Iterable[TensorLocation], copy: Path | None, stop: Event) -> _Found:
    """Hash a file, find tensors with broken values in it and copy it, block by block."""
    digest, broken, buffer = new_hash(), set(), memoryview(bytearray(_BLOCK_BYTES))
    segments, others = _segments(file.stat().st_size, tensors)
    with ExitStack() as stack:
        opened = stack.enter_context(file.open("rb", buffering=0))
        written = None
        if copy is not None and not share_blocks(file, copy):
            # Buffered: a raw write may take a part and not say so.
            written = stack.enter_context(copy.open("wb"))
        for length, tensor in segments:
            for block in _blocks(opened, length, buffer, stop):
                digest.update(block)
                if written is not None:
                    written.write(block)
                if tensor is not None and tensor not in broken and not _is_finite(block, tensor):
                    broken.add(tensor)
        for tensor in others:
            opened.seek(tensor.offset)
            blocks = _blocks(opened, tensor.length, buffer, stop)
            if not all(_is_finite(block, tensor) for block in blocks):
                broken.add(tensor)
    return _Found(digest.hexdigest(), frozenset(broken))


def _blocks(opened: FileIO, length: int, buffer: memoryview, stop: Event) -> Iterator[memoryview]:
    """The next bytes of a file; a block holds until the next is asked for. None once stopped."""
    while length and not stop.is_set():
        size = opened.readinto(buffer[: min(length, len(buffer))])
        if not size:
            raise ExportError(f"{opened.name}: cut short during the export; export again")
        length -= size
        yield buffer[:size]


def _segments(
    size: int, tensors: Iterable[TensorLocation]
) -> tuple[list[tuple[int, TensorLocation | None]], list[TensorLocation]]:
    """The file as a row of tensors and what lies between them, each with its bytes.

    Tensors that share bytes with one in that row come apart, to be read once more.
    """
    place, segments, others = 0, list[tuple[int, TensorLocation | None]](), []
    for tensor in sorted(tensors, key=lambda each: each.offset):
        if tensor.dtype not in _INFINITIES:
            continue
        if tensor.offset < place:
            others.append(tensor)
            continue
        segments += [(tensor.offset - place, None), (tensor.length, tensor)]
        place = tensor.offset + tensor.length
    return [*segments, (size - place, None)], others


def _is_finite(block: memoryview, tensor: TensorLocation) -> bool:
    """Whether all values are numbers, by their bits: from infinity's on there is none.

    Bits of positive values count up as signed integers, those of negative ones as unsigned. That
    takes a third of the time that comparing the values takes.
    """
    size, infinity = _INFINITIES[tensor.dtype]
    signed, unsigned = (np.frombuffer(block, f"{kind}{size}") for kind in "iu")
    sign = 1 << (8 * size - 1)
    return bool(signed.max() < infinity and unsigned.max() < infinity | sign)


def _fingerprint(file: Path) -> tuple[int, int]:
    """Size and time of the last change, in nanoseconds."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns
