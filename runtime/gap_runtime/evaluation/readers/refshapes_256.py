"""The generator of pictures of 224 pixels: scenes of a split, drawn when they are asked about."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from gap_runtime.evaluation.expression import Expression
from gap_runtime.evaluation.readers._scenes import read_scenes
from gap_runtime.evaluation.refshapes256 import SPLITS, draw_scene
from gap_runtime.evaluation.source import Source

SUFFIXES: Final = ()
USUAL: Final = 1000


def recognise(head: Any) -> bool:
    """No file is of this format."""
    del head
    return False


def locate(folder: Path, source: Source) -> tuple[Path, ...]:
    """No file is of this format."""
    del folder, source
    return ()


def read(source: Source) -> Iterator[Expression]:
    """Phrases without end, scene by scene."""
    return read_scenes(draw_scene, SPLITS, source.split, prefix="256/")
