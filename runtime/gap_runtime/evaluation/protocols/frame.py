"""The frame that the model answers in; exactly one usable box, else the answer is wrong.

The bundle says how the model writes boxes. A padded square is taken back to the picture, a box is
cut at its edges, reversed corners are not mended. IoU counts from the threshold on (>=).
"""

from __future__ import annotations

from typing import Final

from gap_runtime.evaluation.protocol import DEGENERATE, NO_BOX, Judgement, Measure, judge_corners
from gap_runtime.pictures.boxes import Box, BoxFormat, PictureFrame, find_attempts, parse_boxes

SUMMARY: Final = "the model's own frame; exactly one usable box; IoU >= t"
STRICT: Final = False
FRAME: Final = None
MEASURE: Final[Measure] = "iou"


def judge(answer: str, picture: PictureFrame, box: Box, spec: BoxFormat) -> Judgement:
    """Judge one answer."""
    found = parse_boxes(answer, spec, picture).boxes
    if len(found) == 1:
        return judge_corners(found[0], box)
    # A box that is written properly and spans nothing is no box either, but another mistake.
    if not found and any(each.values is not None for each in find_attempts(answer, spec)):
        return Judgement(0.0, DEGENERATE)
    return NO_BOX
