"""Tiles as in mode `anyres`, with a mosaic that is shrunk where it is much larger than some views.

The mosaic is cut as in `anyres`. Where it has more than 1.21 times the patches of so many views it
is shrunk bilinearly, behind the projector, and the last grid of its bucket is what is left. Two
mosaics may leave the same grid and are still two graphs, so a bucket is known by the canvas and
the whole mosaic in its name, `1536x1152-81x108`. Every value equals that of transformers.

Sizes and canvases are (width, height) in pixels, grids are (rows, columns) in patches.

References:
    arXiv:2408.03326; transformers 5.24: the PIL image processor of that model and its
    `pack_image_features` with `anyres_max_9`.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Final

from gap_runtime.pictures.modes import anyres
from gap_runtime.pictures.modes.anyres import (
    find_cells,
    frame_picture,
    make_pixels,
    pixel_shape,
)
from gap_runtime.pictures.preprocess import Bucket, Preprocess

__all__ = [
    "find_bucket",
    "find_cells",
    "fitting_size",
    "frame_picture",
    "is_usable",
    "make_pixels",
    "pixel_shape",
    "read_mosaic",
    "shrink_mosaic",
]

_NAME: Final = re.compile(r"(\d+)x(\d+)-(\d+)x(\d+)")
_LARGEST: Final = 1.1
"""Of a mosaic that stays as it is: its side, in sides of the square that all views make."""


def is_usable(spec: Preprocess, buckets: tuple[Bucket, ...]) -> bool:
    """Whether `anyres` could use them, and each is named after its canvas and mosaic."""
    if not anyres.is_usable(spec, buckets):
        return False
    for bucket in buckets:
        match = _NAME.fullmatch(bucket.name)
        if match is None or bucket.canvas != (int(match[1]), int(match[2])):
            return False
        pairs = zip(bucket.grids[-1], read_mosaic(bucket), strict=True)
        if any(left > whole for left, whole in pairs):
            return False
    return True


def find_bucket(size: tuple[int, int], spec: Preprocess, buckets: tuple[Bucket, ...]) -> Bucket:
    """The bucket of the canvas and the mosaic that a picture of (width, height) has.

    Raises:
        InputError: It is not there; the message names the one to export.
    """
    named = {bucket.name: bucket for bucket in buckets}
    found = anyres.find_bucket(size, spec, tuple(_unshrunk(bucket) for bucket in buckets))
    return named[found.name]


def fitting_size(bucket: Bucket, spec: Preprocess) -> tuple[int, int]:
    """(width, height) of a picture whose bucket this is.

    Raises:
        BundleError: There is no such picture: another canvas wins for all that have its mosaic.
    """
    return anyres.fitting_size(_unshrunk(bucket), spec)


def read_mosaic(bucket: Bucket) -> tuple[int, int]:
    """(rows, columns) of a bucket's mosaic before it is shrunk, patches."""
    match = _NAME.fullmatch(bucket.name)
    # `is_usable` was asked when the manifest was read.
    assert match is not None
    return int(match[3]), int(match[4])


def shrink_mosaic(mosaic: tuple[int, int], tile_grid: int, views: int) -> tuple[int, int]:
    """What is left of a mosaic.

    Args:
        mosaic: (rows, columns), patches.
        tile_grid: Patches along a tile's side.
        views: So many of them a mosaic may have the patches of.

    Returns:
        (rows, columns), tokens; of a very thin mosaic one may be 0.
    """
    rows, columns = mosaic
    ratio = math.sqrt(rows * columns / (views * tile_grid**2))
    return (int(rows // ratio), int(columns // ratio)) if ratio > _LARGEST else mosaic


def _unshrunk(bucket: Bucket) -> Bucket:
    return replace(bucket, grids=(bucket.grids[0], read_mosaic(bucket)))
