"""Reports that are read, and pages of which a part, between two marks, is made of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gap_runtime.errors import InputError
from gap_runtime.records.files import read_text
from gap_runtime.records.plain import read_table


@contextmanager
def open_report(path: Path) -> Iterator[dict[str, Any]]:
    """A report, where it is read.

    Raises:
        InputError: It cannot be read, or holds something else than is looked up in it.
    """
    data = read_table(path, InputError)
    try:
        yield data
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not the report of such a run ({error!r:.200})") from error


def require_marks(page: Path, begin: str, end: str) -> None:
    """Refuse a page that `write_between` could not write to, before the work that fills it.

    Raises:
        InputError: The page cannot be read, or lacks a mark.
    """
    _cut(page, begin, end)


def write_between(page: Path, begin: str, end: str, text: str) -> None:
    """Replace what stands between the two marks of a page.

    Raises:
        InputError: The page cannot be read, or lacks a mark.
    """
    before, after = _cut(page, begin, end)
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def _cut(page: Path, begin: str, end: str) -> tuple[str, str]:
    """What stands before the first mark and behind the second."""
    before, first, rest = read_text(page, InputError).partition(begin)
    _, last, after = rest.partition(end)
    if not first or not last:
        raise InputError(f"{page}: lacks {end if first else begin}, where the tables belong")
    return before, after
