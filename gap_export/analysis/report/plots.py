"""Plots as SVG that takes its colours and letters from the page, so that it fits light and dark.

matplotlib draws with stand-in colours, which become the page's CSS variables.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Final

from gap_runtime.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS: Final = {
    "ink": "#010203",
    "quiet": "#010204",
    "rule": "#010205",
    "panel": "#010206",
    "series-1": "#010211",
    "series-2": "#010212",
    "series-3": "#010213",
    "series-4": "#010214",
    "series-5": "#010215",
}
_STYLES: Final = (
    ("series-1", "o", "-"),
    ("series-2", "s", "--"),
    ("series-3", "^", "-."),
    ("series-4", "D", ":"),
)
_SIZE: Final = (3.6, 2.7)
_POINTS: Final = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Values in percent by ratio, with 95 % intervals; `hollow` are a second reading of each."""

    label: str
    style: int
    ratios: Sequence[float]
    values: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    hollow: Sequence[float | None] = ()


def require_matplotlib() -> None:
    """Say what to install where it is missing.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("a report needs matplotlib: pip install 'gap-export[report]'")


def plot_accuracy(name: str, lines: Sequence[Line], unpruned: float | None, alt: str) -> str:
    """Accuracy against ratio, a line for each position mode."""
    figure, axes = _make_axes()
    if unpruned is not None:
        axes.axhline(unpruned, color=_COLOURS["quiet"], linewidth=1, linestyle=(0, (2, 2)))
    for line in lines:
        colour, marker, dashes = _STYLES[line.style % len(_STYLES)]
        shade = _COLOURS[colour]
        axes.fill_between(line.ratios, line.low, line.high, color=shade, alpha=0.15, linewidth=0)
        axes.plot(
            line.ratios,
            line.values,
            color=shade,
            marker=marker,
            linestyle=dashes,
            markersize=4.5,
            linewidth=1.6,
        )
        points = [(x, y) for x, y in zip(line.ratios, line.hollow, strict=False) if y is not None]
        if points:
            axes.plot(
                *zip(*points, strict=True),
                color=_COLOURS["ink"],
                marker="o",
                linestyle="",
                markersize=8,
                markerfacecolor="none",
                markeredgewidth=0.9,
            )
    axes.set_ylim(-4, 104)
    axes.set_xlim(-0.04, 1.0)
    axes.set_xlabel("share of visual tokens removed")
    axes.set_ylabel("Acc@0.5 in %")
    axes.set_title(name, loc="left", color=_COLOURS["ink"], fontweight="bold")
    return _draw(figure, alt)


def plot_bars(
    title: str,
    unit: str,
    ratios: Sequence[float],
    parts: Sequence[tuple[str, Sequence[float]]],
    alt: str,
) -> str:
    """Stacked bars by ratio, a colour for each part."""
    figure, axes = _make_axes()
    places = range(len(ratios))
    base = [0.0] * len(ratios)
    for k, (_, values) in enumerate(parts):
        axes.bar(
            places,
            values,
            bottom=base,
            color=_COLOURS[f"series-{k + 1}"],
            edgecolor=_COLOURS["panel"],
            linewidth=0.8,
            width=0.62,
        )
        base = [a + b for a, b in zip(base, values, strict=True)]
    for place, total in zip(places, base, strict=True):
        axes.annotate(
            f"{total:,.3g}" if total < 1000 else f"{total:,.0f}",
            (place, total),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            color=_COLOURS["ink"],
            fontsize=_POINTS - 1,
        )
    axes.set_ylim(0, max(base, default=1.0) * 1.14 or 1.0)
    axes.set_xticks(list(places), [f"{ratio:g}" for ratio in ratios])
    axes.set_xlabel("share of visual tokens removed")
    axes.set_ylabel(unit)
    axes.set_title(title, loc="left", color=_COLOURS["ink"], fontweight="bold")
    return _draw(figure, alt)


def draw_key(style: int) -> str:
    """A line and its marker for a legend."""
    colour, _, dashes = _STYLES[style % len(_STYLES)]
    shapes = {
        "series-1": '<circle cx="20" cy="6" r="4"/>',
        "series-2": '<rect x="16" y="2" width="8" height="8"/>',
        "series-3": '<path d="M20 1.5l4.5 8.5h-9z"/>',
        "series-4": '<path d="M20 1l5 5-5 5-5-5z"/>',
    }
    pattern = {"-": "", "--": "7 4", "-.": "8 3 2 3", ":": "2 3"}[dashes]
    return (
        f'<svg viewBox="0 0 40 12" aria-hidden="true" style="color: var(--{colour})" '
        'fill="currentColor" stroke="currentColor"><line x1="0" y1="6" x2="40" y2="6" '
        f'stroke-width="2" stroke-dasharray="{pattern}"/>{shapes[colour]}</svg>'
    )


def _make_axes() -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure as NewFigure  # noqa: PLC0415 - an extra

    figure = NewFigure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_COLOURS["rule"])
    axes.tick_params(colors=_COLOURS["quiet"], length=0)
    axes.grid(visible=True, axis="y", color=_COLOURS["rule"], linewidth=0.6)
    axes.set_axisbelow(True)
    axes.xaxis.label.set_color(_COLOURS["quiet"])
    axes.yaxis.label.set_color(_COLOURS["quiet"])
    return figure, axes


def _draw(figure: Figure, alt: str) -> str:
    """The figure as an element of the page; `alt` is told to who sees no pictures."""
    import matplotlib as mpl  # noqa: PLC0415 - an extra

    file = io.StringIO()
    # The same plot is the same text: no date, and names of parts from their contents.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": alt}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return _fit(text.strip(), alt)


def _fit(svg: str, alt: str) -> str:
    """Let the page decide size and colours, and make names of parts its own."""
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href", "href")
    prefix = f"p{_checksum(alt)}-"
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = svg.replace('href="#', f'href="#{prefix}').replace("url(#", f"url(#{prefix}")
    for name, colour in _COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1)


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
