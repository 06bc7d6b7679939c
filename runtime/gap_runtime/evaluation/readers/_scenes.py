"""Scenes that are drawn when they are asked about, whichever generator draws them.

The underscore keeps this file from being taken for a reader.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from PIL import Image

from gap_runtime.errors import UnknownNameError, describe_unknown
from gap_runtime.evaluation.expression import Expression
from gap_runtime.evaluation.refshapes import Question
from gap_runtime.pictures.boxes import Box


class Scene(Protocol):
    """A picture with what can be asked of it."""

    @property
    def image(self) -> Image.Image:
        """The picture."""

    @property
    def questions(self) -> Sequence[Question]:
        """Phrases, each with its box in pixels and its object."""


class Draw(Protocol):
    """A generator of scenes."""

    def __call__(self, split: str, index: int, /) -> Scene:
        """The scene of a split with that index."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScenePicture:
    """A drawn picture; `prefix` tells one generator's keys from another's."""

    draw: Draw
    prefix: str
    split: str
    index: int

    @property
    def key(self) -> str:
        """Its place in the generator."""
        return f"{self.prefix}{self.split}/{self.index}"

    def load(self) -> Image.Image:
        """The picture."""
        return self.draw(self.split, self.index).image


def read_scenes(
    draw: Draw, splits: Collection[str], split: str, prefix: str = ""
) -> Iterator[Expression]:
    """Phrases without end, scene by scene.

    Args:
        draw: The generator.
        splits: Those that it has.
        split: The one that is asked for.
        prefix: Of every key.

    Raises:
        UnknownNameError: There is no such split.
    """
    if split not in splits:
        raise UnknownNameError(describe_unknown("split", split, splits))
    for index in count():
        scene = draw(split, index)
        picture = ScenePicture(draw=draw, prefix=prefix, split=split, index=index)
        for k, question in enumerate(scene.questions):
            x0, y0, x1, y1 = question.box
            yield Expression(
                key=f"{picture.key}/{k}",
                picture=picture,
                phrase=question.phrase,
                box=Box(float(x0), float(y0), float(x1), float(y1)),
                size=scene.image.size,
                target=f"{index}/{question.target}",
            )
