"""The sizes of the model with 256 tokens."""

from __future__ import annotations

from typing import Final

from gap_runtime.evaluation.refshapes import COLOURS
from gap_runtime.evaluation.refshapes256 import CELL, SHAPES, SIDE
from recipe.base import HEAD_DIM, WIDTH

# B pictures, Q questions each, N patches, P tokens before them, T tokens of a question, D width,
# H heads, d width of a head, S = P + N.
GRID: Final = SIDE // CELL
HEADS: Final = WIDTH // HEAD_DIM
LAYERS: Final = 6
CLASSES: Final = len(COLOURS) * len(SHAPES)
EDGES: Final = 1 + CELL // 2
"""A side of a box is not in a patch, or within two of its pixels."""
