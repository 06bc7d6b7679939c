"""Files of records: lines one by one, JSON as a whole; neither larger than it must be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from gap_runtime.errors import InputError

LINE_BYTES: Final = 2**20
"""Longest line of a file of lines."""
FILE_BYTES: Final = 2 * 2**30
"""Largest file that has to be read as a whole."""


def read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Number (from 1) and value of every line of a JSONL file, one at a time; empty ones left out.

    Raises:
        InputError: The file cannot be read, or a line is no JSON or too long.
    """
    try:
        with path.open("rb") as file:
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
                    yield number, parse_json(line, where)
    except OSError as error:
        raise unreadable(path, error) from error


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        InputError: The file cannot be read, is no JSON, or is too large.
    """
    return parse_json(read_bytes(path), str(path))


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
    try:
        size = path.stat().st_size
        if size > FILE_BYTES:
            raise InputError(
                f"{path}: {size:,} bytes, at most {FILE_BYTES:,} are read as a whole; "
                "use a format of lines (.jsonl)"
            )
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error


def parse_json(data: bytes, where: str) -> Any:
    """The value of JSON text.

    Raises:
        InputError: It is none.
    """
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{where}: not valid JSON ({reason:.100})") from error


def unreadable(path: Path, error: OSError) -> InputError:
    """The error for a file that cannot be read."""
    return InputError(f"{path}: cannot be read ({error.strerror or error})")
