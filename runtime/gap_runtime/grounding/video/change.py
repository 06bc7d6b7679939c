"""Whether a picture is another one than before, to the eye of a model."""

from __future__ import annotations

from typing import Final

import numpy as np
from PIL import Image

DEFAULT_CHANGE: Final = 0.05
"""Differences below are noise: of a camera's sensor, or of compression."""
_SIDE: Final = 32


class LastAsked:
    """The picture that was asked about last, and how far another one is from it.

    Both are averaged in 32 x 32 cells, so that noise goes and what moves stays. The difference is
    that of the cell and colour that differ most, as a share of the brightest value.
    """

    def __init__(self) -> None:
        """No picture yet, from which every one differs wholly."""
        self._size: tuple[int, int] | None = None
        self._cells = np.zeros((_SIDE, _SIDE, 3), np.int16)

    def put(self, picture: Image.Image) -> None:
        """This one is asked about now."""
        self._size, self._cells = picture.size, _average(picture)

    def measure(self, picture: Image.Image) -> float:
        """How far an RGB picture is from the last one, in [0, 1]; 1 if it has another size."""
        if picture.size != self._size:
            return 1.0
        return float(np.abs(_average(picture) - self._cells).max()) / 255


def _average(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.resize((_SIDE, _SIDE), Image.Resampling.BOX), np.int16)
