"""Resized to the canvas of the bucket that is nearest in aspect and size.

For models that take pictures of any size (their own rule rounds both sides to whole patches): the
sizes are settled when the bundle is exported, one bucket each. Of the buckets whose aspect is
about the nearest, the one of the nearest area is taken. Nothing is padded.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from PIL import Image

from gap_runtime.errors import InputError
from gap_runtime.pictures import limits
from gap_runtime.pictures.boxes import PictureFrame
from gap_runtime.pictures.cells import find_cells
from gap_runtime.pictures.pixels import resize_picture
from gap_runtime.pictures.preprocess import Bucket, Preprocess

__all__ = [
    "find_bucket",
    "find_cells",
    "fitting_size",
    "frame_picture",
    "is_usable",
    "make_pixels",
    "pixel_shape",
]

_ALIKE: Final = math.log(1.1)
"""Buckets whose distortion differs by less (a tenth of a side) count as of one aspect."""
_MOST: Final = math.log(2)
"""A picture that would be squeezed to less than half of a side is refused."""


def is_usable(spec: Preprocess, buckets: tuple[Bucket, ...]) -> bool:
    """Whether every bucket has a canvas, and no two the same."""
    del spec
    canvases = [bucket.canvas for bucket in buckets]
    sized = all(canvas is not None and min(canvas) > 0 for canvas in canvases)
    return sized and 0 < len(canvases) == len(set(canvases))


def pixel_shape(spec: Preprocess, bucket: Bucket) -> tuple[int, ...]:
    """[1, 3, height, width] of the canvas."""
    del spec
    width, height = _canvas(bucket)
    return 1, 3, height, width


def find_bucket(size: tuple[int, int], spec: Preprocess, buckets: tuple[Bucket, ...]) -> Bucket:
    """The bucket nearest in aspect and, of those about as near, in area; equal ones in order.

    Raises:
        InputError: The picture would lose more than half of a side to its neighbour.
    """
    del spec
    distortions = [_distort(size, _canvas(bucket)) for bucket in buckets]
    nearest = min(distortions)
    if nearest > _MOST:
        raise InputError(
            f"a picture of {size[0]}x{size[1]} would be distorted to less than half of a side; "
            f"have {', '.join(bucket.name for bucket in buckets)}; export a size of about its "
            "aspect too, or crop it"
        )
    alike = [
        bucket
        for bucket, distortion in zip(buckets, distortions, strict=True)
        if distortion <= nearest + _ALIKE
    ]
    area = size[0] * size[1]
    return min(alike, key=lambda each: abs(math.log(math.prod(_canvas(each)) / area)))


def fitting_size(bucket: Bucket, spec: Preprocess) -> tuple[int, int]:
    """The canvas itself."""
    del spec
    return _canvas(bucket)


def make_pixels(picture: Image.Image, spec: Preprocess, bucket: Bucket) -> np.ndarray:
    """Normalized pixels, float32 [1, 3, height, width].

    Raises:
        InputError: The picture would be too large while it is resized.
    """
    canvas = _canvas(bucket)
    limits.require_room(picture.size, canvas)
    return resize_picture(picture, canvas, spec.mean, spec.std)


def frame_picture(size: tuple[int, int], spec: Preprocess, bucket: Bucket) -> PictureFrame:
    """The whole picture, at the size of the canvas."""
    del spec
    return PictureFrame(size=size, shown=(0, 0, *size), resized=_canvas(bucket))


def _canvas(bucket: Bucket) -> tuple[int, int]:
    # `is_usable` was asked when the manifest was read.
    assert bucket.canvas is not None
    return bucket.canvas


def _distort(size: tuple[int, int], canvas: tuple[int, int]) -> float:
    """By how much one side shrinks against the other, as the logarithm of the factor."""
    return abs(math.log(size[0] / size[1] * canvas[1] / canvas[0]))
