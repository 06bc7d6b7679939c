"""MiniGPT-v2's evaluation files: a JSON list of {img_id, sents, bbox, height, width}.

`bbox` is xywh in pixels. The picture is named by the first 27 characters of `img_id`, which ends
in a number that tells the object.

References:
    Vision-CAIR/MiniGPT-4, eval_scripts/eval_ref.py and minigpt4/datasets/datasets/coco_caption.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from gap_runtime.evaluation.expression import Expression, find_picture
from gap_runtime.evaluation.fields import (
    need,
    read_extent,
    read_name,
    read_size,
    read_text,
)
from gap_runtime.evaluation.files import read_records
from gap_runtime.evaluation.source import Source, existing
from gap_runtime.pictures.boxes import Box

SUFFIXES: Final = (".json",)
USUAL: Final = None
_NAME_LENGTH: Final = 27


def recognise(head: Any) -> bool:
    """Whether it is of this format."""
    first = head[0] if isinstance(head, list) and head else None
    return isinstance(first, dict) and {"img_id", "sents", "bbox"} <= set(first)


def locate(folder: Path, source: Source) -> tuple[Path, ...]:
    """`SET/SET_SPLIT.json` or `SET_SPLIT.json`."""
    file = f"{source.name}_{source.split}.json"
    return existing(folder / source.name / file, folder / file)


def read(source: Source) -> Iterator[Expression]:
    """All records; each is one phrase."""
    path = source.path
    boxes: dict[str, Box] = {}
    shared: set[str] = set()
    for k, record in enumerate(read_records(path)):
        where = f"{path}: record {k}"
        name = read_name(record, "img_id", where)
        box = read_extent(record, "bbox", where)
        if boxes.setdefault(name, box) != box:
            shared.add(name)
        yield Expression(
            key=str(k),
            picture=find_picture(
                f"{name[:_NAME_LENGTH]}.jpg",
                source.image_folder,
                where,
                turned=False,
                flat=True,
            ),
            phrase=_read_phrase(record, where),
            box=box,
            size=read_size(record, where),
            target=name,
        )
    if shared:
        source.notes.append(
            f"{path}: {len(shared)} img_id name more than one box, first {min(shared)}; the "
            "published script scores them all against the last one, here each has its own"
        )


def _read_phrase(record: Any, where: str) -> str:
    """`sents`: text, or a list of one."""
    value = need(record, "sents", where)
    if isinstance(value, list) and len(value) == 1:
        return read_text({"sents": value[0]}, "sents", where)
    return read_text(record, "sents", where)
