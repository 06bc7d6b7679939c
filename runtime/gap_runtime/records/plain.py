"""JSON and TOML from others: a depth that can be walked, numbers that a machine can hold.

Python's own reader fails on depth in its own way, and gives integers of any length, which fail
wherever they become a float or a size.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Final

from gap_runtime.errors import GapError
from gap_runtime.records.files import SMALL_BYTES, read_bytes, read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEEPEST: Final = 64
"""Lists and tables in each other at most."""
LONGEST_INTEGER: Final = 40
"""Digits of an integer at most."""
_STRIDE: Final = 8
_ZEROS: Final = bytes.maketrans(b"123456789", b"0" * 9)
_LONG_DIGITS: Final = b"0" * ((LONGEST_INTEGER + 1) // _STRIDE)
"""Of every eighth character, a digit being 0: where there is none, no integer is too long. So a
picture in base64 is looked through in no time."""


def parse_json(data: bytes | str, where: str, kind: type[GapError], advice: str = "") -> Any:
    """The value of JSON text.

    Args:
        data: The text, or its bytes in UTF-8.
        where: Start of the message.
        kind: Of the error.
        advice: End of the message, what to do.

    Raises:
        GapError: Of that kind: it is no JSON, or nested too deeply, or holds too long a number.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        # Only where a number may be too long: a function for each makes reading slow.
        some = text[::_STRIDE].encode("ascii", "replace").translate(_ZEROS)
        parse_int = _parse_integer if _LONG_DIGITS in some else None
        value = json.loads(text, parse_int=parse_int)
        _require_flat(value)
    except RecursionError as error:
        raise kind(_say(where, "JSON", f"nested over {DEEPEST} deep", advice)) from error
    except ValueError as error:
        raise kind(_say(where, "JSON", str(error), advice)) from error
    return value


def read_json(
    path: Path, kind: type[GapError], *, limit: int = SMALL_BYTES, advice: str = ""
) -> Any:
    """The value of a JSON file.

    Raises:
        GapError: Of that kind: the file cannot be read, or as for `parse_json`.
    """
    return parse_json(read_bytes(path, kind, limit=limit, advice=advice), str(path), kind, advice)


def read_table(path: Path, kind: type[GapError], *, advice: str = "") -> dict[str, Any]:
    """The value of a JSON file that holds a table.

    Raises:
        GapError: Of that kind: as for `read_json`, or it holds anything else.
    """
    data = read_json(path, kind, advice=advice)
    if not isinstance(data, dict):
        raise kind(f"{path}: not a JSON object{f'; {advice}' if advice else ''}")
    return data


def read_toml(path: Path, kind: type[GapError]) -> dict[str, Any]:
    """The value of a TOML file.

    Raises:
        GapError: Of that kind: the file cannot be read, or as for `parse_toml`.
    """
    return parse_toml(read_text(path, kind), str(path), kind)


def parse_toml(text: str, where: str, kind: type[GapError]) -> dict[str, Any]:
    """The value of TOML text.

    Args:
        text: The text.
        where: Start of the message.
        kind: Of the error.

    Raises:
        GapError: Of that kind: it is no TOML, nested too deeply, or holds too long a number.
    """
    try:
        data = tomllib.loads(text)
        _require_flat(data)
        _require_short(data)
    except RecursionError as error:
        raise kind(_say(where, "TOML", f"nested over {DEEPEST} deep", "")) from error
    except ValueError as error:
        raise kind(_say(where, "TOML", str(error), "")) from error
    return data


def _require_flat(value: Any) -> None:
    """Refuse what is nested too deeply, level by level and so without recursion."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(DEEPEST):
        level = [
            item
            for each in level
            for item in (each.values() if isinstance(each, dict) else each)
            if isinstance(item, (dict, list))
        ]
        if not level:
            return
    raise RecursionError


def _require_short(value: Any) -> None:
    """Refuse integers that are too long, in what is known to be flat; TOML has several forms."""
    if isinstance(value, int) and abs(value) >= 10**LONGEST_INTEGER:
        raise ValueError(f"an integer of over {LONGEST_INTEGER} digits")
    if isinstance(value, (dict, list)):
        for each in value.values() if isinstance(value, dict) else value:
            _require_short(each)


def _parse_integer(digits: str) -> int:
    length = len(digits.removeprefix("-"))
    if length > LONGEST_INTEGER:
        raise ValueError(f"an integer of {length} digits")
    return int(digits)


def _say(where: str, format_name: str, reason: str, advice: str) -> str:
    message = f"{where}: not valid {format_name} ({' '.join(reason.split()):.200})"
    return f"{message}; {advice}" if advice else message
