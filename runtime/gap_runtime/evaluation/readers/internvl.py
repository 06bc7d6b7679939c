"""Qwen-VL's and InternVL's lines: {image, sent, bbox, width, height}, x0 y0 x1 y1 in pixels.

References:
    OpenGVLab/InternVL, internvl_chat/eval/refcoco; QwenLM/Qwen-VL, eval_mm.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from gap_runtime.evaluation.expression import Expression, find_picture
from gap_runtime.evaluation.fields import read_corners, read_path, read_size, read_text
from gap_runtime.evaluation.files import read_lines
from gap_runtime.evaluation.source import Source, existing

SUFFIXES: Final = (".jsonl",)
USUAL: Final = None


def recognise(head: Any) -> bool:
    """Whether it is of this format."""
    return isinstance(head, dict) and {"image", "sent", "bbox"} <= set(head)


def locate(folder: Path, source: Source) -> tuple[Path, ...]:
    """`SET_SPLIT.jsonl` or `SET/SET_SPLIT.jsonl`."""
    file = f"{source.name}_{source.split}.jsonl"
    return existing(folder / file, folder / source.name / file)


def read(source: Source) -> Iterator[Expression]:
    """All lines; each is one phrase."""
    path = source.path
    for number, record in read_lines(path):
        where = f"{path}:{number}"
        name = read_path(record, "image", where)
        yield Expression(
            key=str(number),
            picture=find_picture(name, source.image_folder, where, turned=False, flat=True),
            phrase=read_text(record, "sent", where),
            box=read_corners(record, "bbox", where),
            size=read_size(record, where),
            target="",
        )
