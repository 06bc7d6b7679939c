"""A process that answers for hours keeps its memory and its open files."""

import gc
import os
import sys
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gap_runtime import Bundle, Grounder

PHRASES = ("the red square", "the circle below the cross", "the left triangle", "the star")
MIB = 2**20

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@dataclass(frozen=True, slots=True)
class Held:
    """What this process holds: resident and Python's own bytes, open files."""

    resident: int
    traced: int
    files: int

    @classmethod
    def now(cls):
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text("utf-8").split()[1])
        return cls(
            resident=pages * os.sysconf("SC_PAGE_SIZE"),
            traced=tracemalloc.get_traced_memory()[0],
            files=len(list(Path("/proc/self/fd").iterdir())),
        )


def run(bundle, groundings, kept_mib, keep=None):
    """What is held when a part of the groundings are done, and at their end.

    Every picture comes again after forty others, so that some are kept and some are not.
    """
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (90, 120, 3), np.uint8)) for _ in range(40)]
    with Grounder(Bundle.open(bundle), keep_pictures=kept_mib) as grounder:
        for number in range(groundings):
            if number == groundings // 2:
                before = Held.now()
            view = grounder.look(pictures[number // 2 % len(pictures)])
            view.ground(PHRASES[number % len(PHRASES)], ratio=0.5)
            if keep is not None:
                keep(view)
        return before, Held.now()


@pytest.fixture
def traced():
    """Python's own allocations are counted, numpy's among them."""
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    "leak",
    [
        pytest.param(False, id="as it is"),
        pytest.param(True, id="with a leak", marks=pytest.mark.matrix),
    ],
)
def test_100_groundings_keep_memory_and_files_level(refshapes_bundle, leak):
    """A mebibyte of pictures is full by the half, so that nothing grows from there on."""
    kept, opened = [], []

    def keep(view):
        if leak:
            kept.append(view)
            opened.append(os.open(os.devnull, os.O_RDONLY))

    before, after = run(refshapes_bundle, 40 if leak else 100, 1, keep)
    for file in opened:
        os.close(file)
    assert (after.files == before.files) is not leak
    assert (after.traced - before.traced < MIB // 4) is not leak, (before, after)
    assert leak or after.resident - before.resident < 12 * MIB, (before, after)


@pytest.mark.matrix
@pytest.mark.parametrize("kept_mib", [0, 8, 256])
def test_2000_groundings_keep_memory_and_files_level(refshapes_bundle, kept_mib):
    before, after = run(refshapes_bundle, 2000, kept_mib)
    assert after.files == before.files
    assert after.resident - before.resident < 12 * MIB, (before, after)
