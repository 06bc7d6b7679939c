"""Shikra's rec.py: exactly one box, both boxes in the padded square, IoU above the threshold.

The answer's box is written [x0,y0,x1,y1] without spaces or signs. The true box goes through the
same text: as fractions of the padded square, cut to [0, 1], with three decimals. The arithmetic is
that of 32-bit floats on both boxes times 1000.

References:
    shikras/shikra, mllm/dataset/single_image_dataset/rec.py, process_function/
    box_process_function.py and utils/transform.py.
"""

from __future__ import annotations

import re
from typing import Final

from gap_runtime.evaluation.protocol import (
    NO_BOX,
    Corners,
    Judgement,
    Measure,
    judge_singles,
    round_singles,
)
from gap_runtime.pictures.boxes import Box, BoxFormat, PictureFrame

SUMMARY: Final = "exactly one [a,b,c,d], both boxes in the padded square; IoU > t"
STRICT: Final = True
FRAME: Final = "padded-square"
MEASURE: Final[Measure] = "iou"
_NUMBER: Final = r"\d(?:\.\d*)?"
_BOX: Final = rf"{_NUMBER}(?:,{_NUMBER}){{3}}"
_FOUND: Final = re.compile(rf"\[({_BOX}(?:;{_BOX})*)\]")


def judge(answer: str, picture: PictureFrame, box: Box, spec: BoxFormat) -> Judgement:
    """Judge one answer."""
    del spec
    found = _FOUND.findall(answer)
    if len(found) != 1 or ";" in found[0]:
        return NO_BOX
    values = [float(number) for number in found[0].split(",")]
    return judge_singles(_scale(values), _scale(pad_box(box, picture.size)))


def pad_box(box: Box, size: tuple[int, int]) -> list[float]:
    """The true box as the script parses it back: fractions of the square with three decimals."""
    width, height = size
    side = max(size)
    shifts = ((side - width) // 2, (side - height) // 2)
    return [
        round(min(max((value + shifts[k % 2]) / side, 0.0), 1.0), 3) for k, value in enumerate(box)
    ]


def _scale(values: list[float]) -> Corners:
    x0, y0, x1, y1 = round_singles(*values)
    x0, y0, x1, y1 = round_singles(x0 * 1000, y0 * 1000, x1 * 1000, y1 * 1000)
    return x0, y0, x1, y1
