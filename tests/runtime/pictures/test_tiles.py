"""Canvas, tiles and order of a picture that is cut into tiles of all of it."""

import numpy as np
import pytest
from PIL import Image

from gap_runtime.errors import BundleError, InputError
from gap_runtime.pictures.drawing import shade_patches
from gap_runtime.pictures.load import find_bucket, fitting_size, make_pixels
from gap_runtime.pictures.modes.tiles import (
    choose_tiles,
    count_views,
    list_canvases,
    make_tiles,
    shape_for,
    tile_cells,
)
from gap_runtime.pictures.preprocess import Bucket, Preprocess

MEAN, STD = (0.5, 0.25, 0.0), (0.5, 0.25, 2.0)
CANVASES = list_canvases(1, 12, 448)


def make_spec(side=4, most=12, canvases=None):
    return Preprocess(
        mode="tiles",
        side=side,
        fill=(0, 0, 0),
        mean=MEAN,
        std=STD,
        canvases=canvases or list_canvases(1, most, side),
    )


def make_bucket(canvas, side, grid=2):
    views = count_views(canvas, side)
    return Bucket(
        name=f"{canvas[0]}x{canvas[1]}",
        canvas=canvas,
        grids=((grid, grid),) * views,
        strip=4,
        fixed=(),
    )


def test_canvases_are_in_the_order_that_breaks_ties():
    tiles = [(width // 448, height // 448) for width, height in list_canvases(1, 4, 448)]
    assert tiles == [(1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (1, 4), (2, 2), (4, 1)]
    assert list_canvases(2, 2, 5) == ((5, 10), (10, 5))
    assert len(CANVASES) == sum(1 for a in range(1, 13) for b in range(1, 13) if a * b <= 12)


@pytest.mark.parametrize(
    ("size", "tiles"),
    [
        ((640, 480), (4, 3)),
        ((480, 640), (3, 4)),
        ((640, 427), (3, 2)),
        ((500, 375), (4, 3)),
        ((1920, 1080), (4, 2)),
        # Of equal aspects by area: more than half of the canvas's pixels.
        ((448, 448), (1, 1)),
        ((633, 633), (1, 1)),
        ((634, 634), (2, 2)),
        ((950, 950), (2, 2)),
        ((951, 951), (3, 3)),
        ((5000, 5000), (3, 3)),
        ((100, 10_000), (1, 12)),
        ((1, 1), (1, 1)),
    ],
)
def test_canvas_is_the_one_of_the_nearest_aspect(size, tiles):
    across, down = tiles
    assert choose_tiles(size, CANVASES) == (across * 448, down * 448)


def test_one_tile_at_most_is_for_every_picture():
    spec = make_spec(side=8, most=1)
    bucket = make_bucket((8, 8), 8)
    for size in ((1, 1), (9, 4), (3, 1000)):
        assert find_bucket(size, spec, (bucket,)) is bucket
    assert spec.pixel_shape(bucket) == (1, 1, 3, 8, 8)


def test_views_are_the_tiles_and_then_the_whole():
    picture = Image.new("RGB", (8, 4))
    for x in range(8):
        for y in range(4):
            picture.putpixel((x, y), (255, 0, 0) if x < 4 else (0, 255, 0))
    spec, bucket = make_spec(), make_bucket((8, 4), 4)
    pixels = make_pixels(picture, spec, bucket)
    assert pixels.shape == spec.pixel_shape(bucket) == (1, 3, 3, 4, 4)
    assert pixels.dtype == np.float32
    assert pixels[0, 0, 0] == pytest.approx(np.ones((4, 4)), abs=1e-6)
    assert pixels[0, 1, 0] == pytest.approx(-np.ones((4, 4)), abs=1e-6)
    # Red on the left half of the whole, green on the right one.
    assert pixels[0, 2, 0, :, 0] == pytest.approx(np.ones(4), abs=0.2)
    assert pixels[0, 2, 0, :, 3] == pytest.approx(-np.ones(4), abs=0.2)


def test_one_tile_has_no_whole_behind_it():
    pixels = make_tiles(Image.new("RGB", (3, 5)), (4, 4), 4, MEAN, STD)
    assert pixels.shape == (1, 1, 3, 4, 4)


def test_picture_without_a_bucket_is_told_which_one_to_export():
    spec = make_spec(side=448)
    buckets = (make_bucket((1792, 1344), 448), make_bucket((448, 448), 448))
    assert find_bucket((640, 480), spec, buckets) is buckets[0]
    with pytest.raises(InputError) as caught:
        find_bucket((480, 640), spec, buckets)
    assert str(caught.value) == (
        "a picture of 480x640 is cut into 3x4 tiles, and needs graphs for a canvas of 1344x1792; "
        "have 1792x1344, 448x448; export with --set image.canvas=1344x1792, or crop the picture "
        "to one of those"
    )


@pytest.mark.parametrize(("side", "most"), [(448, 12), (14, 16), (30, 40), (6, 12)])
def test_every_canvas_has_a_picture_that_is_put_on_it(side, most):
    canvases = list_canvases(1, most, side)
    for canvas in canvases:
        size = shape_for(canvas, canvases, side)
        assert size is not None
        assert choose_tiles(size, canvases) == canvas


def test_a_canvas_that_never_wins_is_refused():
    spec = make_spec(side=4, canvases=((4, 4), (4, 4), (8, 4)))
    assert fitting_size(make_bucket((8, 4), 4), spec) == (8, 4)
    # The same aspect with fewer pixels always wins over it.
    spec = make_spec(side=10, canvases=((10, 10), (9, 9)))
    with pytest.raises(BundleError, match="no picture fits bucket '10x10'"):
        fitting_size(make_bucket((10, 10), 10), spec)


def test_too_large_a_picture_is_refused():
    picture = Image.new("RGB", (1, 60_000))
    with pytest.raises(InputError, match="needs 1792x60000 pixels when it is resized"):
        make_tiles(picture, (1792, 1344), 448, MEAN, STD)


def test_cells_tell_where_tokens_lie():
    cells = tile_cells((8, 4), (2, 2), 4)
    assert len(cells) == 8
    assert cells[0] == (0, 0, 0.25, 0.5)
    # The last token of the first tile, and the first of the second.
    assert cells[3] == (0.25, 0.5, 0.5, 1)
    assert cells[4] == (0.5, 0, 0.75, 0.5)


def test_drawing_shades_the_tiles_tokens():
    picture = Image.new("RGB", (800, 400), (255, 255, 255))
    bucket = make_bucket((8, 4), 4)
    shaded, scale = shade_patches(picture, make_spec(most=2), (bucket,), {3, 8})
    assert scale == 1
    inside, outside = shaded.getpixel((300, 300)), shaded.getpixel((100, 100))
    assert inside != outside
    assert shaded.getpixel((700, 300)) == outside
