"""MiniGPT-v2's eval_ref.py without resampling: {<x0><y0><x1><y1>} at the start, in hundredths.

Spaces and `<unk>` are taken out first. An answer that starts with anything else has no box. The
IoU counts pixels, both edges included (+1), and has to be above the threshold. The frame is the
picture's own.

References:
    Vision-CAIR/MiniGPT-4, eval_scripts/eval_ref.py and minigpt4/common/eval_utils.py.
"""

from __future__ import annotations

import re
from typing import Final

from gap_runtime.evaluation.protocol import NO_BOX, Judgement, Measure, judge_corners
from gap_runtime.pictures.boxes import Box, BoxFormat, PictureFrame

SUMMARY: Final = "{<a><b><c><d>} at the start, hundredths; pixels counted (+1); IoU > t"
STRICT: Final = True
FRAME: Final = "original"
MEASURE: Final[Measure] = "iou"
_SCALE: Final = 100.0
_FOUND: Final = re.compile(r"\{<(\d{1,3})><(\d{1,3})><(\d{1,3})><(\d{1,3})>\}")


def judge(answer: str, picture: PictureFrame, box: Box, spec: BoxFormat) -> Judgement:
    """Judge one answer."""
    del spec
    match = _FOUND.match(answer.replace("<unk>", "").replace(" ", "").strip())
    if match is None:
        return NO_BOX
    x0, y0, x1, y1 = (int(group) / _SCALE for group in match.groups())
    width, height = picture.size
    return judge_corners((x0 * width, y0 * height, x1 * width, y1 * height), box, edge=1.0)
