"""Which GPUs a library has kernels for: made-up libraries of Linux, in every state of damage."""

import itertools
import struct

import pytest

from gap_runtime.machines.fat_binary import has_kernels, list_kernels

ELF, PTX = 2, 1
ONE_ALONE, FAMILY = 0x10_0000, 0x20_0000


def fat_binary(*entries):
    """One for (kind, compute capability times ten, flags) of each entry."""
    inner = b""
    for kind, sm, flags in entries:
        head = struct.pack("<HHIQ", kind, 0x101, 64, 16) + bytes(12)
        inner += (head + struct.pack("<IIII", sm, 0, 0, flags | 0x11)).ljust(64, b"\0") + bytes(16)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(inner)) + inner


def library(content, name=b".nv_fatbin"):
    """A file of Linux with one section of content, behind the names of its sections."""
    names = b"\0.names\0" + name + b"\0"
    begin = 64 + len(names)
    begin += -begin % 8
    body = (bytes(64) + names).ljust(begin, b"\0") + content
    table = len(body)
    sections = [(0, 0, 0), (1, 64, len(names)), (8, begin, len(content))]
    for title, place, size in sections:
        body += struct.pack("<IIQQQQ", title, 1, 0, 0, place, size).ljust(64, b"\0")
    head = b"\x7fELF\x02\x01".ljust(0x28, b"\0") + struct.pack("<Q", table)
    head += bytes(10) + struct.pack("<HHH", 64, len(sections), 1)
    return head.ljust(64, b"\0") + body[64:]


SOME = (
    fat_binary((ELF, 75, 0), (ELF, 90, ONE_ALONE), (PTX, 90, 0))
    + bytes(8)
    + fat_binary((ELF, 75, 0), (ELF, 86, 0), (ELF, 100, FAMILY), (ELF, 120, ONE_ALONE))
)


@pytest.fixture
def read(tmp_path):
    numbers = itertools.count()

    def write(data):
        path = tmp_path / f"{next(numbers)}.so"
        path.write_bytes(data)
        return list_kernels(path)

    return write


def test_all_kinds_in_ascending_order(read):
    assert read(library(SOME)) == ("7.5", "8.6", "9.0+PTX", "9.0a", "10.0", "12.0a")


@pytest.mark.parametrize(
    "data",
    [b"", b"MZ of Windows", library(b""), library(SOME, b".other"), library(SOME, b".nv_fatbin2")],
)
def test_files_that_have_none(read, data):
    assert read(data) == ()


def test_what_is_no_file(tmp_path):
    assert list_kernels(tmp_path) == ()
    assert list_kernels(tmp_path / "nothing.so") == ()


def test_damaged_files_end_in_what_was_found(read):
    """Installed packages are no strangers', but doctor goes on whatever is there."""
    whole = library(SOME)
    for k in range(0, len(whole), 7):
        assert set(read(whole[:k])) <= set(read(whole))
        # Numbers as large as they get, and as small.
        for value in (b"\xff" * 4, bytes(4)):
            assert isinstance(read(whole[:k] + value + whole[k + 4 :]), tuple)


@pytest.mark.parametrize(
    ("kernels", "runs", "does_not"),
    [
        (("8.0", "8.6"), ("8.0", "8.6", "8.7", "8.9"), ("7.5", "9.0")),
        (("9.0a",), ("9.0",), ("8.9", "10.0")),
        (("12.0a",), ("12.0",), ("12.1",)),
        (("12.0",), ("12.0", "12.1"), ("11.0",)),
        (("9.0+PTX",), ("9.0", "10.0", "12.1"), ("8.9",)),
        ((), (), ("8.9",)),
    ],
)
def test_which_gpus_run_them(kernels, runs, does_not):
    assert all(has_kernels(kernels, each) for each in runs)
    assert not any(has_kernels(kernels, each) for each in does_not)
