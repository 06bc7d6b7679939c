"""ScreenSpot-v2: `screenspot_desktop_v2.json`, `_mobile_v2` and `_web_v2` with screenshots.

    [{img_filename, bbox, instruction, data_type, data_source}], xywh in pixels

`data_type` is text or icon, `data_source` the system or site. Copies of the set as parquet have
other boxes (x0 y0 x1 y1 as fractions) and are not this format. Papers quote all three files
together: `screenspot-v2:all`.

References:
    Z. Wu et al., OS-ATLAS: A Foundation Action Model for Generalist GUI Agents, 2024;
    OS-Copilot/ScreenSpot-v2.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from gap_runtime.evaluation.expression import Expression, find_picture
from gap_runtime.evaluation.fields import read_extent, read_name, read_path, read_text
from gap_runtime.evaluation.files import read_records
from gap_runtime.evaluation.source import Source
from gap_runtime.records.files import is_file

SUFFIXES: Final = (".json",)
USUAL: Final = None
_SET: Final = "screenspot-v2"
_ALL: Final = "all"
_SPLITS: Final = ("desktop", "mobile", "web")
_PLATFORMS: Final = {
    **dict.fromkeys(("windows", "macos"), "desktop"),
    **dict.fromkeys(("ios", "android"), "mobile"),
    **dict.fromkeys(("forum", "gitlab", "shop", "tool"), "web"),
}
"""What papers sum up as one platform, by `data_source`."""


def recognise(head: Any) -> bool:
    """Whether it is of this format."""
    first = head[0] if isinstance(head, list) and head else None
    return isinstance(first, dict) and {"img_filename", "bbox", "data_source"} <= set(first)


def locate(folder: Path, source: Source) -> tuple[Path, ...]:
    """`screenspot_SPLIT_v2.json`; all three for the split `all`."""
    splits = _SPLITS if source.split == _ALL else (source.split,)
    paths = tuple(folder / f"screenspot_{split}_v2.json" for split in splits)
    return paths if source.name == _SET and all(is_file(path) for path in paths) else ()


def read(source: Source) -> Iterator[Expression]:
    """All records of all files; each is one instruction."""
    images = source.find_images("screenspotv2_image")
    for path in source.paths:
        for k, record in enumerate(read_records(path)):
            where = f"{path}: record {k}"
            picture = find_picture(
                read_path(record, "img_filename", where), images, where, turned=False, flat=True
            )
            if not k:
                source.require_unpacked(picture, "screenspotv2_image.zip")
            origin = read_name(record, "data_source", where)
            kind = read_name(record, "data_type", where)
            yield Expression(
                key=f"{path.stem}/{k}",
                picture=picture,
                phrase=read_text(record, "instruction", where),
                box=read_extent(record, "bbox", where),
                size=None,
                target="",
                part=f"{_PLATFORMS.get(origin, origin)} {kind}",
            )
