"""Qwen2.5-VL's frame, as IVC-Prune's VLMEvalKit scores it: pixels of the resized picture.

The model sees the picture with its sides rounded to multiples of 28 and answers in pixels of that
picture: {"bbox_2d": [x0, y0, x1, y1]}. So the true box is taken to the resized picture, and
rounded to whole pixels there. An IoU does not change where both boxes are stretched alike; only
the rounding counts, and a true box that stays in the original picture is another box.

The sides are rounded to the nearest multiple, as the script does; the model's own resizing also
keeps the picture between its least and most pixels, which no picture of COCO reaches.

References:
    FireRedTeam/IVC-Prune, VLMEvalKit/convert_to_tsv.py (--qwen25), vlmeval/vlm/ivcp/
    qwen2_5_ivcp.py and vlmeval/dataset/image_grounding.py.
"""

from __future__ import annotations

import re
from typing import Final

from gap_runtime.evaluation.protocol import (
    NO_BOX,
    Corners,
    Judgement,
    Measure,
    are_coordinates,
    judge_singles,
    round_singles,
)
from gap_runtime.pictures.boxes import Box, BoxFormat, PictureFrame

SUMMARY: Final = 'first "bbox_2d" in pixels of the picture resized to multiples of 28; IoU >= t'
STRICT: Final = False
FRAME: Final = "resized to multiples of 28"
MEASURE: Final[Measure] = "iou"
_FACTOR: Final = 28
_FOUND: Final = re.compile(r'"bbox_2d":\s*\[(\d+),\s*(\d+),\s*(\d+),\s*(\d+)\]')
_FRACTION: Final = 1.1
"""The script takes a box whose numbers are all below this one for fractions of the picture."""


def judge(answer: str, picture: PictureFrame, box: Box, spec: BoxFormat) -> Judgement:
    """Judge one answer."""
    del spec
    match = _FOUND.search(answer)
    if match is None:
        return NO_BOX
    x0, y0, x1, y1 = (float(group) for group in match.groups())
    if not are_coordinates(x0, y0, x1, y1):
        return NO_BOX
    if max(x0, y0, x1, y1) <= _FRACTION:
        width, height = picture.size
        x0, y0, x1, y1 = x0 * width, y0 * height, x1 * width, y1 * height
    x0, y0, x1, y1 = round_singles(x0, y0, x1, y1)
    return judge_singles((x0, y0, x1, y1), resize_box(box, picture.size))


def resize_box(box: Box, size: tuple[int, int]) -> Corners:
    """The true box in whole pixels of the resized picture."""
    scale_x, scale_y = (round(side / _FACTOR) * _FACTOR / side for side in size)
    x0, y0, x1, y1 = (
        float(round(value * scale))
        for value, scale in zip(box, (scale_x, scale_y, scale_x, scale_y), strict=True)
    )
    return x0, y0, x1, y1
