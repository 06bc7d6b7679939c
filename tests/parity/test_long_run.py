"""A process that answers for hours keeps its memory and its open files."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gap_runtime import Bundle, Grounder

PHRASES = ("the red square", "the circle below the cross", "the left triangle", "the star")
MIB = 2**20

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def count_memory():
    """Resident bytes of this process."""
    pages = int(Path("/proc/self/statm").read_text("utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def count_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def run(bundle, groundings, kept_mib):
    """Memory and open files at the start of the second quarter, and at the end."""
    grounder = Grounder(Bundle.open(bundle), keep_pictures=kept_mib)
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (90, 120, 3), np.uint8)) for _ in range(40)]
    for number in range(groundings):
        if number == groundings // 4:
            before = count_memory(), count_files()
        # Every picture comes again after forty others, so that some are kept and some are not.
        view = grounder.look(pictures[number // 2 % len(pictures)])
        view.ground(PHRASES[number % len(PHRASES)], ratio=0.5)
    return before, (count_memory(), count_files())


def test_100_groundings_keep_memory_and_files_level(refshapes_bundle):
    before, after = run(refshapes_bundle, 100, kept_mib=8)
    assert after[1] == before[1]
    assert after[0] - before[0] < 24 * MIB, (before, after)


@pytest.mark.matrix
@pytest.mark.parametrize("kept_mib", [0, 8, 256])
def test_2000_groundings_keep_memory_and_files_level(refshapes_bundle, kept_mib):
    before, after = run(refshapes_bundle, 2000, kept_mib)
    assert after[1] == before[1]
    assert after[0] - before[0] < 12 * MIB, (before, after)
