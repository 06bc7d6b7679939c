"""The generator of pictures of 224 pixels: scenes of a split, drawn when they are asked about."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Final

from PIL import Image

from gap_runtime.errors import UnknownNameError, describe_unknown
from gap_runtime.evaluation.expression import Expression
from gap_runtime.evaluation.refshapes256 import SPLITS, draw_scene
from gap_runtime.evaluation.source import Source
from gap_runtime.pictures.boxes import Box

SUFFIXES: Final = ()
USUAL: Final = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class ScenePicture:
    """A drawn picture."""

    split: str
    index: int

    @property
    def key(self) -> str:
        """Its place in the generator."""
        return f"256/{self.split}/{self.index}"

    def load(self) -> Image.Image:
        """The picture."""
        return draw_scene(self.split, self.index).image


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
    if source.split not in SPLITS:
        raise UnknownNameError(describe_unknown("split", source.split, SPLITS))
    for index in count():
        scene = draw_scene(source.split, index)
        picture = ScenePicture(split=source.split, index=index)
        for k, question in enumerate(scene.questions):
            x0, y0, x1, y1 = question.box
            yield Expression(
                key=f"256/{source.split}/{index}/{k}",
                picture=picture,
                phrase=question.phrase,
                box=Box(float(x0), float(y0), float(x1), float(y1)),
                size=scene.image.size,
                target=f"{index}/{question.target}",
            )
