"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """A path beside the given one to write to; the file takes its place when the block ends.

    Where an error ends the block, what lay there before is unchanged and nothing lies beside it.

    Raises:
        OSError: It cannot be written there.
    """
    aside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
