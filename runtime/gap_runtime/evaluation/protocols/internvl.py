"""InternVL's evaluate_grounding.py: the first bracketed four, in thousandths if they are large.

Whatever stands between the brackets and three commas must be numbers, or the answer is [0, 0, 0,
0] even where a proper box follows. A sum of 4 or more means thousandths. The frame is the
picture's own, the arithmetic that of 32-bit floats.

References:
    OpenGVLab/InternVL, internvl_chat/eval/refcoco/evaluate_grounding.py.
"""

from __future__ import annotations

from typing import Final

from gap_runtime.evaluation.protocol import (
    NO_BOX,
    Judgement,
    Measure,
    are_coordinates,
    judge_singles,
    round_singles,
)
from gap_runtime.pictures.boxes import Box, BoxFormat, PictureFrame

SUMMARY: Final = "first [a,b,c,d], thousandths if they sum to 4, no unpadding; IoU >= t"
STRICT: Final = False
FRAME: Final = "original"
MEASURE: Final[Measure] = "iou"


def judge(answer: str, picture: PictureFrame, box: Box, spec: BoxFormat) -> Judgement:
    """Judge one answer."""
    del spec
    parts = find_parts(answer)
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        return NO_BOX
    if len(numbers) != 4 or not are_coordinates(*numbers):
        return NO_BOX
    width, height = picture.size
    x0, y0, x1, y1 = round_singles(*numbers)
    (two,) = round_singles(x0 + y0)
    (three,) = round_singles(two + x1)
    if round_singles(three + y1)[0] >= 4:
        x0, y0, x1, y1 = round_singles(x0 / 1000, y0 / 1000, x1 / 1000, y1 / 1000)
    x0, y0, x1, y1 = round_singles(x0 * width, y0 * height, x1 * width, y1 * height)
    true = round_singles(*box)
    return judge_singles((x0, y0, x1, y1), (true[0], true[1], true[2], true[3]))


def find_parts(answer: str) -> list[str]:
    r"""What the script's pattern finds first, `\[*\[(.*?),(.*?),(.*?),(.*?)\]\]*`.

    The same in time that grows with the length: its pattern tries all choices of commas in a text
    that has no closing bracket.
    """
    for line in answer.split("\n"):
        _, bracket, rest = line.partition("[")
        pieces = rest.lstrip("[").split(",", 3)
        if not bracket or len(pieces) < 4:
            continue
        last, closing, _ = pieces[3].partition("]")
        if closing:
            return [*pieces[:3], last]
    return []
