"""A picture as tiles of a canvas, and the order in which their patches reach the decoder.

view      one square of pixels for the vision tower: view 0 is the whole picture, squeezed to a
          square; the others are the tiles
canvas    black frame, a whole number of tiles wide and high, with the picture in its middle
mosaic    the tiles' patches as one grid, without the rows or columns that see black; one that
          sees up to half a patch of the picture's edge is left out too
packed    all that the decoder sees: view 0's patches, then the mosaic's rows, a newline after each

Sizes and canvases are (width, height) in pixels, grids are (rows, columns) in patches, `side` is
a tile's side in pixels and `tile_grid` the same in patches. Every value equals that of
transformers, whose canvases ("pinpoints") are (height, width): keep their order, it breaks ties.
Pixels are those of its PIL processor; its default one resizes with torchvision instead.

References:
    transformers 5.23: the PIL image processor with `image_grid_pinpoints`, and the
    `pack_image_features` with `spatial_unpad` of the model that it belongs to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from gap_runtime.errors import BundleError, InputError
from gap_runtime.pictures import limits
from gap_runtime.pictures.boxes import PictureFrame
from gap_runtime.pictures.cells import find_cells
from gap_runtime.pictures.pixels import normalize
from gap_runtime.pictures.preprocess import Bucket, Preprocess

__all__ = [
    "choose_canvas",
    "find_bucket",
    "find_cells",
    "fitting_size",
    "frame_picture",
    "is_usable",
    "make_pixels",
    "make_views",
    "mosaic_grid",
    "mosaic_index",
    "newline_index",
    "pixel_shape",
]


def is_usable(spec: Preprocess, buckets: tuple[Bucket, ...]) -> bool:
    """Whether there are canvases, and each bucket is one of them with a view and a mosaic."""
    # View 0 and a tile have the same square grid, whatever the canvas.
    tile_grid = buckets[0].grids[0][0] if buckets else 0
    return bool(spec.canvases) and all(
        bucket.canvas in spec.canvases
        and len(bucket.grids) == 2
        and bucket.grids[0] == (tile_grid, tile_grid)
        for bucket in buckets
    )


def pixel_shape(spec: Preprocess, bucket: Bucket) -> tuple[int, ...]:
    """[1, views, 3, side, side]: the whole picture, then its tiles."""
    width, height = _canvas(bucket)
    return 1, 1 + width // spec.side * (height // spec.side), 3, spec.side, spec.side


def find_bucket(size: tuple[int, int], spec: Preprocess, buckets: tuple[Bucket, ...]) -> Bucket:
    """The bucket of the canvas and the mosaic that a picture of (width, height) has.

    Raises:
        InputError: It is not there; the message names the one to export.
    """
    width, height = size
    canvas, mosaic = _place(size, spec, buckets[0].grids[0][0])
    for bucket in buckets:
        if (bucket.canvas, bucket.grids[-1]) == (canvas, mosaic):
            return bucket
    if 0 in mosaic:
        raise InputError(
            f"a picture of {width}x{height} is so thin that none of its tiles' tokens is left on "
            f"a canvas of {canvas[0]}x{canvas[1]}; crop it"
        )
    wanted = f"{canvas[0]}x{canvas[1]}/{width}:{height}"
    raise InputError(
        f"a picture of {width}x{height} needs graphs for {mosaic[0]}x{mosaic[1]} tokens on a "
        f"canvas of {canvas[0]}x{canvas[1]}; have {', '.join(b.name for b in buckets)}; export "
        f"with --set image.canvas={wanted}, or crop the picture to one of those"
    )


def fitting_size(bucket: Bucket, spec: Preprocess) -> tuple[int, int]:
    """(width, height) of a picture whose bucket this is.

    Raises:
        BundleError: There is no such picture: another canvas wins for all that have its grid.
    """
    canvas = _canvas(bucket)
    (tile_grid, _), (rows, columns) = bucket.grids[0], bucket.grids[-1]
    exact = (columns * spec.side // tile_grid, rows * spec.side // tile_grid)
    # A smaller canvas may hold the exact size, and not the longest one that counts as much.
    longest = (
        min(-(-(columns + 1) * spec.side // tile_grid) - 1, canvas[0]),
        min(-(-(rows + 1) * spec.side // tile_grid) - 1, canvas[1]),
    )
    for size in (exact, longest):
        if _place(size, spec, tile_grid) == (canvas, (rows, columns)):
            return size
    raise BundleError(
        f"no picture fits bucket '{bucket.name}': other canvases win for all of its shape; "
        "export without it"
    )


def make_pixels(picture: Image.Image, spec: Preprocess, bucket: Bucket) -> np.ndarray:
    """Normalized pixels, float32 [1, views, 3, side, side]; see `make_views`."""
    return make_views(picture, _canvas(bucket), spec.side, spec.mean, spec.std)


def frame_picture(size: tuple[int, int], spec: Preprocess, bucket: Bucket) -> PictureFrame:
    """The whole picture, at its size on the canvas."""
    del spec
    return PictureFrame(size=size, shown=(0, 0, *size), resized=_fit_size(size, _canvas(bucket)))


def _canvas(bucket: Bucket) -> tuple[int, int]:
    # `is_usable` was asked when the manifest was read.
    assert bucket.canvas is not None
    return bucket.canvas


def _place(
    size: tuple[int, int], spec: Preprocess, tile_grid: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Canvas (width, height) and mosaic (rows, columns) of a picture of that (width, height)."""
    canvas = choose_canvas(size, spec.canvases)
    return canvas, mosaic_grid(size, canvas, tile_grid, spec.side)


def choose_canvas(size: tuple[int, int], canvases: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The canvas that keeps most of the picture's pixels and, among those, is the smallest.

    Args:
        size: (width, height) of the picture, pixels.
        canvases: (width, height) of each candidate, pixels; of equal ones the first wins.

    Returns:
        (width, height) of the canvas, pixels.
    """

    def rank(canvas: tuple[int, int]) -> tuple[int, int]:
        return _count_kept_pixels(size, canvas), -canvas[0] * canvas[1]

    return max(canvases, key=rank)


def mosaic_grid(
    size: tuple[int, int], canvas: tuple[int, int], tile_grid: int, side: int
) -> tuple[int, int]:
    """How many rows and columns of patches the mosaic has.

    A picture that is scaled to less than one patch in height or width may leave none.

    Args:
        size: (width, height) of the picture, pixels.
        canvas: (width, height) of its canvas, pixels.
        tile_grid: Patches along a tile's side.
        side: Pixels along a tile's side.

    Returns:
        (rows, columns), patches.
    """
    width, height = size
    rows, columns = _count_canvas_patches(canvas, tile_grid, side)
    # Divided before it is multiplied, as transformers does: another order rounds otherwise.
    if width / height > columns / rows:
        rows -= (rows - _round_down(height * (columns / width))) // 2 * 2
    else:
        columns -= (columns - _round_down(width * (rows / height))) // 2 * 2
    return rows, columns


def mosaic_index(
    canvas: tuple[int, int], mosaic: tuple[int, int], tile_grid: int, side: int
) -> np.ndarray:
    """Where each patch of the mosaic lies among the patches of all views.

    Args:
        canvas: (width, height), pixels.
        mosaic: (rows, columns) as `mosaic_grid` gives them, patches.
        tile_grid: Patches along a tile's side.
        side: Pixels along a tile's side.

    Returns:
        int64 [rows * columns], in raster order over the whole mosaic: view * tile_grid**2 +
        patch, with view at least 1.
    """
    all_rows, all_columns = _count_canvas_patches(canvas, tile_grid, side)
    rows, columns = mosaic
    row = np.arange(rows, dtype=np.int64)[:, None] + (all_rows - rows) // 2
    column = np.arange(columns, dtype=np.int64) + (all_columns - columns) // 2
    view = 1 + row // tile_grid * (all_columns // tile_grid) + column // tile_grid
    patch = row % tile_grid * tile_grid + column % tile_grid
    return (view * tile_grid**2 + patch).reshape(-1)


def newline_index(mosaic: tuple[int, int], tile_grid: int) -> tuple[int, ...]:
    """Where the newlines stand among the packed tokens.

    Args:
        mosaic: (rows, columns), patches.
        tile_grid: Patches along a tile's side.

    Returns:
        One packed index for each row, ascending; the last one is the last token.
    """
    rows, columns = mosaic
    return tuple(tile_grid * tile_grid + row * (columns + 1) + columns for row in range(rows))


def make_views(
    picture: Image.Image,
    canvas: tuple[int, int],
    side: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> np.ndarray:
    """Normalized pixels of the whole picture and of each tile.

    The canvas is black before normalization: its pixels are -mean / std.

    Args:
        picture: RGB, upright.
        canvas: (width, height), pixels.
        side: Pixels along a tile's side.
        mean: By channel, 0 to 1.
        std: By channel, 0 to 1.

    Returns:
        float32 [1, views, 3, side, side]: the picture squeezed to a square, then the tiles in
        raster order.

    Raises:
        InputError: The picture is too large, or would be while it is resized.
    """
    limits.require_room(picture.size, canvas)
    whole = picture.resize((side, side), Image.Resampling.BICUBIC)
    framed = _frame_picture(picture, canvas)
    tiles = [
        framed.crop((left, top, left + side, top + side))
        for top in range(0, canvas[1], side)
        for left in range(0, canvas[0], side)
    ]
    return normalize(np.stack([np.asarray(view) for view in (whole, *tiles)]), mean, std)[None]


def _frame_picture(picture: Image.Image, canvas: tuple[int, int]) -> Image.Image:
    """The picture in the middle of its canvas, as large as fits with its aspect kept."""
    fitted = picture.resize(_fit_size(picture.size, canvas), Image.Resampling.BICUBIC)
    framed = Image.new("RGB", canvas)
    framed.paste(fitted, ((canvas[0] - fitted.width) // 2, (canvas[1] - fitted.height) // 2))
    return framed


def _fit_size(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """(width, height) in pixels of the picture on its canvas; a broken pixel counts as whole."""
    by_width, by_height = canvas[0] / size[0], canvas[1] / size[1]
    if by_width < by_height:
        return canvas[0], min(math.ceil(size[1] * by_width), canvas[1])
    return min(math.ceil(size[0] * by_height), canvas[0]), canvas[1]


def _count_kept_pixels(size: tuple[int, int], canvas: tuple[int, int]) -> int:
    """Pixels of the picture on the canvas; enlarging it adds none."""
    width, height = size
    scale = min(canvas[0] / width, canvas[1] / height)
    return min(int(width * scale) * int(height * scale), width * height)


def _count_canvas_patches(canvas: tuple[int, int], tile_grid: int, side: int) -> tuple[int, int]:
    """(rows, columns) of patches on the whole canvas."""
    assert canvas[0] % side == canvas[1] % side == 0, (canvas, side)
    return canvas[1] // side * tile_grid, canvas[0] // side * tile_grid


def _round_down(value: float) -> int:
    """The whole number below; one that is missed by a rounding error counts as reached."""
    return int(round(value, 7))
