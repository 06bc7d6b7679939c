"""Fields of a record, checked: one line names the place and what was found there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gap_runtime.errors import InputError
from gap_runtime.pictures.boxes import Box

_LONGEST_PHRASE = 10_000


def need(record: Any, key: str, where: str) -> Any:
    """A field that must be there.

    Raises:
        InputError: The record is no table, or lacks the field.
    """
    if not isinstance(record, Mapping):
        raise InputError(f"{where}: found {describe(record)}, expected a record with '{key}'")
    if key not in record:
        have = ", ".join(sorted(str(name)[:30] for name in list(record)[:12]))
        raise InputError(f"{where}: no field '{key}'; have {have or 'none'}")
    return record[key]


def read_text(record: Any, key: str, where: str) -> str:
    """A field that holds text; not empty, its white space collapsed."""
    value = need(record, key, where)
    text = " ".join(value.split()) if isinstance(value, str) else ""
    if not text or len(text) > _LONGEST_PHRASE:
        raise InputError(f"{where}: '{key}' is {describe(value)}, expected text")
    return text


def read_path(record: Any, key: str, where: str) -> str:
    """A field that holds a path, as it is."""
    value = need(record, key, where)
    if not isinstance(value, str) or not value or len(value) > _LONGEST_PHRASE or "\0" in value:
        raise InputError(f"{where}: '{key}' is {describe(value)}, expected the path of a picture")
    return value


def read_name(record: Any, key: str, where: str) -> str:
    """A field that names something: text or a whole number."""
    value = need(record, key, where)
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise InputError(f"{where}: '{key}' is {describe(value)}, expected a name or a number")
    return str(value)


def read_list(record: Any, key: str, where: str) -> list[Any]:
    """A field that holds a list."""
    value = need(record, key, where)
    if not isinstance(value, (list, tuple)):
        raise InputError(f"{where}: '{key}' is {describe(value)}, expected a list")
    return list(value)


def read_corners(record: Any, key: str, where: str) -> Box:
    """A box given as x0, y0, x1, y1 in pixels."""
    values = _four_numbers(need(record, key, where), key, where)
    return require_box(Box(*values), key, where)


def read_extent(record: Any, key: str, where: str) -> Box:
    """A box given as x, y, width, height in pixels."""
    x, y, width, height = _four_numbers(need(record, key, where), key, where)
    return require_box(Box(x, y, x + width, y + height), key, where)


def read_size(record: Any, where: str) -> tuple[int, int]:
    """`width` and `height`, in pixels."""
    sizes = [need(record, key, where) for key in ("width", "height")]
    for key, value in zip(("width", "height"), sizes, strict=True):
        whole = isinstance(value, float) and value.is_integer()
        if isinstance(value, bool) or not (isinstance(value, int) or whole) or value < 1:
            raise InputError(f"{where}: '{key}' is {describe(value)}, expected pixels")
    return int(sizes[0]), int(sizes[1])


def require_box(box: Box, key: str, where: str) -> Box:
    """A box that spans an area.

    Raises:
        InputError: It does not.
    """
    if not box[0] < box[2] or not box[1] < box[3]:
        shown = ", ".join(f"{value:g}" for value in box)
        raise InputError(
            f"{where}: '{key}' has the corners {shown}, which span no area; "
            "expected x0 < x1 and y0 < y1"
        )
    return box


def describe(value: Any) -> str:
    """A value for a message; never the whole of one that may be endless."""
    if isinstance(value, (str, bytes)):
        return f"{value[:60]!r}"
    if isinstance(value, int) and abs(value) >= 10**20:
        return "a huge number"
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    return f"a {type(value).__name__}"


def _four_numbers(value: Any, key: str, where: str) -> list[float]:
    """Four finite numbers."""
    numbers: list[float] = []
    if isinstance(value, (list, tuple)) and len(value) == 4:
        numbers = [float(item) for item in value if _is_number(item)]
    if len(numbers) != 4:
        raise InputError(f"{where}: '{key}' is {describe(value)}, expected four numbers")
    return numbers


def _is_number(item: Any) -> bool:
    if isinstance(item, bool) or not isinstance(item, (int, float)):
        return False
    return math.isfinite(item) and abs(item) < 10**9
