"""Files of records: lines one by one, JSON as a whole; neither larger than it must be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from gap_runtime.errors import InputError
from gap_runtime.records import files
from gap_runtime.records.files import open_file
from gap_runtime.records.plain import parse_json

LINE_BYTES: Final = 2**20
"""Longest line of a file of lines."""
FILE_BYTES: Final = 2 * 2**30
"""Largest file that has to be read as a whole."""


def read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Number (from 1) and value of every line of a JSONL file, one at a time; empty ones left out.

    Raises:
        InputError: The file cannot be read, or a line is no JSON or too long.
    """
    with open_file(path, InputError) as file:
        number = 0
        while line := file.readline(LINE_BYTES + 1):
            number += 1
            where = f"{path}:{number}"
            if len(line) > LINE_BYTES:
                raise InputError(
                    f"{where}: the line is longer than {LINE_BYTES:,} bytes; expected a JSON "
                    "record a line"
                )
            if line.strip():
                yield number, parse_json(line, where, InputError)


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        InputError: The file cannot be read, is no JSON, or is too large.
    """
    return parse_json(read_bytes(path), str(path), InputError)


def read_records(path: Path) -> list[Any]:
    """The values of a JSON file that holds a list.

    Raises:
        InputError: The file cannot be read, or holds anything else.
    """
    data = read_json(path)
    if not isinstance(data, list):
        raise InputError(f"{path}: holds a {type(data).__name__}, expected a list of records")
    return data


def read_bytes(path: Path) -> bytes:
    """All of a file that has to be read as a whole.

    Raises:
        InputError: The file cannot be read, or is too large.
    """
    advice = "use a format of lines (.jsonl)"
    return files.read_bytes(path, InputError, limit=FILE_BYTES, smaller=advice)
