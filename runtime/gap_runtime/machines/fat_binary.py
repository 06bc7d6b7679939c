"""Which GPUs a library has kernels for, read from its file without loading it.

CUDA's compiler puts kernels into a section of the library as fat binaries: each has a header, and
entries of one compute capability with headers of their own. NVIDIA describes neither; what is read
here was compared with what `fatbinary` of CUDA 13.5 writes (`tests/gpu/test_fat_binary.py`).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Final

from gap_runtime.errors import EngineError
from gap_runtime.records.files import open_file

ONNXRUNTIME_CUDA: Final = "capi/libonnxruntime_providers_cuda.so"
"""The library of onnxruntime's kernels for CUDA, in its package."""
_SECTION: Final = b".nv_fatbin"
_ELF: Final = b"\x7fELF\x02\x01"
"""Of 64 bits, little-endian: every machine that CUDA runs on."""
_MAGIC: Final = 0xBA55ED50
_PTX: Final = 1
_ONE_CAPABILITY: Final = 0x10_0000
"""Flag of kernels for one compute capability and no later one, as of `sm_90a`."""


@lru_cache(maxsize=4)
def list_kernels(path: Path) -> tuple[str, ...]:
    """What a library has kernels for, in the words of PyTorch's `TORCH_CUDA_ARCH_LIST`.

    `8.6` stands for machine code, which later minor versions run too, `9.0a` for machine code
    that no other runs, `9.0+PTX` for what drivers compile for it and all that come after.

    Returns:
        In ascending order; nothing where there are none, or the file is none of Linux.
    """
    with (
        suppress(EngineError, ValueError, struct.error),
        open_file(path, EngineError) as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        found = {entry for begin, end in _sections(data) for entry in _entries(data, begin, end)}
        return tuple(f"{sm // 10}.{sm % 10}{suffix}" for sm, suffix in sorted(found))
    return ()


def has_kernels(kernels: tuple[str, ...], compute_capability: str) -> bool:
    """Whether a GPU runs one of the kinds of kernels that `list_kernels` gives."""
    wanted = _parts(compute_capability)
    for kernel in kernels:
        if kernel.endswith("+PTX"):
            runs = _parts(kernel.removesuffix("+PTX")) <= wanted
        elif kernel.endswith("a"):
            runs = _parts(kernel[:-1]) == wanted
        else:
            made_for = _parts(kernel)
            runs = made_for[0] == wanted[0] and made_for <= wanted
        if runs:
            return True
    return False


def _parts(version: str) -> tuple[int, int]:
    major, _, minor = version.partition(".")
    return int(major), int(minor)


def _sections(data: mmap.mmap) -> Iterator[tuple[int, int]]:
    """First byte and end of each section of fat binaries, from the header of an ELF file."""
    if data[: len(_ELF)] != _ELF:
        return
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count, of_names = struct.unpack_from("<HHH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", data, table + k * size) for k in range(count)]
    names = headers[of_names][4] if of_names < count else 0
    for name, _, _, _, begin, length in headers:
        start = names + name
        if data[start : start + len(_SECTION) + 1] == _SECTION + b"\0":
            yield begin, min(begin + length, len(data))


def _entries(data: mmap.mmap, begin: int, end: int) -> Iterator[tuple[int, str]]:
    """Compute capability as one number, and `list_kernels`' suffix, of each entry."""
    while begin + 16 <= end:
        magic, _, header, size = struct.unpack_from("<IHHQ", data, begin)
        if magic != _MAGIC or not header:
            # They begin at multiples of eight bytes.
            begin += 8
            continue
        inner, begin = begin + header, begin + header + size
        while inner + 64 <= begin <= end:
            kind, _, length, payload = struct.unpack_from("<HHIQ", data, inner)
            sm, _, _, flags = struct.unpack_from("<IIII", data, inner + 28)
            if not length:
                break
            suffix = "+PTX" if kind == _PTX else "a" if flags & _ONE_CAPABILITY else ""
            yield sm, suffix
            inner += length + payload
