"""Ref-L4: `ref-l4-val.parquet` and `ref-l4-test.parquet` with a folder of pictures.

    id, caption, bbox xywh in pixels, ori_category_id, bbox_id, file_name, width, height, split

A row is a phrase. The pictures are COCO's and Objects365's, published in `images.tar.gz`, which
holds them without a folder. Papers quote both splits together: `ref-l4:all`.

References:
    J. Chen et al., Revisiting Referring Expression Comprehension Evaluation in the Era of Large
    Multimodal Models, 2024; JierunChen/Ref-L4.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from gap_runtime.errors import InputError
from gap_runtime.evaluation.expression import Expression, find_picture
from gap_runtime.evaluation.fields import (
    read_extent,
    read_name,
    read_path,
    read_size,
    read_text,
)
from gap_runtime.evaluation.parquet import read_rows
from gap_runtime.evaluation.source import Source
from gap_runtime.pictures.boxes import Box
from gap_runtime.records.files import is_file

SUFFIXES: Final = (".parquet",)
USUAL: Final = None
_SET: Final = "ref-l4"
_ALL: Final = "all"
_SPLITS: Final = ("val", "test")
_COLUMNS: Final = ("id", "caption", "bbox", "bbox_id", "file_name", "width", "height", "split")
_SMALL: Final = 128.0
_LARGE: Final = 256.0
"""Sides of a square as large as the box, in pixels, between which a box is of medium size."""


def recognise(head: Any) -> bool:
    """Whether it is of this format."""
    return isinstance(head, list) and set(_COLUMNS) <= set(head)


def locate(folder: Path, source: Source) -> tuple[Path, ...]:
    """`ref-l4-SPLIT.parquet`; both for the split `all`."""
    splits = _SPLITS if source.split == _ALL else (source.split,)
    paths = tuple(folder / f"{_SET}-{split}.parquet" for split in splits)
    return paths if source.name == _SET and all(is_file(path) for path in paths) else ()


def read(source: Source) -> Iterator[Expression]:
    """All rows of all files; each is one phrase."""
    images = source.find_images("images")
    first = True
    for path in source.paths:
        for number, (_, _, record) in enumerate(read_rows(path, _COLUMNS)):
            where = f"{path}: row {number}"
            split = read_name(record, "split", where)
            if source.split not in {"", _ALL, split}:
                raise InputError(
                    f"{where}: is of split '{split}', expected '{source.split}'; name the split "
                    "that the file holds"
                )
            picture = find_picture(
                read_path(record, "file_name", where), images, where, turned=False, flat=True
            )
            if first:
                source.require_unpacked(picture, "images.tar.gz")
                first = False
            box = read_extent(record, "bbox", where)
            yield Expression(
                key=read_name(record, "id", where),
                picture=picture,
                phrase=read_text(record, "caption", where),
                box=box,
                size=read_size(record, where),
                target=read_name(record, "bbox_id", where),
                part=name_size(box),
            )


def name_size(box: Box) -> str:
    """The size class that the benchmark quotes: by the root of the box's area in pixels."""
    side = math.sqrt(box.area)
    return "small" if side < _SMALL else "medium" if side <= _LARGE else "large"
