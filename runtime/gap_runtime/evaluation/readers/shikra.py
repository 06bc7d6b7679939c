"""Shikra's lines: {img_path, expression, bbox, height, width}, x0 y0 x1 y1 in pixels.

References:
    shikras/shikra, mllm/dataset/single_image_dataset/rec.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from gap_runtime.evaluation.expression import Expression, find_picture
from gap_runtime.evaluation.fields import read_corners, read_path, read_size, read_text
from gap_runtime.evaluation.files import read_lines
from gap_runtime.evaluation.source import Source, existing
from gap_runtime.evaluation.splits import USUAL_BY

SUFFIXES: Final = (".jsonl",)
USUAL: Final = None


def recognise(head: Any) -> bool:
    """Whether it is of this format."""
    return isinstance(head, dict) and {"img_path", "expression", "bbox"} <= set(head)


def locate(folder: Path, source: Source) -> tuple[Path, ...]:
    """`REC_SET_BY_SPLIT.jsonl`."""
    by = source.by or USUAL_BY.get(source.name, "unc")
    return existing(folder / f"REC_{source.name}_{by}_{source.split}.jsonl")


def read(source: Source) -> Iterator[Expression]:
    """All lines; each is one phrase."""
    path = source.path
    for number, record in read_lines(path):
        where = f"{path}:{number}"
        name = read_path(record, "img_path", where)
        yield Expression(
            key=str(number),
            picture=find_picture(name, source.image_folder, where, turned=False, flat=True),
            phrase=read_text(record, "expression", where),
            box=read_corners(record, "bbox", where),
            size=read_size(record, where),
            target="",
        )
