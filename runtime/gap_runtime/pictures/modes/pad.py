"""Centred on a square canvas as wide as the picture's longest side, then resized to a square.

References:
    The models' own `image_aspect_ratio=pad` with CLIP's processor: bicubic, 1/255, mean, std.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from gap_runtime.errors import InputError
from gap_runtime.pictures import limits
from gap_runtime.pictures.boxes import PictureFrame
from gap_runtime.pictures.cells import find_cells
from gap_runtime.pictures.pixels import resize_picture
from gap_runtime.pictures.preprocess import Bucket, Preprocess
from gap_runtime.pictures.square import find_bucket, fitting_size, is_usable, pixel_shape

__all__ = [
    "find_bucket",
    "find_cells",
    "fitting_size",
    "frame_picture",
    "is_usable",
    "make_pixels",
    "pixel_shape",
]


def make_pixels(picture: Image.Image, spec: Preprocess, bucket: Bucket) -> np.ndarray:
    """Normalized pixels, float32 [1, 3, side, side]."""
    del bucket
    padded = pad_to_square(picture, spec.fill)
    return resize_picture(padded, (spec.side, spec.side), spec.mean, spec.std)


def frame_picture(size: tuple[int, int], spec: Preprocess, bucket: Bucket) -> PictureFrame:
    """The square canvas, which reaches over the picture on two sides."""
    del bucket
    return PictureFrame.padded(size, (spec.side, spec.side))


def pad_to_square(picture: Image.Image, fill: tuple[int, int, int]) -> Image.Image:
    """The picture in the middle of a square canvas as wide as its longest side.

    Raises:
        InputError: The canvas would be too large.
    """
    width, height = picture.size
    if width == height:
        return picture
    side = max(width, height)
    if side * side > limits.MAX_PIXELS:
        raise InputError(
            f"a picture of {width}x{height} needs {side}x{side} pixels when padded to a square; "
            "crop it or scale it down"
        )
    canvas = Image.new("RGB", (side, side), fill)
    left, top, _, _ = PictureFrame.padded(picture.size, canvas.size).shown
    canvas.paste(picture, (-left, -top))
    return canvas
