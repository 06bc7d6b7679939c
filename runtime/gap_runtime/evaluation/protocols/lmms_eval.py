"""lmms-eval's refcoco_bbox_rec: the first four numbers in brackets, as fractions of the picture.

The frame is always the picture's own, so a model that answers for a padded square is scored in
the wrong one unless the picture is square. Without a box the answer is [0, 0, 0, 0].

References:
    EvolvingLMMs-Lab/lmms-eval, lmms_eval/tasks/refcoco/utils_rec.py.
"""

from __future__ import annotations

import re
from typing import Final

from gap_runtime.evaluation.protocol import NO_BOX, Judgement, Measure, judge_corners
from gap_runtime.pictures.boxes import Box, BoxFormat, PictureFrame

SUMMARY: Final = "first [a, b, c, d] as fractions of the picture, no unpadding; IoU >= t"
STRICT: Final = False
FRAME: Final = "original"
MEASURE: Final[Measure] = "iou"
_NUMBER: Final = r"(-?\d+(?:\.\d+)?)"
_FOUND: Final = re.compile(rf"\[\s*{_NUMBER},\s*{_NUMBER},\s*{_NUMBER},\s*{_NUMBER}\s*\]")


def judge(answer: str, picture: PictureFrame, box: Box, spec: BoxFormat) -> Judgement:
    """Judge one answer."""
    del spec
    match = _FOUND.search(answer)
    if match is None:
        return NO_BOX
    x0, y0, x1, y1 = (float(group) for group in match.groups())
    width, height = picture.size
    true = (box[0] / width, box[1] / height, box[2] / width, box[3] / height)
    return judge_corners((x0, y0, x1, y1), true)
