"""What the model with 256 tokens is shown when, and how fast it learns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from recipe.sizes import GRID


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A part of the curriculum, by default as it ends.

    `plain` is the share of plain phrases where there are others, `rate` the learning rate of the
    matrices. The weights of losses: `kind` for the colour and shape of patches,
    `centre` for where the phrase's object is, `edge` for where
    in a patch its object's sides are, `bind` for the attention from a question to its object,
    `look` for that from CLS to all objects. With `lower`, every third step has pictures of 4, 8
    or 12 rows. `hidden` is the largest share of a picture's patches that an attention head of the
    language model does not see; which ones is another draw for every picture, head and layer.
    """

    rows: int = GRID
    pictures: int = 5
    questions: int = 7
    least: int = 2
    most: int = 6
    repeats: float = 0.4
    plain: float = 0.6
    rate: float = 4e-3
    kind: float = 0.5
    centre: float = 0.2
    edge: float = 0.2
    bind: float = 0.3
    look: float = 0.2
    hidden: float = 0.0
    lower: bool = False


STEPS: Final = 4325
GAZE: Final = 400
"""Steps behind them that train the tower alone."""
_FULL: Final = Stage()
_HALF: Final = Stage(rows=8, pictures=6, questions=6, most=5, look=0.05)
_LOW: Final = Stage(rows=4, pictures=8, questions=4, most=3, repeats=0.2, plain=0.8, look=0.05)
_UNBOUND: Final = replace(_LOW, kind=0.15, centre=0.1, edge=0.0, bind=0.0)
_FEW: Final = replace(_UNBOUND, pictures=12, least=1, repeats=0.0, plain=1.0, rate=2e-3)
GAZE_STAGE: Final = Stage(pictures=8, questions=1)
CURRICULUM: Final = (
    (400, replace(_FEW, pictures=16, questions=3, most=1)),
    (750, _FEW),
    (1109, _UNBOUND),
    (1556, replace(_LOW, edge=0.0)),
    (1700, _LOW),
    (1972, _HALF),
    (2320, replace(_FULL, look=0.05)),
    (2767, _FULL),
    (3502, replace(_FULL, lower=True)),
    (3625, replace(_FULL, lower=True, look=0.6)),
    (STEPS, replace(_FULL, hidden=0.8)),
)
"""(until this step, how)."""
RATES: Final = (
    (0, 0.01),
    (99, 1),
    (2434, 1),
    (2435, 0.977),
    (3501, 0.154),
    (3502, 0.097),
    (3625, 0),
    (3675, 0.3),
    (STEPS, 0),
)
"""(step, share of the full learning rates), straight lines between."""
SETTLING: Final = 3256
"""From this step on attention is dropped: no answer hangs on single tokens."""
