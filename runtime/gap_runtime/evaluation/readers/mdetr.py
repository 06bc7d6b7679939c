"""MDETR's `finetune_refcoco_val.json`: COCO's form, an image record for each phrase.

    images       [{id, file_name, caption, width, height, original_id}]
    annotations  [{image_id, bbox, original_id}], xywh in pixels, one for each image record

References:
    ashkamath/mdetr, datasets/refexp.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from gap_runtime.errors import InputError
from gap_runtime.evaluation.expression import Expression, find_picture
from gap_runtime.evaluation.fields import (
    read_extent,
    read_list,
    read_name,
    read_path,
    read_size,
    read_text,
)
from gap_runtime.evaluation.files import read_json
from gap_runtime.evaluation.source import Source, existing

SUFFIXES: Final = (".json",)
USUAL: Final = None
QUALITY: Final = "caption_quality"
"""What a review adds to an annotation; see gap_runtime.evaluation.readers.reviewed."""


def recognise(head: Any) -> bool:
    """Whether it is of this format."""
    return is_coco(head) and not is_reviewed(head)


def is_coco(head: Any) -> bool:
    """Whether it has COCO's form."""
    return isinstance(head, dict) and {"images", "annotations"} <= set(head)


def is_reviewed(head: Any) -> bool:
    """Whether the first annotation of a file of COCO's form says what a review found."""
    annotations = head["annotations"]
    first = annotations[0] if isinstance(annotations, list) and annotations else None
    return isinstance(first, dict) and QUALITY in first


def locate(folder: Path, source: Source) -> tuple[Path, ...]:
    """`finetune_SET_SPLIT.json`."""
    return existing(folder / f"finetune_{source.name}_{source.split}.json")


def read(source: Source) -> Iterator[Expression]:
    """All image records; each is one phrase."""
    for expression, _, _ in read_pairs(source):
        yield expression


def read_pairs(source: Source) -> Iterator[tuple[Expression, Any, str]]:
    """All image records as phrases, each with its annotation and the place of the record."""
    path = source.path
    data = read_json(path)
    boxes: dict[str, list[Any]] = {}
    for k, annotation in enumerate(read_list(data, "annotations", str(path))):
        owner = read_name(annotation, "image_id", f"{path}: annotation {k}")
        boxes.setdefault(owner, []).append(annotation)
    for k, record in enumerate(read_list(data, "images", str(path))):
        where = f"{path}: image {k}"
        key = read_name(record, "id", where)
        own = boxes.get(key, [])
        if len(own) != 1:
            raise InputError(
                f"{where}: has {len(own)} annotations, expected the one that is meant"
            )
        file = read_path(record, "file_name", where)
        # The annotation of COCO that this one is a copy of tells the object.
        target = str(own[0].get("original_id", ""))
        expression = Expression(
            key=key,
            picture=find_picture(file, source.image_folder, where, turned=False, flat=True),
            phrase=read_text(record, "caption", where),
            box=read_extent(own[0], "bbox", where),
            size=read_size(record, where),
            target=target,
        )
        yield expression, own[0], where
