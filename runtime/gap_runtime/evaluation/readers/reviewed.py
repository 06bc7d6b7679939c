"""RefCOCO, RefCOCO+ and RefCOCOg as Ref-L4's authors reviewed them: `SET_SPLIT_reviewed.json`.

MDETR's files with `caption_quality` in every annotation: 1 where phrase and box were found right,
0 where the phrase fits several objects or none, or the box is wrong. Phrases and boxes are those
that were published: the review leaves some out and changes none.

References:
    J. Chen et al., Revisiting Referring Expression Comprehension Evaluation in the Era of Large
    Multimodal Models, 2024; JierunChen/Ref-L4, refcocos_annotation_reviewed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from gap_runtime.errors import InputError
from gap_runtime.evaluation.expression import Expression
from gap_runtime.evaluation.fields import describe, need
from gap_runtime.evaluation.readers import mdetr
from gap_runtime.evaluation.source import Source, existing

SUFFIXES: Final = (".json",)
USUAL: Final = None
_FOLDER: Final = "refcocos_annotation_reviewed"


def recognise(head: Any) -> bool:
    """Whether it is of this format."""
    return mdetr.is_coco(head) and mdetr.is_reviewed(head)


def locate(folder: Path, source: Source) -> tuple[Path, ...]:
    """`SET_SPLIT_reviewed.json`, or in the folder that they are published in."""
    file = f"{source.name}_{source.split}_reviewed.json"
    return existing(folder / file, folder / _FOLDER / file)


def read(source: Source) -> Iterator[Expression]:
    """All image records; each is one phrase, with what the review said of it."""
    for expression, annotation, where in mdetr.read_pairs(source):
        quality = need(annotation, mdetr.QUALITY, where)
        if quality not in (0, 1):
            raise InputError(
                f"{where}: '{mdetr.QUALITY}' is {describe(quality)}, expected 0 (wrong) or 1"
            )
        yield replace(expression, wrong=quality == 0)
