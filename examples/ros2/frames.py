"""Between ROS 2 messages and gap_runtime, with nothing of ROS imported: plain values only.

sensor_msgs/Image holds rows of `step` bytes, which may be longer than the picture is wide.
vision_msgs/Detection2D wants the centre and the size of a box.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from gap_runtime import Grounding

_CHANNELS: Final[dict[str, tuple[int, Literal["RGB", "BGR"]]]] = {
    "rgb8": (3, "RGB"),
    "bgr8": (3, "BGR"),
    "8UC3": (3, "BGR"),
    "rgba8": (4, "RGB"),
    "bgra8": (4, "BGR"),
    "mono8": (1, "RGB"),
    "8UC1": (1, "RGB"),
}
"""Bytes of a pixel and the order of its colours, by encoding."""


@dataclass(frozen=True)
class Detection:
    """A box of a phrase, in pixels of the picture; `score` in [0, 1]."""

    phrase: str
    score: float
    centre: tuple[float, float]
    size: tuple[float, float]


def read_frame(
    data: bytes | bytearray | memoryview, *, encoding: str, height: int, width: int, step: int
) -> tuple[np.ndarray, Literal["RGB", "BGR"]]:
    """The pixels of an image message, uint8 [height, width, 3], and the order of their colours.

    Raises:
        ValueError: Another encoding, or fewer bytes than the message says.
    """
    if encoding not in _CHANNELS:
        raise ValueError(f"encoding {encoding}: expected one of {', '.join(_CHANNELS)}")
    channels, order = _CHANNELS[encoding]
    if step < width * channels or len(data) < step * height:
        raise ValueError(
            f"{len(data)} bytes in rows of {step}: too few for {width}x{height} {encoding}"
        )
    rows = np.frombuffer(data, np.uint8, count=step * height).reshape(height, step)
    pixels = rows[:, : width * channels].reshape(height, width, channels)
    if channels == 1:
        pixels = np.repeat(pixels, 3, axis=2)
    return np.ascontiguousarray(pixels[:, :, :3]), order


def list_detections(found: tuple[Grounding, ...]) -> list[Detection]:
    """A detection for each box; none for a phrase without one."""
    return [
        Detection(
            phrase=grounding.phrase,
            score=grounding.score,
            centre=((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2),
            size=(box.x1 - box.x0, box.y1 - box.y0),
        )
        for grounding in found
        for box in grounding.boxes
    ]
