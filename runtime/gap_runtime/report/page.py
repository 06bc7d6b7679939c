"""The frame of a report: one HTML file with its style and pictures inside, and no script.

A browser needs nothing else to show it and is told to fetch nothing.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Final

from PIL import Image

from gap_runtime.bundle.files import require_replaceable, write_whole
from gap_runtime.errors import InputError

STYLE_FILE: Final = Path(__file__).with_name("report.css")
_MOST_SIDE: Final = 640
_QUALITY: Final = 88

_PAGE: Final = Template(
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" \
content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>$title</title>
<style>
$style</style>
</head>
<body>
$body
</body>
</html>
"""
)


def make_page(title: str, body: str) -> str:
    """A whole page.

    Args:
        title: Plain text.
        body: HTML.
    """
    style = STYLE_FILE.read_text(encoding="utf-8")
    return _PAGE.substitute(title=escape(title), style=style, body=body)


def require_writable(path: Path) -> None:
    """Refuse a place for a page before the work that fills it.

    Raises:
        InputError: It is a folder or a device, or lies in none.
    """
    try:
        require_replaceable(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
    if path.is_dir() or not path.parent.is_dir():
        reason = "is a folder" if path.is_dir() else f"{path.parent} is no folder"
        raise InputError(
            f"{path}: cannot be written ({reason}); give a file, for example out.html"
        )


def write_page(path: Path, page: str) -> None:
    """Write a text file whole or not at all.

    Raises:
        InputError: It cannot be written.
    """
    try:
        with write_whole(path) as aside:
            aside.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error


def encode_picture(picture: Image.Image) -> str:
    """A picture as the address of an `img`, made smaller where it is large."""
    scale = min(1.0, _MOST_SIDE / max(picture.size))
    if scale < 1:
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.convert("RGB").save(file, "JPEG", quality=_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def make_table(
    caption: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, wrapped: int = -1
) -> str:
    """A table as HTML; the first cell of a row is its header.

    Args:
        caption: Plain text.
        header: Names of the columns.
        rows: Cells, plain text.
        wrapped: Column whose text may break into lines.
    """
    head = "".join(
        f'<th scope="col"{" class=text" if k in {0, wrapped} else ""}>{escape(name)}</th>'
        for k, name in enumerate(header)
    )
    lines = []
    for row in rows:
        cells = "".join(
            f"<td{' class=wrap' if k == wrapped else ''}>{escape(cell)}</td>"
            for k, cell in enumerate(row)
            if k
        )
        lines.append(f'<tr><th scope="row">{escape(row[0])}</th>{cells}</tr>')
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f"<table><caption>{escape(caption)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )
