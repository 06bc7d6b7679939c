"""The checkpoint's files, read once while graphs are traced: hashed, looked through and copied.

Each block needs the interpreter lock for a moment, for which it waits as long as tracing keeps it.
So a copy of the process reads, where there may be one, and threads elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
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
from gap_export.tracing.process_copy import ProcessCopy
from gap_export.weights.plan import WeightPlan
from gap_export.weights.write import share_blocks
from gap_runtime.bundle.hashes import new_hash

_BLOCK_BYTES: Final = 2**20
"""A core keeps them near while they are read, hashed and looked through."""
_STEP_BACK: Final = 5
"""Added to the niceness of a copy that reads: a third of the share of others."""
_INFINITIES: Final = {
    "float32": (4, 0x7F800000),
    "float16": (2, 0x7C00),
    "bfloat16": (2, 0x7F80),
}
"""Bytes and bits of infinity, by the dtypes whose values are looked at."""


class SourceReader:
    """Reads every file that holds tensors which are used as they lie."""

    def __init__(
        self,
        ready: Mapping[str, TensorSource],
        copies: Mapping[Path, Path],
        *,
        may_fork: bool = False,
    ) -> None:
        """Begin.

        Args:
            ready: Tensors that are used as they lie, by name, in files that are brought whole.
            copies: Where files are to be copied to, by their own place.
            may_fork: Whether a copy of this process may read.
        """
        self._stop = Event()
        self._copies = copies
        self._locations = {name: source.inputs[0] for name, source in ready.items()}
        self._tensors: dict[Path, set[TensorLocation]] = {}
        for tensor in self._locations.values():
            self._tensors.setdefault(tensor.file, set()).add(tensor)
        self._before = {file: _fingerprint(file) for file in self._tensors}
        self._pool = ThreadPoolExecutor()
        self._copy: ProcessCopy | None = None
        self._reading: dict[Path, Future[_Found]] = {}
        self._received: Iterator[tuple[Path, _Found]] = iter(())
        self._found: dict[Path, _Found] = {}
        if may_fork:
            self._copy = ProcessCopy(self._read_beside)
            self._received = self._copy.receive()
        else:
            self._reading = self._begin(self._stop.is_set)

    def _begin(self, is_over: Callable[[], bool]) -> dict[Path, Future[_Found]]:
        """Read all files, as many at a time as there are threads."""
        return {
            file: self._pool.submit(_read, file, tensors, self._copies.get(file), is_over)
            for file, tensors in sorted(self._tensors.items())
        }

    def _read_beside(self) -> Iterator[tuple[Path, _Found]]:
        """In the copy: what of the files could be read, as soon as it is known."""
        # An export waits for its graphs first; a core is free while they are joined and proved.
        os.nice(_STEP_BACK)
        process = os.getppid()
        reading = self._begin(lambda: os.getppid() != process)
        files = {future: file for file, future in reading.items()}
        for future in as_completed(files):
            if future.exception() is None:
                yield files[future], future.result()

    def _find(self, file: Path) -> _Found:
        """What was read of a file, once it is known.

        Raises:
            OSError: It cannot be read or copied.
            ExportError: It was cut short.
        """
        if file in self._reading:
            return self._reading[file].result()
        while file not in self._found:
            name, found = next(self._received, (file, None))
            # What the copy failed at fails here again, and says why.
            self._found[name] = found or _read(
                file, self._tensors[file], self._copies.get(file), self._stop.is_set
            )
        return self._found[file]

    def __enter__(self) -> Self:
        """Nothing more to do."""
        return self

    def __exit__(self, *error: object) -> None:
        """End at once: a failed export does not wait for gigabytes that nobody asks for."""
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)
        if self._copy is not None:
            self._copy.__exit__(*error)

    def wait(self) -> None:
        """Until no file is being copied any more, one that nobody asked for included."""
        wait(self._reading.values())
        if self._copy is not None:
            for file in self._tensors:
                self._find(file)

    def require_finite(self, weights: WeightPlan) -> None:
        """Refuse a checkpoint in which a tensor that is used holds NaN or infinity."""
        for name, tensor in self._locations.items():
            if name in weights.placed and tensor in self._find(tensor.file).broken:
                raise ExportError(f"{tensor.shown}: tensor '{tensor.key}' holds {NOT_FINITE}")

    def hash(self, file: Path) -> str:
        """The hash of a file that has not changed since the export began."""
        digest = self._find(file).digest
        if _fingerprint(file) != self._before[file]:
            raise ExportError(f"{file}: changed during the export; export again")
        return digest

    def copy_of(self, file: Path) -> Path | None:
        """The finished copy of a file, which the caller may take; None where there is none."""
        if file not in self._copies or file not in self._tensors:
            return None
        self._find(file)
        return self._copies[file]


@dataclass(frozen=True, slots=True)
class _Found:
    digest: str
    broken: frozenset[TensorLocation]


def _read(
    file: Path,
    tensors: Iterable[TensorLocation],
    copy: Path | None,
    is_over: Callable[[], bool],
) -> _Found:
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
            for block in _blocks(opened, length, buffer, is_over):
                digest.update(block)
                if written is not None:
                    written.write(block)
                if tensor is not None and tensor not in broken and not _is_finite(block, tensor):
                    broken.add(tensor)
        for tensor in others:
            opened.seek(tensor.offset)
            blocks = _blocks(opened, tensor.length, buffer, is_over)
            if not all(_is_finite(block, tensor) for block in blocks):
                broken.add(tensor)
    return _Found(digest.hexdigest(), frozenset(broken))


def _blocks(
    opened: FileIO, length: int, buffer: memoryview, is_over: Callable[[], bool]
) -> Iterator[memoryview]:
    """The next bytes of a file; a block holds until the next is asked for. None when over."""
    while length and not is_over():
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
