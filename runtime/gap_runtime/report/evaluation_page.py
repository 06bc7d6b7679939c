"""The page of `evaluate --html`: all tables, and pictures of what failed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Final

from PIL import Image

from gap_runtime.pictures.boxes import Box
from gap_runtime.pictures.drawing import draw_pair, enlarge
from gap_runtime.report.page import encode_picture, make_page, make_table

_LEGEND: Final = (
    '<ul class="legend">'
    '<li><span class="swatch true"></span>true box</li>'
    '<li><span class="swatch found"></span>what was answered</li></ul>'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PageTable:
    """A table of plain cells."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PageFailure:
    """A wrong answer to be shown; boxes in pixels of the picture."""

    phrase: str
    what: str
    answer: str
    picture: Image.Image
    found: tuple[Box, ...]
    true: Box


def make_evaluation_page(
    title: str,
    notes: Sequence[str],
    tables: Iterable[PageTable],
    failures: Iterable[PageFailure],
    *,
    wrong: int,
) -> str:
    """The page.

    Args:
        title: What was evaluated on what.
        notes: Lines that stand at the top.
        tables: In their order.
        failures: Pictures to be shown.
        wrong: Phrases that were answered wrong in all.
    """
    shown = [_show(each) for each in failures]
    count = (
        f"<p>{wrong:,} phrases were answered wrong at one ratio at least; {len(shown):,} of them "
        "are here, those with the least pruning first.</p>"
    )
    body = [
        f"<header><h1>{escape(title)}</h1>",
        *(f"<p>{escape(note)}</p>" for note in notes),
        "</header><main>",
        *(
            make_table(
                table.title, table.header, [[str(cell) for cell in row] for row in table.rows]
            )
            for table in tables
        ),
        '<h2 id="failed">What failed</h2>',
        count,
        _LEGEND if shown else "",
        f'<div class="gallery">{"".join(shown)}</div>' if shown else "",
        "</main>",
    ]
    return make_page(title, "\n".join(body))


def _show(failure: PageFailure) -> str:
    canvas, scale = enlarge(failure.picture)
    canvas = canvas.convert("RGB")
    draw_pair(canvas, scale, reference=(), found=failure.found, true=(failure.true,))
    width, height = canvas.size
    return (
        f'<figure><img width="{width}" height="{height}" src="{encode_picture(canvas)}" '
        f'alt="{escape(failure.phrase)}: the picture with the true box and the boxes answered">'
        f"<figcaption><strong>{escape(failure.phrase)}</strong><br>{escape(failure.what)}<br>"
        f"<code>{escape(failure.answer)}</code></figcaption></figure>"
    )
