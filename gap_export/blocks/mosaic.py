"""Models that look at tiles on a canvas: their canvases, buckets and newline tokens."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

from gap_export.errors import CheckpointError
from gap_runtime.errors import BundleError, ConfigError
from gap_runtime.pictures.load import fitting_size
from gap_runtime.pictures.modes.anyres import choose_canvas, mosaic_grid, newline_index
from gap_runtime.pictures.preprocess import Bucket, Preprocess

# B batch (1), F newlines, D decoder width.

NEWLINE: Final = "image_newline"
_BUCKET: Final = re.compile(r"(\d+)x(\d+)(?:/(\d+):(\d+))?")
Grid = tuple[int, int]


class Newlines(nn.Module):
    """The newline, once for each row of the mosaic."""

    def __init__(self, width: int, rows: int) -> None:
        """Declare the one token, `width` wide."""
        super().__init__()
        self.image_newline = nn.Parameter(torch.empty(width))
        self.rows = rows

    def forward(self) -> Tensor:
        """Newlines [B, F, D]."""
        return self.image_newline.expand(1, self.rows, -1)


def read_canvases(pinpoints: Any, side: int, where: str) -> tuple[tuple[int, int], ...]:
    """The canvases that a config lists as (height, width), as (width, height).

    Raises:
        CheckpointError: There are none, or one is no pair of numbers or no whole number of tiles.
    """
    try:
        canvases = tuple((int(width), int(height)) for height, width in pinpoints)
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{where}: image_grid_pinpoints {pinpoints!r:.60}, expected pairs of multiples of "
            f"{side}"
        ) from error
    if not canvases or any(size % side or size <= 0 for canvas in canvases for size in canvas):
        raise CheckpointError(
            f"{where}: image_grid_pinpoints {list(canvases)!r:.200}, expected multiples of {side}"
        )
    return canvases


def read_buckets(
    text: str,
    spec: Preprocess,
    tile_grid: int,
    shrink: Callable[[Grid], Grid] = lambda mosaic: mosaic,
) -> tuple[Bucket, ...]:
    """The buckets that `image.canvas` lists.

    Args:
        text: Canvases, each with the aspect of its pictures where that is another one.
        spec: The model's canvases and the side of a tile.
        tile_grid: Patches along a tile's side.
        shrink: What becomes of a mosaic, (rows, columns).

    Raises:
        ConfigError: It cannot be read, names a canvas that the model has not, or no picture goes
            there.
    """
    buckets = [_read_bucket(item.strip(), spec, tile_grid, shrink) for item in text.split(",")]
    return tuple({bucket.name: bucket for bucket in buckets}.values())


def _read_bucket(
    item: str, spec: Preprocess, tile_grid: int, shrink: Callable[[Grid], Grid]
) -> Bucket:
    match = _BUCKET.fullmatch(item)
    if match is None:
        raise ConfigError(
            f"image.canvas '{item}': expected WIDTHxHEIGHT or WIDTHxHEIGHT/ASPECT, for example "
            "672x672/4:3"
        )
    canvas = (int(match[1]), int(match[2]))
    if canvas not in spec.canvases:
        have = ", ".join(f"{width}x{height}" for width, height in spec.canvases)
        raise ConfigError(f"image.canvas '{item}': the model has no such canvas; have {have}")
    aspect = (int(match[3]), int(match[4])) if match[3] else canvas
    if min(aspect) == 0:
        raise ConfigError(f"image.canvas '{item}': an aspect of 0; expected one like 4:3")
    mosaic = mosaic_grid(aspect, canvas, tile_grid, spec.side)
    left = mosaic if 0 in mosaic else shrink(mosaic)
    if 0 in left:
        raise ConfigError(f"image.canvas '{item}': so thin a picture leaves no tile; crop it")
    bucket = Bucket(
        name=f"{canvas[0]}x{canvas[1]}-{mosaic[0]}x{mosaic[1]}",
        canvas=canvas,
        grids=((tile_grid, tile_grid), left),
        strip=1,
        fixed=newline_index(left, tile_grid),
    )
    try:
        fitting_size(bucket, spec)
    except BundleError as error:
        scale = -(-max(max(size) for size in spec.canvases) // min(aspect))
        best = choose_canvas((aspect[0] * scale, aspect[1] * scale), spec.canvases)
        raise ConfigError(
            f"image.canvas '{item}': pictures of {aspect[0]}:{aspect[1]} go on other canvases, "
            f"large ones on {best[0]}x{best[1]}; use {best[0]}x{best[1]}/{aspect[0]}:{aspect[1]}"
        ) from error
    return bucket
