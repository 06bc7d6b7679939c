"""Resized to a square, whatever its shape."""

from __future__ import annotations

import numpy as np
from PIL import Image

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
    return resize_picture(picture, (spec.side, spec.side), spec.mean, spec.std)


def frame_picture(size: tuple[int, int], spec: Preprocess, bucket: Bucket) -> PictureFrame:
    """The whole picture."""
    del bucket
    return PictureFrame(size=size, shown=(0, 0, *size), resized=(spec.side, spec.side))
