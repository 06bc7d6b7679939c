"""A picture as tiles that cover all of it, with a small view of the whole behind them.

view      one square of pixels for the vision tower: the tiles in raster order, then the whole
          picture squeezed to a square; one tile alone is the whole picture, and has none behind
canvas    a whole number of tiles wide and high; the picture is stretched to it, so nothing is
          padded and no tile sees an edge
packed    all that the decoder sees: each view's tokens, row by row, view after view

The canvas is the one whose aspect is nearest to the picture's. Of equal ones a later, larger one
wins as long as the picture has more than half of its pixels. Every value equals that of the
library's PIL processor; its default one resizes with torchvision instead, which gave other values
in a fifth of all places, by at most 6 of 255 levels.

References:
    transformers 5.24: GotOcr2ImageProcessorPil with `crop_to_patches`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from gap_runtime.errors import BundleError, InputError
from gap_runtime.pictures import limits
from gap_runtime.pictures.boxes import PictureFrame
from gap_runtime.pictures.cells import Cell
from gap_runtime.pictures.pixels import normalize
from gap_runtime.pictures.preprocess import Bucket, Preprocess


def is_usable(spec: Preprocess, buckets: tuple[Bucket, ...]) -> bool:
    """Whether every bucket has one grid for each of its views, all alike."""
    return bool(buckets) and all(
        bucket.canvas is not None
        and bucket.canvas in spec.canvases
        and bucket.grids == buckets[0].grids[:1] * count_views(bucket.canvas, spec.side)
        for bucket in buckets
    )


def pixel_shape(spec: Preprocess, bucket: Bucket) -> tuple[int, ...]:
    """[1, views, 3, side, side]: the tiles, then the whole picture."""
    return 1, count_views(_canvas(bucket), spec.side), 3, spec.side, spec.side


def find_bucket(size: tuple[int, int], spec: Preprocess, buckets: tuple[Bucket, ...]) -> Bucket:
    """The bucket of the canvas whose aspect is nearest to the picture's.

    Raises:
        InputError: It is not there; the message names the one to export.
    """
    canvas = choose_tiles(size, spec.canvases)
    for bucket in buckets:
        if bucket.canvas == canvas:
            return bucket
    across, down = canvas[0] // spec.side, canvas[1] // spec.side
    raise InputError(
        f"a picture of {size[0]}x{size[1]} is cut into {across}x{down} tiles, and needs graphs "
        f"for a canvas of {canvas[0]}x{canvas[1]}; have {', '.join(b.name for b in buckets)}; "
        f"export with --set image.canvas={canvas[0]}x{canvas[1]}, or crop the picture to one of "
        "those"
    )


def fitting_size(bucket: Bucket, spec: Preprocess) -> tuple[int, int]:
    """(width, height) of a picture whose bucket this is.

    Raises:
        BundleError: There is no such picture: another canvas always wins.
    """
    shape = shape_for(_canvas(bucket), spec.canvases, spec.side)
    if shape is None:
        raise BundleError(
            f"no picture fits bucket '{bucket.name}': another canvas always wins; export "
            "without it"
        )
    return shape


def make_pixels(picture: Image.Image, spec: Preprocess, bucket: Bucket) -> np.ndarray:
    """Normalized pixels, float32 [1, views, 3, side, side]; see `make_tiles`."""
    return make_tiles(picture, _canvas(bucket), spec.side, spec.mean, spec.std)


def frame_picture(size: tuple[int, int], spec: Preprocess, bucket: Bucket) -> PictureFrame:
    """The whole picture, stretched to the canvas."""
    del spec
    return PictureFrame(size=size, shown=(0, 0, *size), resized=_canvas(bucket))


def find_cells(bucket: Bucket, spec: Preprocess) -> dict[int, Cell]:
    """The tiles' tokens; behind them the whole picture comes once more, in coarser ones."""
    return dict(enumerate(tile_cells(_canvas(bucket), bucket.grids[0], spec.side)))


def _canvas(bucket: Bucket) -> tuple[int, int]:
    # `is_usable` was asked when the manifest was read.
    assert bucket.canvas is not None
    return bucket.canvas


def list_canvases(least: int, most: int, side: int) -> tuple[tuple[int, int], ...]:
    """All canvases of so many tiles, (width, height) in pixels, in the library's order.

    Args:
        least: Tiles.
        most: Tiles.
        side: Pixels along a tile's side.
    """
    grids = [
        (across, down)
        for across in range(1, most + 1)
        for down in range(1, most + 1)
        if least <= across * down <= most
    ]
    # Stable: the order among equal counts breaks ties.
    grids.sort(key=lambda grid: grid[0] * grid[1])
    return tuple((across * side, down * side) for across, down in grids)


def choose_tiles(size: tuple[int, int], canvases: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The canvas of a picture.

    Args:
        size: (width, height) of the picture, pixels.
        canvases: (width, height) of each candidate, pixels, as `list_canvases` gives them.
    """
    aspect = size[0] / size[1]
    best, least = canvases[0], float("inf")
    for canvas in canvases:
        distance = abs(aspect - canvas[0] / canvas[1])
        is_tie = distance == least and size[0] * size[1] > 0.5 * (canvas[0] * canvas[1])
        if distance < least or is_tie:
            best, least = canvas, distance
    return best


def count_views(canvas: tuple[int, int], side: int) -> int:
    """Views of a picture on a canvas: its tiles and, where there are several, the whole."""
    tiles = canvas[0] // side * (canvas[1] // side)
    return tiles if tiles == 1 else tiles + 1


def make_tiles(
    picture: Image.Image,
    canvas: tuple[int, int],
    side: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> np.ndarray:
    """Normalized pixels of each tile and of the whole picture.

    Args:
        picture: RGB, upright.
        canvas: (width, height), pixels.
        side: Pixels along a tile's side.
        mean: By channel, 0 to 1.
        std: By channel, 0 to 1.

    Returns:
        float32 [1, views, 3, side, side].

    Raises:
        InputError: The picture would be too large while it is resized.
    """
    limits.require_room(picture.size, canvas)
    stretched = picture.resize(canvas, Image.Resampling.BICUBIC)
    views = [
        stretched.crop((left, top, left + side, top + side))
        for top in range(0, canvas[1], side)
        for left in range(0, canvas[0], side)
    ]
    if len(views) > 1:
        views.append(picture.resize((side, side), Image.Resampling.BICUBIC))
    return normalize(np.stack([np.asarray(view) for view in views]), mean, std)[None]


def shape_for(
    canvas: tuple[int, int], canvases: Sequence[tuple[int, int]], side: int
) -> tuple[int, int] | None:
    """(width, height) of a picture that is put on a canvas; None where another one always wins.

    Args:
        canvas: (width, height), pixels.
        canvases: All that a picture may have.
        side: Pixels along a tile's side.
    """
    across, down = canvas[0] // side, canvas[1] // side
    # A larger canvas of the same aspect may win; a picture of little more than half loses it.
    for unit in (side, 3 * side // 4):
        size = (across * unit, down * unit)
        if unit and choose_tiles(size, canvases) == canvas:
            return size
    return None


def tile_cells(canvas: tuple[int, int], grid: tuple[int, int], side: int) -> list[Cell]:
    """Where the tokens of all tiles lie in the picture, as fractions, in their packed order.

    Args:
        canvas: (width, height), pixels.
        grid: (rows, columns) of a view's tokens.
        side: Pixels along a tile's side.

    Returns:
        (x0, y0, x1, y1) of each; the whole picture behind them is not among them.
    """
    rows, columns = grid
    across, down = canvas[0] // side, canvas[1] // side
    return [
        (
            (tile_x * columns + x) / (across * columns),
            (tile_y * rows + y) / (down * rows),
            (tile_x * columns + x + 1) / (across * columns),
            (tile_y * rows + y + 1) / (down * rows),
        )
        for tile_y in range(down)
        for tile_x in range(across)
        for y in range(rows)
        for x in range(columns)
    ]
