"""Canvas, tiles and packed order of a picture of any size."""

import numpy as np
import pytest
from PIL import Image

from gap_runtime.errors import InputError
from gap_runtime.pictures import limits
from gap_runtime.pictures.modes.anyres import (
    choose_canvas,
    make_views,
    mosaic_grid,
    mosaic_index,
    newline_index,
)

# Hugging Face's order, which breaks ties; its own list says (height, width).
CANVASES = ((672, 336), (336, 672), (672, 672), (336, 1008), (1008, 336))
MEAN, STD = (0.5, 0.25, 0.0), (0.5, 0.25, 2.0)
SIZES = (
    *((1, 1), (1, 2), (2, 1), (3, 2), (13, 17), (100, 100), (336, 336), (337, 337), (335, 336)),
    *((640, 480), (480, 640), (641, 479), (640, 427), (500, 333), (110, 176), (205, 656)),
    *((1008, 336), (1920, 1080), (1400, 100), (100, 1400), (24, 1000), (4000, 3001)),
    *((1000, 1), (1, 1000), (100_000, 1), (1, 100_000), (10_000, 10_000)),
)


def count_packed(mosaic, tile_grid):
    """Patches of view 0, patches of the mosaic, and a newline for each of its rows."""
    rows, columns = mosaic
    return tile_grid**2 + rows * (columns + 1)


def scaled_canvases(side):
    return tuple((width // 336 * side, height // 336 * side) for width, height in CANVASES)


@pytest.mark.parametrize(
    ("size", "canvas", "mosaic", "tokens"),
    [
        ((640, 480), (672, 672), (36, 48), 2340),
        ((480, 640), (672, 672), (48, 36), 2352),
        ((640, 427), (672, 672), (32, 48), 2144),
        ((427, 640), (672, 672), (48, 32), 2160),
        ((640, 426), (672, 672), (32, 48), 2144),
        ((500, 375), (672, 672), (36, 48), 2340),
        ((375, 500), (672, 672), (48, 36), 2352),
        ((640, 360), (672, 672), (28, 48), 1948),
        ((640, 320), (672, 336), (24, 48), 1752),
        ((500, 333), (672, 336), (24, 36), 1464),
        ((333, 500), (336, 672), (36, 24), 1476),
        ((640, 240), (672, 336), (18, 48), 1458),
        ((240, 640), (336, 672), (48, 18), 1488),
        ((1008, 336), (1008, 336), (24, 72), 2328),
        ((1920, 1080), (672, 672), (28, 48), 1948),
        ((337, 337), (672, 672), (48, 48), 2928),
        ((336, 336), (672, 336), (24, 24), 1176),
        ((1400, 100), (1008, 336), (6, 72), 1014),
        ((100, 1400), (336, 1008), (72, 6), 1080),
        # A tie. The first code of LLaVA reads the same list as (width, height), so it takes
        # the other canvas: (336, 672), 1476 tokens and 976.
        ((200, 300), (672, 336), (24, 16), 984),
        ((300, 200), (672, 336), (24, 36), 1464),
        # 205 * (48 / 656) is 14.999... in floats. The first code of LLaVA cuts it to 14:
        # 14 columns and 1296 tokens, 62 rows and 2126.
        ((205, 656), (336, 672), (48, 16), 1392),
        ((328, 861), (336, 1008), (64, 24), 2176),
        # Less than a patch is left: no row at all, or rows of a newline alone.
        ((1000, 1), (1008, 336), (0, 72), 576),
        ((1, 1000), (336, 1008), (72, 0), 648),
        ((1, 1), (672, 336), (24, 24), 1176),
    ],
)
def test_counts_are_hugging_faces(size, canvas, mosaic, tokens):
    assert choose_canvas(size, CANVASES) == canvas
    assert mosaic_grid(size, canvas, 24, 336) == mosaic
    assert count_packed(mosaic, 24) == tokens


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (200, 300), (336, 336)])
def test_first_of_equal_canvases_wins(size):
    assert choose_canvas(size, ((672, 336), (336, 672))) == (672, 336)
    assert choose_canvas(size, ((336, 672), (672, 336))) == (336, 672)


def test_smaller_of_canvases_that_lose_nothing_wins():
    assert choose_canvas((100, 50), ((672, 672), (336, 336), (672, 336))) == (336, 336)


def test_canvas_that_keeps_more_pixels_wins_over_a_smaller_one():
    assert choose_canvas((600, 500), ((336, 336), (672, 672), (672, 336))) == (672, 672)


@pytest.mark.parametrize("size", [(1, 2000), (1, 100_000)])
def test_strip_that_vanishes_on_every_canvas_takes_the_first_of_the_smallest(size):
    assert choose_canvas(size, ((672, 672), (672, 336), (336, 672))) == (672, 336)


def test_mosaic_over_two_tiles_is_in_raster_order():
    index = mosaic_index((56, 28), (2, 4), 2, 28)
    # Tile 1 holds 4 5 6 7, tile 2 holds 8 9 10 11.
    assert index.tolist() == [4, 5, 8, 9, 6, 7, 10, 11]
    assert index.dtype == np.int64


def test_mosaic_leaves_out_the_padding_above_and_below():
    index = mosaic_index((56, 56), (2, 4), 2, 28)
    # The lower rows of tiles 1 and 2, the upper rows of tiles 3 and 4.
    assert index.tolist() == [6, 7, 10, 11, 12, 13, 16, 17]


def test_mosaic_leaves_out_the_padding_left_and_right():
    index = mosaic_index((56, 28), (2, 2), 2, 28)
    assert index.tolist() == [5, 8, 7, 10]


@pytest.mark.parametrize("mosaic", [(0, 4), (4, 0)])
def test_mosaic_may_be_empty(mosaic):
    index = mosaic_index((56, 56), mosaic, 2, 28)
    assert index.shape == (0,)
    assert index.dtype == np.int64


def test_newlines_end_the_rows():
    # 4 patches of the whole picture, then rows of 3 patches and a newline.
    assert newline_index((2, 3), 2) == (7, 11)
    assert newline_index((3, 0), 2) == (4, 5, 6)
    assert newline_index((0, 3), 2) == ()


@pytest.mark.parametrize(("tile_grid", "side"), [(24, 336), (2, 28), (3, 42)])
@pytest.mark.parametrize("size", SIZES)
def test_every_packed_token_is_a_patch_or_a_newline(size, tile_grid, side):
    canvas = choose_canvas(size, scaled_canvases(side))
    mosaic = mosaic_grid(size, canvas, tile_grid, side)
    rows, columns = mosaic
    all_rows, all_columns = canvas[1] // side * tile_grid, canvas[0] // side * tile_grid
    assert 0 <= rows <= all_rows
    assert 0 <= columns <= all_columns
    assert rows == all_rows or columns == all_columns
    assert (all_rows - rows) % 2 == (all_columns - columns) % 2 == 0

    index = mosaic_index(canvas, mosaic, tile_grid, side)
    assert index.shape == (rows * columns,)
    assert len(set(index.tolist())) == len(index)
    assert all(tile_grid**2 <= i < tile_grid**2 + all_rows * all_columns for i in index)

    newlines = newline_index(mosaic, tile_grid)
    tokens = count_packed(mosaic, tile_grid)
    assert tokens == tile_grid**2 + len(index) + len(newlines)
    assert sorted(set(newlines)) == list(newlines)
    assert all(tile_grid**2 <= i < tokens for i in newlines)
    assert not newlines or newlines[-1] == tokens - 1


@pytest.mark.parametrize("size", SIZES)
def test_turned_picture_on_a_turned_canvas_has_the_turned_mosaic(size):
    canvas = choose_canvas(size, CANVASES)
    rows, columns = mosaic_grid(size, canvas, 24, 336)
    assert mosaic_grid(size[::-1], canvas[::-1], 24, 336) == (columns, rows)


def undo_normalization(views):
    """uint8 [views, side, side, 3]."""
    values = views[0].transpose(0, 2, 3, 1) * np.array(STD) + np.array(MEAN)
    return np.rint(values * 255).astype(np.uint8)


def test_views_are_the_whole_picture_then_the_tiles_in_raster_order():
    quarters = np.array(
        [[[10, 0, 0], [20, 0, 0], [30, 0, 0]], [[40, 0, 0], [50, 0, 0], [60, 0, 0]]]
    )
    pixels = quarters.astype(np.uint8).repeat(4, axis=0).repeat(4, axis=1)
    views = undo_normalization(make_views(Image.fromarray(pixels), (12, 8), 4, MEAN, STD))
    assert views.shape == (7, 4, 4, 3)
    for view, value in zip(views[1:], (10, 20, 30, 40, 50, 60), strict=True):
        assert np.array_equal(view, np.full((4, 4, 3), (value, 0, 0)))
    # The first is all of it, squeezed: left is darker than right, top than bottom.
    assert views[0, 0, 0, 0] < views[0, 0, 3, 0] < views[0, 3, 0, 0] < views[0, 3, 3, 0]


def test_views_are_a_contiguous_float32_batch():
    views = make_views(Image.new("RGB", (9, 5)), (56, 28), 28, MEAN, STD)
    assert views.shape == (1, 3, 3, 28, 28)
    assert views.dtype == np.float32
    assert views.flags["C_CONTIGUOUS"]


def test_views_are_scaled_and_normalized_by_channel():
    views = make_views(Image.new("RGB", (4, 4), (0, 255, 51)), (4, 4), 4, MEAN, STD)
    for view in views[0]:
        assert view == pytest.approx(
            np.array([-1, 3, 0.1])[:, None, None].repeat(4, 1).repeat(4, 2)
        )


def test_canvas_is_black_before_normalization():
    views = make_views(Image.new("RGB", (4, 2), (255, 255, 255)), (8, 8), 4, MEAN, STD)
    assert views[0, 1, :, 0, 0] == pytest.approx([-1, -1, 0])


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((4, 2), (0, 2, 8, 6)),
        ((2, 4), (2, 0, 6, 8)),
        ((8, 3), (0, 2, 8, 5)),  # 5 rows to share, 2 above
        ((3, 8), (2, 0, 5, 8)),  # 5 columns to share, 2 to the left
        ((16, 5), (0, 2, 8, 5)),  # 2.5 rows are 3
        ((1, 100), (3, 0, 4, 8)),  # 0.08 columns are 1
        ((1, 1), (0, 0, 8, 8)),
    ],
)
def test_picture_is_in_the_middle_of_the_canvas(size, box):
    picture = Image.new("RGB", size, (255, 255, 255))
    views = undo_normalization(make_views(picture, (8, 8), 4, MEAN, STD))
    tiles = views[1:].reshape(2, 2, 4, 4, 3).transpose(0, 2, 1, 3, 4).reshape(8, 8, 3)
    expected = np.zeros((8, 8, 3))
    left, top, right, bottom = box
    expected[top:bottom, left:right] = 255
    assert np.array_equal(tiles, expected)
    assert np.array_equal(views[0], np.full((4, 4, 3), 255))


@pytest.mark.parametrize(
    "size", [(640, 427), (333, 500), (1400, 100), (97, 640), (640, 97), (205, 656), (1000, 61)]
)
def test_mosaic_keeps_patches_that_see_at_least_half_of_the_picture(size):
    canvas = choose_canvas(size, CANVASES)
    mosaic = mosaic_grid(size, canvas, 24, 336)
    views = make_views(Image.new("RGB", size, (255, 255, 255)), canvas, 336, (0, 0, 0), (1, 1, 1))
    seen = views[0, :, 0].reshape(-1, 24, 14, 24, 14).mean(axis=(2, 4)).reshape(-1)
    is_kept = np.zeros(len(seen), dtype=bool)
    is_kept[mosaic_index(canvas, mosaic, 24, 336)] = True
    # Half of a patch is 7 pixels; the picture's place on the canvas is a whole one.
    assert seen[is_kept].min() >= 6 / 14 - 1e-6
    assert seen[576:][~is_kept[576:]].max() <= 8 / 14 + 1e-6


@pytest.mark.parametrize("size", [(1, 400_000), (20_000, 20_000)])
def test_absurd_size_is_refused_before_it_is_resized(size):
    class Huge:
        """Pillow would unpack such a picture; only its size may be read."""

        def __init__(self):
            self.size = size

    with pytest.raises(InputError, match=f"picture of {size[0]}x{size[1]} .*scale it down"):
        make_views(Huge(), (672, 672), 336, MEAN, STD)


def test_limit_counts_the_rows_that_pillow_widens(monkeypatch):
    monkeypatch.setattr(limits, "MAX_PIXELS", 800)
    assert make_views(Image.new("RGB", (2, 100)), (8, 8), 4, MEAN, STD).shape[1] == 5
    with pytest.raises(InputError, match="of 2x101 needs 8x101 pixels"):
        make_views(Image.new("RGB", (2, 101)), (8, 8), 4, MEAN, STD)
    assert make_views(Image.new("RGB", (400, 2)), (8, 8), 4, MEAN, STD).shape[1] == 5
