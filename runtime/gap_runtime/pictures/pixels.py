"""RGB values to the numbers that a vision graph takes: resized, scaled, normalized."""

from __future__ import annotations

import numpy as np
from PIL import Image


def resize_picture(
    picture: Image.Image,
    size: tuple[int, int],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> np.ndarray:
    """Normalized pixels at (width, height), bicubic; float32 [1, 3, height, width]."""
    resized = picture.resize(size, Image.Resampling.BICUBIC)
    return normalize(np.asarray(resized), mean, std)[None]


def normalize(
    rgb: np.ndarray, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> np.ndarray:
    """Values of 0 to 255 [..., height, width, 3] as float32 [..., 3, height, width], contiguous.

    Args:
        rgb: Of one picture or of several.
        mean: By channel, 0 to 1.
        std: By channel, 0 to 1.
    """
    scaled = np.asarray(rgb, np.float32) * np.float32(1 / 255)
    normalized = (scaled - np.array(mean, np.float32)) / np.array(std, np.float32)
    return np.ascontiguousarray(np.moveaxis(normalized, -1, -3))
