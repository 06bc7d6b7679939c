"""Ref-L4's evaluation: the first box in pixels of the picture, IoU above the threshold.

Its script takes boxes in pixels and leaves open how they are read out of an answer; here it is the
first proper one, taken back from the frame that the model answers in, and not cut at the edges.
The arithmetic is that of 32-bit floats. The same script scored RefCOCO's reviewed labels.

References:
    JierunChen/Ref-L4, ref_l4/evaluation.py and ref_l4/overlaps.py.
"""

from __future__ import annotations

from typing import Final

from gap_runtime.evaluation.protocol import (
    NO_BOX,
    Judgement,
    Measure,
    find_first,
    judge_singles,
    round_singles,
)
from gap_runtime.pictures.boxes import Box, BoxFormat, PictureFrame, place_corners

SUMMARY: Final = "first box in the model's own frame, not cut; IoU > t"
STRICT: Final = True
FRAME: Final = None
MEASURE: Final[Measure] = "iou"


def judge(answer: str, picture: PictureFrame, box: Box, spec: BoxFormat) -> Judgement:
    """Judge one answer."""
    values = find_first(answer, spec)
    if values is None:
        return NO_BOX
    x0, y0, x1, y1 = round_singles(*place_corners(values, spec.frame, picture))
    true = round_singles(*box)
    return judge_singles((x0, y0, x1, y1), (true[0], true[1], true[2], true[3]))
