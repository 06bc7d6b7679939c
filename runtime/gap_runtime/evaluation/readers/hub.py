"""Parquet files of the hub's lmms-lab/RefCOCO, RefCOCOplus and RefCOCOg.

    question_id, image {bytes, path}, answer [sentence, ...], bbox xywh in pixels, file_name

A row is an object, each of its sentences a phrase. Pictures are in the file and are read when
they are asked about. The `val` of the hub is UNC's together with Google's: see the counts.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from PIL import Image

from gap_runtime.errors import InputError
from gap_runtime.evaluation.expression import Expression
from gap_runtime.evaluation.fields import read_extent, read_list, read_name, read_text
from gap_runtime.evaluation.parquet import read_group, read_rows, require_columns
from gap_runtime.evaluation.source import Source
from gap_runtime.pictures.load import read_picture

SUFFIXES: Final = (".parquet",)
USUAL: Final = None
_COLUMNS: Final = ("question_id", "answer", "bbox")
_IMAGE: Final = "image"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPicture:
    """A picture inside a parquet file."""

    key: str
    path: Path
    group: int
    row: int

    def load(self) -> Image.Image:
        """The picture as 8-bit RGB, its pixels as they are stored."""
        value = _read_pictures(self.path, self.group)[self.row]
        data = value.get("bytes") if isinstance(value, dict) else None
        if not isinstance(data, bytes):
            raise InputError(f"{self.path}: row {self.key}: no picture in column '{_IMAGE}'")
        return read_picture(io.BytesIO(data), f"{self.path}: row {self.key}", turned=False)


def recognise(head: Any) -> bool:
    """Whether it is of this format."""
    return isinstance(head, list) and {*_COLUMNS, _IMAGE} <= set(head)


def locate(folder: Path, source: Source) -> tuple[Path, ...]:
    """`data/SPLIT-*.parquet` or `SPLIT-*.parquet`, all parts."""
    for home in (folder / "data", folder):
        found = sorted(home.glob(f"{source.split}-*.parquet")) if source.split else []
        if found:
            return tuple(found)
    return ()


def read(source: Source) -> Iterator[Expression]:
    """All sentences of all rows of all parts."""
    for part, path in enumerate(source.paths):
        require_columns(path, (*_COLUMNS, _IMAGE))
        for group, row, record in read_rows(path, _COLUMNS):
            yield from _read_row(path, part, group, row, record)


def _read_row(
    path: Path, part: int, group: int, row: int, record: dict[str, Any]
) -> Iterator[Expression]:
    where = f"{path}: row {group}/{row}"
    place = f"{part}/{group}/{row}"
    picture = StoredPicture(key=place, path=path.absolute(), group=group, row=row)
    name = read_name(record, "question_id", where)
    box = read_extent(record, "bbox", where)
    for k, sentence in enumerate(read_list(record, "answer", where)):
        yield Expression(
            key=f"{place}/{k}",
            picture=picture,
            phrase=read_text({"answer": sentence}, "answer", where),
            box=box,
            size=None,
            target=name,
        )


# Pictures come in the order of the file, so that the last group is nearly always the right one.
@lru_cache(maxsize=1)
def _read_pictures(path: Path, group: int) -> list[Any]:
    """The pictures of a group of rows, still packed."""
    return [row[_IMAGE] for row in read_group(path, group, [_IMAGE])]
