"""Which pictures and phrases a command line asks for: files, folders, or JSON lines on stdin."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gap_runtime.errors import InputError, suggest
from gap_runtime.records.files import is_folder
from gap_runtime.records.plain import parse_json

STDIN: Final = "-"
"""Instead of pictures: requests come as JSON lines on standard input."""
_KEYS: Final = ("image", "phrase", "ratio", "keep", "id")
_LONGEST: Final = 1_000_000
"""Bytes of a line that are read at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureRequest:
    """Phrases for one picture. `id` is whatever the asker calls it, None where it has no name."""

    image: str
    phrases: tuple[str, ...]
    ratio: float | None = None
    keep: int | None = None
    id: Any = None


def find_pictures(names: Sequence[str]) -> list[str]:
    """Picture files, those of a folder in the order of their names.

    Raises:
        InputError: A folder holds no picture.
    """
    from gap_runtime.pictures.load import list_pictures  # noqa: PLC0415 - Pillow only when needed

    found: list[str] = []
    for name in names:
        found += map(str, list_pictures(Path(name))) if is_folder(name) else [name]
    return found


def read_requests(
    lines: Iterable[bytes], phrases: Sequence[str]
) -> Iterator[PictureRequest | InputError]:
    """A request for each line that is not empty, or what is wrong with it.

    Args:
        lines: In UTF-8, JSON objects with `image`, `phrase` (a text or a list of them), and where
            wanted `ratio`, `keep` and `id`.
        phrases: For lines that have none.
    """
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"line {number}"
        try:
            if len(line) > _LONGEST:
                raise InputError(f"{where}: {len(line):,} bytes, at most {_LONGEST:,} are read")
            yield _read_request(parse_json(line, where, InputError), where, tuple(phrases))
        except InputError as error:
            yield error


def _read_request(data: Any, where: str, phrases: tuple[str, ...]) -> PictureRequest:
    if not isinstance(data, dict):
        raise InputError(f"{where}: {type(data).__name__} where an object is expected")
    for key in data:
        if key not in _KEYS:
            raise InputError(f"{where}: unknown key {key!r:.40}; {suggest(key, _KEYS)}")
    image, asked = data.get("image"), data.get("phrase", list(phrases))
    asked = [asked] if isinstance(asked, str) else asked
    if not isinstance(image, str) or not image:
        raise InputError(f"{where}: 'image' has to be the path of a picture")
    if not isinstance(asked, list) or not asked or not all(isinstance(p, str) for p in asked):
        raise InputError(f"{where}: 'phrase' has to be a text or a list of texts")
    ratio, keep = data.get("ratio"), data.get("keep")
    if ratio is not None and (isinstance(ratio, bool) or not isinstance(ratio, (int, float))):
        raise InputError(
            f"{where}: 'ratio' has to be a number, the share of visual tokens removed"
        )
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int)):
        raise InputError(f"{where}: 'keep' has to be a count of visual tokens")
    name = data.get("id")
    _require_writable(name, where)
    return PictureRequest(image=image, phrases=tuple(asked), ratio=ratio, keep=keep, id=name)


def _require_writable(name: Any, where: str) -> None:
    """Refuse an `id` that cannot be given back: Python reads numbers that JSON has no word for."""
    try:
        json.dumps(name, allow_nan=False)
    except ValueError as error:
        raise InputError(f"{where}: 'id' holds NaN or an infinity, which are no JSON") from error
