"""Where visual tokens lie in what a model was shown of a picture."""

from __future__ import annotations

from gap_runtime.pictures.preprocess import Bucket, Preprocess

Cell = tuple[float, float, float, float]
"""x0, y0, x1, y1 as fractions of what was shown."""


def find_cells(bucket: Bucket, spec: Preprocess) -> dict[int, Cell]:
    """The tokens of the last grid, which covers all that is shown; of several it is the finest."""
    del spec
    rows, columns = bucket.grids[-1]
    return {
        token: (
            place % columns / columns,
            place // columns / rows,
            (place % columns + 1) / columns,
            (place // columns + 1) / rows,
        )
        for place, token in enumerate(bucket.removable[-rows * columns :])
    }
