"""Python's search for cycles of dead objects, made seldom while an export runs.

Loading torch and transformers and capturing graphs make millions of objects, most of which stay.
Looking through all of them again and again took an eighth of an export's time, and freed little.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Final

_THRESHOLDS: Final = 100_000, 10, 10
"""New objects before the youngest are looked through, and looks before older ones are."""


@contextlib.contextmanager
def rare_collections() -> Iterator[None]:
    """Search seldom; as a decorator, while a function runs."""
    before = gc.get_threshold()
    gc.set_threshold(*_THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*before)
