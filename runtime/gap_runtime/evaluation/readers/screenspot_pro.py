"""ScreenSpot-Pro: a JSON list for each application in `annotations/`, screenshots in `images/`.

    [{img_filename, bbox, instruction, img_size, ui_type, group, application, platform}]

`bbox` is x0 y0 x1 y1 in pixels, other than in ScreenSpot-v2. `ui_type` is text or icon. Papers
quote all applications together: `screenspot-pro:all`. The Chinese instructions are not asked.

References:
    K. Li et al., ScreenSpot-Pro: GUI Grounding for Professional High-Resolution Computer Use,
    2025; likaixin2000/ScreenSpot-Pro-GUI-Grounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from gap_runtime.errors import InputError
from gap_runtime.evaluation.expression import Expression, find_picture
from gap_runtime.evaluation.fields import (
    read_corners,
    read_list,
    read_name,
    read_path,
    read_size,
    read_text,
)
from gap_runtime.evaluation.files import read_records
from gap_runtime.evaluation.source import Source, existing

SUFFIXES: Final = (".json",)
USUAL: Final = None
_SET: Final = "screenspot-pro"
_ALL: Final = "all"
_FOLDER: Final = "annotations"


def recognise(head: Any) -> bool:
    """Whether it is of this format."""
    first = head[0] if isinstance(head, list) and head else None
    return isinstance(first, dict) and {"img_filename", "bbox", "ui_type"} <= set(first)


def locate(folder: Path, source: Source) -> tuple[Path, ...]:
    """`annotations/SPLIT.json`, an application on a platform; every file for the split `all`."""
    if source.name != _SET:
        return ()
    home = folder if folder.name == _FOLDER else folder / _FOLDER
    if source.split == _ALL:
        return tuple(sorted(home.glob("*.json")))
    return existing(home / f"{source.split}.json")


def read(source: Source) -> Iterator[Expression]:
    """All records of all files; each is one instruction."""
    images = source.find_images("../images", "images")
    for path in source.paths:
        for k, record in enumerate(read_records(path)):
            where = f"{path}: record {k}"
            kind = read_name(record, "ui_type", where)
            yield Expression(
                key=f"{path.stem}/{k}",
                picture=find_picture(
                    read_path(record, "img_filename", where),
                    images,
                    where,
                    turned=False,
                    flat=True,
                ),
                phrase=read_text(record, "instruction", where),
                box=read_corners(record, "bbox", where),
                size=_read_size(record, where),
                target="",
                part=f"{read_name(record, 'group', where)} {kind}",
            )


def _read_size(record: Any, where: str) -> tuple[int, int]:
    """`img_size`: width and height, in pixels."""
    sizes = read_list(record, "img_size", where)
    if len(sizes) != 2:
        raise InputError(
            f"{where}: 'img_size' has {len(sizes)} numbers, expected width and height"
        )
    return read_size(dict(zip(("width", "height"), sizes, strict=True)), where)
