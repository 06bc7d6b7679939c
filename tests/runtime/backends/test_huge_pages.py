"""Weights of sessions on the CPU in huge pages: whose memory, when, and that it stays as it is."""

import ctypes
import dataclasses
import mmap
import sys
from pathlib import Path

import pytest

from gap_runtime.backends import _weights, onnxruntime
from gap_runtime.bundle.manifest import DECODER
from gap_runtime.errors import ConfigError
from gap_runtime.machines import huge_pages

MIB = 2**20
SIZE = 8 * MIB


def open_decoder(bundle):
    return onnxruntime.open_decoder(bundle, bundle.manifest.stage(DECODER), "cpu")


def test_what_can_be_moved_is_memory_of_no_file_in_whole_huge_pages():
    lines = [
        # Code, data of a library, a mapped file, what may not be written.
        "00400000-00a00000 r-xp 00000000 fe:00 111 /usr/bin/python3.11",
        "7f0000000000-7f0001000000 rw-p 00100000 fe:00 112 /usr/lib/x86_64-linux-gnu/libm.so.6",
        "7f0002000000-7f0003000000 rw-p 00000000 fe:00 113 /bundle/a file (deleted)",
        "7f0004000000-7f0005000000 ---p 00000000 00:00 0",
        "7ffc00000000-7ffc00800000 rw-p 00000000 00:00 0                          [stack]",
        # From the first whole page to the last one.
        "01000000-01500000 rw-p 00000000 00:00 0                          [heap]",
        "7f1000001000-7f1000600000 rw-p 00000000 00:00 0 ",
        # None, though it is large enough; then two parts.
        "7f1100001000-7f11003ff000 rw-p 00000000 00:00 0 ",
        "7f1200000000-7f1200600000 rw-p 00000000 00:00 0",
    ]
    assert list(huge_pages.list_ranges(lines)) == [
        (0x01000000, 4 * MIB),
        (0x7F1000200000, 4 * MIB),
        (0x7F1200000000, 4 * MIB),
        (0x7F1200400000, 2 * MIB),
    ]


def find_huge(address):
    """Bytes in huge pages of the memory that an address belongs to."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        first, *rest = line.split()
        if "-" in first:
            begin, end = (int(each, 16) for each in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "AnonHugePages:":
            return int(rest[0]) * 1024
    raise AssertionError(address)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's own")
def test_memory_is_moved_and_stays_as_it_is():
    held = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(held))
    for start in range(0, SIZE, 4096):
        held[start : start + 8] = start.to_bytes(8, "little")
    before = find_huge(address)
    moving = huge_pages.start_moving()
    if moving is not None:
        moving.join()
    first = -(-address // (2 * MIB)) * 2 * MIB
    asked = ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(2 * MIB), 25)
    if asked == 0 and moving is not None:
        assert find_huge(address) > before or before >= SIZE - 2 * MIB
    for start in range(0, SIZE, 4096):
        assert held[start : start + 8] == start.to_bytes(8, "little")


@pytest.mark.parametrize("text", ["always madvise [never]", None])
def test_where_the_system_has_none_nothing_is_done(monkeypatch, tmp_path, text):
    setting = tmp_path / "enabled"
    if text:
        setting.write_text(text, encoding="utf-8")
    monkeypatch.setattr(huge_pages, "_SETTING", setting)
    assert huge_pages.start_moving() is None


@pytest.fixture
def started(ort, monkeypatch):
    """A list that gets an entry for every time that memory is moved."""
    assert ort.sessions == []
    found = []
    monkeypatch.setattr(_weights, "start_moving", lambda: found.append(1))
    return found


def grow(bundle):
    """The same bundle, as if it had the weights of a real model."""
    files = {
        name: dataclasses.replace(entry, size=entry.size + 100 * MIB)
        for name, entry in bundle.manifest.files.items()
    }
    return dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, files=files))


@pytest.mark.parametrize(("text", "expected"), [("", [1]), ("1", [1]), ("0", [])])
def test_the_weights_of_a_large_decoder_are(started, decoder_bundle, monkeypatch, text, expected):
    monkeypatch.setenv("GAP_RUNTIME_HUGE_PAGES", text)
    open_decoder(decoder_bundle)
    assert started == []
    open_decoder(grow(decoder_bundle))
    assert started == expected


def test_a_wish_for_huge_pages_is_0_or_1(started, decoder_bundle, monkeypatch):
    monkeypatch.setenv("GAP_RUNTIME_HUGE_PAGES", "yes")
    with pytest.raises(ConfigError, match="GAP_RUNTIME_HUGE_PAGES=yes: expected 1, or 0"):
        open_decoder(decoder_bundle)
    assert started == []
