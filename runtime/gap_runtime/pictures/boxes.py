"""Boxes: from the answer's text to pixels of the picture. Nothing is mended silently."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

from gap_runtime.errors import BundleError

Frame = Literal["padded-square", "original"]
"""What the values of a box are fractions of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxFormat:
    """How an answer writes a box.

    `attempt` is a regular expression for what is meant as a box, `pattern` one for all of a
    proper box, whose four groups are x0, y0, x1, y1. A value of `scale` is the far edge of the
    frame: `padded-square` or `original`. `form` is the usual answer with `#` for a digit, of
    which drafts are made; null where there is none.
    """

    attempt: str
    pattern: str
    scale: float
    frame: Frame
    form: str | None = None


class Box(NamedTuple):
    """Corners in pixels of the picture, origin top left, x0 < x1 and y0 < y1."""

    x0: float
    y0: float
    x1: float
    y1: float

    @property
    def area(self) -> float:
        """Area in square pixels."""
        return (self.x1 - self.x0) * (self.y1 - self.y0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedBoxes:
    """The boxes of an answer, and a line for everything in it that is no usable box."""

    boxes: tuple[Box, ...]
    problems: tuple[str, ...]


def parse_boxes(answer: str, spec: BoxFormat, width: int, height: int) -> ParsedBoxes:
    """Boxes of an answer in pixels of a picture of that width and height.

    A box may reach over the edge, where it is cut. One whose corners are reversed, that has no
    area, or that lies outside the picture is reported as a problem and left out.
    """
    boxes: list[Box] = []
    problems: list[str] = []
    for attempt in re.findall(spec.attempt, answer):
        match = re.fullmatch(spec.pattern, attempt)
        if match is None:
            problems.append(f"malformed box {attempt}")
            continue
        values = [float(group) / spec.scale for group in match.groups()]
        if values[2] <= values[0] or values[3] <= values[1]:
            problems.append(f"degenerate box {match.group(0)}: its corners span no area")
            continue
        box = clip_box(unpad_box(values, spec.frame, width, height), width, height)
        if box is None:
            problems.append(f"box {match.group(0)} lies outside the picture")
        else:
            boxes.append(box)
    if not boxes and not problems:
        problems.append("the answer holds no box")
    return ParsedBoxes(boxes=tuple(boxes), problems=tuple(problems))


def unpad_box(values: list[float], frame: str, width: int, height: int) -> list[float]:
    """Fractions of the model's frame to pixels of the picture.

    Args:
        values: x0, y0, x1, y1 as fractions of the frame.
        frame: `padded-square`, the picture on its square canvas, or `original`.
        width: Of the picture, in pixels.
        height: Of the picture, in pixels.

    Raises:
        BundleError: The bundle names another frame.
    """
    if frame == "original":
        return [values[0] * width, values[1] * height, values[2] * width, values[3] * height]
    if frame != "padded-square":
        raise BundleError(f"box frame '{frame}' is unknown; have padded-square, original")
    side = max(width, height)
    dx, dy = (side - width) // 2, (side - height) // 2
    x0, y0, x1, y1 = values
    return [x0 * side - dx, y0 * side - dy, x1 * side - dx, y1 * side - dy]


def clip_box(values: list[float], width: int, height: int) -> Box | None:
    """The part of a box inside the picture, or None where there is none."""
    right, bottom = float(width), float(height)
    x0, y0 = min(max(values[0], 0.0), right), min(max(values[1], 0.0), bottom)
    x1, y1 = min(max(values[2], 0.0), right), min(max(values[3], 0.0), bottom)
    return Box(x0=x0, y0=y0, x1=x1, y1=y1) if x1 > x0 and y1 > y0 else None


def iou(a: Box, b: Box) -> float:
    """Intersection over union, in [0, 1]."""
    across = min(a.x1, b.x1) - max(a.x0, b.x0)
    down = min(a.y1, b.y1) - max(a.y0, b.y0)
    if across <= 0 or down <= 0:
        return 0.0
    shared = across * down
    return shared / (a.area + b.area - shared)
