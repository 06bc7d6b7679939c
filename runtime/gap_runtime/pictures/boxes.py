"""Boxes: from the answer's text to pixels of the picture. Nothing is mended silently."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from gap_runtime.errors import BundleError
from gap_runtime.records.patterns import Matcher

Frame = Literal["padded-square", "original", "resized"]
"""What the values of a box are fractions of, or pixels of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxFormat:
    """How an answer writes a box.

    `attempt` is a regular expression for what is meant as a box, `pattern` one for all of a
    proper box, whose four groups are x0, y0, x1, y1. A value of `scale` is the far edge of the
    frame: `padded-square` or `original`. In the frame `resized` it is one pixel of the picture as
    the model was shown it. `form` is the usual answer with `#` for a digit, of which drafts are
    made; null where there is none.
    """

    attempt: str
    pattern: str
    scale: float
    frame: Frame
    form: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureFrame:
    """A picture, and what of it the model was shown.

    `size` is (width, height) of the picture. `shown` is (left, top, width, height) of what the
    model was shown, in pixels of the picture: padding makes it larger than that. `resized` is
    (width, height) of the same in the pixels that the model was given.
    """

    size: tuple[int, int]
    shown: tuple[int, int, int, int]
    resized: tuple[int, int]

    @classmethod
    def whole(cls, size: tuple[int, int]) -> PictureFrame:
        """A picture that is shown as it is."""
        return cls(size=size, shown=(0, 0, *size), resized=size)

    @classmethod
    def padded(cls, size: tuple[int, int], resized: tuple[int, int]) -> PictureFrame:
        """A picture in the middle of a square as wide as its longest side."""
        side = max(size)
        left, top = (side - size[0]) // 2, (side - size[1]) // 2
        return cls(size=size, shown=(-left, -top, side, side), resized=resized)

    def place(self, values: Sequence[float]) -> list[float]:
        """Corners as fractions of what was shown, in pixels of the picture."""
        left, top, width, height = self.shown
        x0, y0, x1, y1 = values
        return [left + x0 * width, top + y0 * height, left + x1 * width, top + y1 * height]


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


class Attempt(NamedTuple):
    """What is meant as a box in an answer, from `begin` to `end`.

    `values` are x0, y0, x1, y1 in the box's frame; None where it is no proper one.
    """

    text: str
    begin: int
    end: int
    values: list[float] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedBoxes:
    """The boxes of an answer, and a line for everything in it that is no usable box."""

    boxes: tuple[Box, ...]
    problems: tuple[str, ...]


def parse_boxes(answer: str, spec: BoxFormat, picture: PictureFrame) -> ParsedBoxes:
    """Boxes of an answer in pixels of the picture.

    A box may reach over the edge, where it is cut. One whose corners are reversed, that has no
    area, or that lies outside the picture is reported as a problem and left out.

    Raises:
        PatternError: The expressions of the format take too long.
    """
    boxes: list[Box] = []
    problems: list[str] = []
    for attempt, _, _, values in find_attempts(answer, spec):
        if values is None:
            problems.append(f"malformed box {attempt}")
            continue
        if values[2] <= values[0] or values[3] <= values[1]:
            problems.append(f"degenerate box {attempt}: its corners span no area")
            continue
        box = clip_box(place_corners(values, spec.frame, picture), *picture.size)
        if box is None:
            problems.append(f"box {attempt} lies outside the picture")
        else:
            boxes.append(box)
    if not boxes and not problems:
        problems.append("the answer holds no box")
    return ParsedBoxes(boxes=tuple(boxes), problems=tuple(problems))


def find_attempts(answer: str, spec: BoxFormat) -> list[Attempt]:
    """Whatever is meant as a box in an answer, in its order.

    The one place where the expressions of a format are run. They may be anybody's: they share a
    time limit.

    Raises:
        PatternError: They take too long, or are no expressions.
    """
    matcher = Matcher()
    attempts: list[Attempt] = []
    for begin, end in matcher.find_all(spec.attempt, answer):
        text = answer[begin:end]
        values = _read_corners(matcher.match_whole(spec.pattern, text), spec)
        attempts.append(Attempt(text, begin, end, values))
    return attempts


def _read_corners(groups: tuple[str | None, ...] | None, spec: BoxFormat) -> list[float] | None:
    """Groups as numbers of the frame; groups that are no number, or none, make no box."""
    if groups is None:
        return None
    try:
        values = [float(group or "") / spec.scale for group in groups]
    except ValueError:
        return None
    return None if any(map(math.isnan, values)) else values


def place_corners(values: Sequence[float], frame: str, picture: PictureFrame) -> list[float]:
    """Corners in a frame of the model to pixels of the picture.

    Args:
        values: x0, y0, x1, y1: fractions of the frame, or its pixels where it is `resized`.
        frame: One of Frame.
        picture: That the answer is about.

    Raises:
        BundleError: The bundle names another frame.
    """
    if frame == "original":
        return PictureFrame.whole(picture.size).place(values)
    if frame == "padded-square":
        # Of the picture's own canvas, whether or not the model's mode makes one.
        return PictureFrame.padded(picture.size, picture.resized).place(values)
    if frame == "resized":
        across, down = picture.resized
        x0, y0, x1, y1 = values
        return picture.place((x0 / across, y0 / down, x1 / across, y1 / down))
    raise BundleError(f"box frame '{frame}' is unknown; have {', '.join(get_args(Frame))}")


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
