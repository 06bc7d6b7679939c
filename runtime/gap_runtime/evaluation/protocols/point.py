"""Point in box, as ScreenSpot-v2 and ScreenSpot-Pro are scored: a click has to hit the target.

The point is the centre of the first proper box. Where the answer holds none, it is the first pair
of numbers in brackets, in the frame and scale of the model's boxes. It may lie on the true box's
edge.

References:
    likaixin2000/ScreenSpot-Pro-GUI-Grounding, eval_screenspot_pro.py and models/internvl.py.
"""

from __future__ import annotations

import re
from typing import Final

from gap_runtime.evaluation.protocol import (
    BOX,
    DEGENERATE,
    NO_BOX,
    Judgement,
    Measure,
    are_coordinates,
    find_first,
)
from gap_runtime.pictures.boxes import Box, BoxFormat, PictureFrame, place_corners

SUMMARY: Final = "centre of the first box, or the first point, inside the true box; no IoU"
STRICT: Final = False
FRAME: Final = None
MEASURE: Final[Measure] = "point"
_NUMBER: Final = r"(-?\d+(?:\.\d+)?)"
_PAIR: Final = re.compile(rf"[\[(<{{]\s*{_NUMBER}\s*,\s*{_NUMBER}\s*[\])>}}]")


def judge(answer: str, picture: PictureFrame, box: Box, spec: BoxFormat) -> Judgement:
    """Judge one answer."""
    values = find_first(answer, spec)
    if values is None:
        match = _PAIR.search(answer)
        if match is None:
            return NO_BOX
        x, y = (float(group) / spec.scale for group in match.groups())
        if not are_coordinates(x, y):
            return NO_BOX
        values = (x, y, x, y)
        status = BOX
    else:
        x0, y0, x1, y1 = values
        # The scripts take the centre whatever the order of the corners.
        status = BOX if x0 < x1 and y0 < y1 else DEGENERATE
    x0, y0, x1, y1 = place_corners(values, spec.frame, picture)
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    inside = box[0] <= x <= box[2] and box[1] <= y <= box[3]
    return Judgement(float(inside), status)
