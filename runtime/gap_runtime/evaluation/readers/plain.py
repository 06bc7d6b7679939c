"""Your own data: lines of {image, phrase, box}, or a CSV with those columns.

`box` is x0, y0, x1, y1 in pixels of the upright picture; a CSV may have the columns x0, y0, x1,
y1 instead. `id` names a phrase, else its line does. `width` and `height` are checked where given.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from gap_runtime.errors import InputError
from gap_runtime.evaluation.expression import Expression, find_picture
from gap_runtime.evaluation.fields import read_corners, read_name, read_path, read_size, read_text
from gap_runtime.evaluation.files import LINE_BYTES, read_lines
from gap_runtime.evaluation.source import Source
from gap_runtime.records.files import open_file
from gap_runtime.records.plain import parse_json

SUFFIXES: Final = (".jsonl", ".csv")
USUAL: Final = None
_CORNERS: Final = ("x0", "y0", "x1", "y1")


def recognise(head: Any) -> bool:
    """Whether it is of this format."""
    names = (
        {name for name in head if isinstance(name, str)} if isinstance(head, (dict, list)) else ()
    )
    return {"image", "phrase"} <= set(names)


def locate(folder: Path, source: Source) -> tuple[Path, ...]:
    """Nothing is published in this format."""
    del folder, source
    return ()


def read(source: Source) -> Iterator[Expression]:
    """All lines; each is one phrase."""
    path = source.path
    lines = _read_table(path) if path.suffix.lower() == ".csv" else read_lines(path)
    for number, record in lines:
        where = f"{path}:{number}"
        image = read_path(record, "image", where)
        sized = isinstance(record, dict) and {"width", "height"} <= set(record)
        yield Expression(
            key=read_name(record, "id", where) if "id" in record else str(number),
            picture=find_picture(image, source.image_folder, where, turned=True, flat=False),
            phrase=read_text(record, "phrase", where),
            box=read_corners(record, "box", where),
            size=read_size(record, where) if sized else None,
            target=read_name(record, "object", where) if "object" in record else "",
        )


def _read_table(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and fields of every line of a CSV, numbers as numbers."""
    csv.field_size_limit(LINE_BYTES)
    try:
        with (
            open_file(path, InputError) as opened,
            io.TextIOWrapper(opened, encoding="utf-8-sig", newline="") as file,
        ):
            rows = csv.DictReader(file, restkey="", restval="", strict=True)
            names = [name.strip() for name in rows.fieldnames or []]
            rows.fieldnames = names
            boxed = "box" in names or set(_CORNERS) <= set(names)
            lacking = [name for name in ("image", "phrase") if name not in names]
            lacking += [] if boxed else ["box"]
            if lacking:
                raise InputError(
                    f"{path}:1: no column '{lacking[0]}'; have {', '.join(names)[:200]}; "
                    "expected image, phrase, and box or x0, y0, x1, y1"
                )
            for row in rows:
                where = f"{path}:{rows.line_num}"
                if "" in row:
                    raise InputError(f"{where}: more fields than the first line names")
                yield rows.line_num, _read_cells(row, where)
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid CSV ({error})") from error


def _read_cells(row: dict[str, Any], where: str) -> dict[str, Any]:
    cells: dict[str, Any] = {
        name: value for name, value in row.items() if value or name not in {"id", "object"}
    }
    if "box" in cells:
        text = cells["box"].strip()
        inner = text[1:-1] if text[:1] in {"[", "("} else text
        cells["box"] = [_read_number(part, "box", where) for part in inner.split(",")]
    else:
        cells["box"] = [_read_number(cells[name], name, where) for name in _CORNERS]
    for name in ("width", "height"):
        if name in cells:
            cells[name] = _read_number(cells[name], name, where)
    return cells


def _read_number(text: str, name: str, where: str) -> float:
    try:
        number = parse_json(text.strip() or "null", where, InputError)
    except InputError:
        number = None
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise InputError(f"{where}: '{name}' is {text[:40]!r}, expected numbers in pixels")
    return number
