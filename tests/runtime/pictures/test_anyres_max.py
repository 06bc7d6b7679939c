"""Mosaics that are shrunk: which pictures share a bucket, and which buckets are refused.

Pixels and token counts against the library's own: tests/parity/test_shrunk_tiles.py.
"""

from dataclasses import replace

import pytest
from PIL import Image

from gap_runtime.errors import BundleError, InputError
from gap_runtime.pictures.load import find_bucket, fitting_size, make_pixels
from gap_runtime.pictures.modes import anyres_max
from gap_runtime.pictures.modes.anyres_max import read_mosaic, shrink_mosaic
from gap_runtime.pictures.preprocess import Bucket, Preprocess

SIDE, GRID = 54, 27
SPEC = Preprocess(
    mode="anyres_max",
    side=SIDE,
    fill=(0, 0, 0),
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    canvases=tuple((SIDE * x, SIDE * y) for x in range(1, 7) for y in range(1, 7)),
)


def make_bucket(canvas, mosaic, left=None):
    """A bucket as the exporter names it."""
    return Bucket(
        name=f"{canvas[0]}x{canvas[1]}-{mosaic[0]}x{mosaic[1]}",
        canvas=canvas,
        grids=((GRID, GRID), left or shrink_mosaic(mosaic, GRID, 9)),
        strip=1,
        fixed=(),
    )


@pytest.mark.parametrize(
    ("mosaic", "left"),
    [
        ((81, 81), (81, 81)),
        ((81, 97), (81, 97)),
        # 1.1547 and 2 times the side of nine views.
        ((81, 108), (70, 93)),
        ((162, 162), (81, 81)),
        ((27, 162), (27, 162)),
        ((1, 9000), (0, 7684)),
    ],
)
def test_what_is_left_of_a_mosaic(mosaic, left):
    assert shrink_mosaic(mosaic, GRID, 9) == left


def test_buckets_that_leave_the_same_grid_are_told_by_the_whole_mosaic():
    canvas = (6 * SIDE, 6 * SIDE)
    first, second = (make_bucket(canvas, mosaic) for mosaic in ((158, 162), (156, 162)))
    assert first.grids == second.grids
    assert (read_mosaic(first), read_mosaic(second)) == ((158, 162), (156, 162))
    for bucket in (first, second):
        size = fitting_size(bucket, SPEC)
        assert find_bucket(size, SPEC, (first, second)) is bucket
    with pytest.raises(InputError, match=r"needs graphs for 162x162 tokens.*canvas=324x324"):
        find_bucket((324, 324), SPEC, (first, second))


def test_a_bucket_of_a_mosaic_that_is_not_shrunk_is_found():
    bucket = make_bucket((2 * SIDE, 2 * SIDE), (40, 54))
    assert bucket.grids[-1] == (40, 54)
    assert find_bucket((108, 80), SPEC, (bucket,)) is bucket

    pixels = make_pixels(Image.new("RGB", (108, 80)), SPEC, bucket)
    assert pixels.shape == SPEC.pixel_shape(bucket) == (1, 5, 3, SIDE, SIDE)


def test_a_mosaic_that_no_picture_has():
    with pytest.raises(BundleError, match="no picture fits bucket '324x324-20x162'"):
        fitting_size(make_bucket((324, 324), (20, 162)), SPEC)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": ""},
        {"name": "108x108"},
        {"name": "54x108-40x54"},
        {"name": "108x108-20x54"},
        {"canvas": None},
        {"canvas": (10, 10)},
        {"grids": ((27, 27),)},
        {"grids": ((27, 26), (40, 54))},
    ],
)
def test_buckets_that_are_refused(changes):
    bucket = make_bucket((2 * SIDE, 2 * SIDE), (40, 54))
    assert anyres_max.is_usable(SPEC, (bucket,))
    assert not anyres_max.is_usable(SPEC, (replace(bucket, **changes),))
