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

from gap_runtime.errors import InputError
from gap_runtime.pictures.anyres import MAX_PIXELS, normalize_views


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
    width, height = picture.size
    # Older Pillows widen all rows of a tall strip before they drop any.
    if max(width, canvas[0]) * height > MAX_PIXELS:
        raise InputError(
            f"a picture of {width}x{height} needs {max(width, canvas[0])}x{height} pixels when "
            f"cut into tiles, at most {MAX_PIXELS:,} in all; crop it or scale it down"
        )
    stretched = picture.resize(canvas, Image.Resampling.BICUBIC)
    views = [
        stretched.crop((left, top, left + side, top + side))
        for top in range(0, canvas[1], side)
        for left in range(0, canvas[0], side)
    ]
    if len(views) > 1:
        views.append(picture.resize((side, side), Image.Resampling.BICUBIC))
    return normalize_views(views, mean, std)


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


def tile_cells(
    canvas: tuple[int, int], grid: tuple[int, int], side: int
) -> list[tuple[float, float, float, float]]:
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
