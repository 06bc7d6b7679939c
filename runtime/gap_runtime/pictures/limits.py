"""How large a picture may be, read or while it is resized."""

from __future__ import annotations

from typing import Final

from gap_runtime.errors import InputError

MAX_FILE_BYTES: Final = 2**30
"""Larger files of pictures are refused: so many bytes hold more pixels than are read."""
MAX_PIXELS: Final = 100_000_000
"""Larger pictures are refused, and those that would be larger while they are resized."""


def require_room(size: tuple[int, int], resized: tuple[int, int]) -> None:
    """Refuse a picture of (width, height) that needs too many pixels to become another size.

    Raises:
        InputError: With both sizes.
    """
    width, height = size
    # Older Pillows widen all rows of a tall strip before they drop any.
    if max(width, resized[0]) * height > MAX_PIXELS:
        raise InputError(
            f"a picture of {width}x{height} needs {max(width, resized[0])}x{height} pixels when "
            f"it is resized, at most {MAX_PIXELS:,} in all; crop it or scale it down"
        )
