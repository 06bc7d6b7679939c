"""How an answer is judged: what every protocol gives, and the arithmetic that they share."""

from __future__ import annotations

from struct import Struct
from typing import Final, Literal, NamedTuple, Protocol

from gap_runtime.errors import UnknownNameError, describe_unknown
from gap_runtime.evaluation import PROTOCOLS
from gap_runtime.pictures.boxes import Box, BoxFormat, PictureFrame, find_attempts
from gap_runtime.registry import list_plugins, load_plugin

BOX: Final = "box"
UNPARSABLE: Final = "unparsable"
DEGENERATE: Final = "degenerate"
Corners = tuple[float, float, float, float]
"""x0, y0, x1, y1 in whatever frame a script compares them."""
Measure = Literal["iou", "point"]
DEFAULT_PROTOCOL: Final = "frame"
RENAMED: Final = {"ours": "frame"}
"""Old names, accepted for this release, and the new ones."""
_SINGLES: Final = [Struct(f"{count}f") for count in range(7)]
_LARGEST: Final = 1e15
"""Numbers beyond are no coordinates: whatever a script makes of them is wrong."""


class Judgement(NamedTuple):
    """IoU with the true box, at least 0 (a script's negative one is 0), and what was found.

    Where the protocol measures points, `iou` is 1 for a point in the true box and 0 for others.

    `status` is `box`, `unparsable` (no box where the protocol expects one) or `degenerate` (one
    that spans no area: reversed corners, a line, a point, nothing inside the picture).
    """

    iou: float
    status: str


NO_BOX: Final = Judgement(0.0, UNPARSABLE)


class ScoringProtocol(Protocol):
    """A module in gap_runtime.evaluation.protocols."""

    SUMMARY: str
    """What it does, in one line."""

    STRICT: bool
    """Whether an answer counts from IoU > threshold, or from IoU >= threshold."""

    FRAME: str | None
    """The frame that boxes are compared in; None for the one that the model answers in."""

    MEASURE: Measure
    """What `judge` gives: an IoU, or 1 where a point lies in the true box and else 0."""

    def judge(self, answer: str, picture: PictureFrame, box: Box, spec: BoxFormat) -> Judgement:
        """Judge one answer.

        Args:
            answer: Text.
            picture: Its size, and what of it the model was shown.
            box: The true one, in pixels.
            spec: How the model writes boxes; the published scripts do not ask.
        """


def list_protocols() -> list[str]:
    """Names of all protocols."""
    return [name.replace("_", "-") for name in list_plugins(PROTOCOLS)]


def load_protocol(name: str) -> ScoringProtocol:
    """A protocol by its name, or by its old one.

    Raises:
        UnknownNameError: There is none.
    """
    name = RENAMED.get(name, name)
    if name not in list_protocols():
        raise UnknownNameError(describe_unknown("protocol", name, list_protocols()))
    protocol: ScoringProtocol = load_plugin(PROTOCOLS, name.replace("-", "_"), "protocol")
    return protocol


def find_first(answer: str, spec: BoxFormat) -> Corners | None:
    """The first proper box of an answer as fractions of the model's frame, in whatever order.

    None where there is none, or a number in it is too large for a coordinate.
    """
    for _, _, _, values in find_attempts(answer, spec):
        if values is not None:
            x0, y0, x1, y1 = values
            return (x0, y0, x1, y1) if are_coordinates(x0, y0, x1, y1) else None
    return None


def are_coordinates(*numbers: float) -> bool:
    """Whether all are numbers of a size that arithmetic in 32 bits can hold."""
    return all(abs(number) <= _LARGEST for number in numbers)


def judge_corners(found: Corners, true: Corners, *, edge: float = 0.0) -> Judgement:
    """IoU as the scripts compute it, without looking whether corners are in order.

    Args:
        found: The answer's box.
        true: The true one, in the same frame.
        edge: Added to every width and height: 1 where pixels are counted.
    """
    across = max(0.0, min(found[2], true[2]) - max(found[0], true[0]) + edge)
    down = max(0.0, min(found[3], true[3]) - max(found[1], true[1]) + edge)
    shared = across * down
    area = (found[2] - found[0] + edge) * (found[3] - found[1] + edge)
    other = (true[2] - true[0] + edge) * (true[3] - true[1] + edge)
    joined = area + other - shared
    status = BOX if found[0] < found[2] and found[1] < found[3] else DEGENERATE
    # A reversed box has a negative area in all of them; where it cancels out they divide by 0.
    value = shared / joined if joined else 0.0
    return Judgement(max(value, 0.0), status)


def judge_singles(found: Corners, true: Corners) -> Judgement:
    """The same in the arithmetic of 32-bit floats, which decides where an IoU is the threshold.

    Every operation on doubles is rounded to 32 bits, which gives what 32-bit hardware gives.

    Args:
        found: The answer's box, its values rounded by `round_singles`.
        true: The true one, in the same frame, rounded too.
    """
    status = BOX if found[0] < found[2] and found[1] < found[3] else DEGENERATE
    try:
        across, down, width, height, true_width, true_height = round_singles(
            max(0.0, min(found[2], true[2]) - max(found[0], true[0])),
            max(0.0, min(found[3], true[3]) - max(found[1], true[1])),
            found[2] - found[0],
            found[3] - found[1],
            true[2] - true[0],
            true[3] - true[1],
        )
        shared, area, other = round_singles(
            across * down, width * height, true_width * true_height
        )
        (both,) = round_singles(area + other)
        (joined,) = round_singles(both - shared)
        (value,) = round_singles(shared / joined if joined else 0.0)
    except OverflowError:
        # Endless in 32 bits: the IoU is 0 or not a number, which no threshold is below.
        return Judgement(0.0, status)
    return Judgement(max(value, 0.0), status)


def round_singles(*values: float) -> tuple[float, ...]:
    """Values rounded to 32 bits.

    Raises:
        OverflowError: One is too large for them.
    """
    form = _SINGLES[len(values)]
    return form.unpack(form.pack(*values))
