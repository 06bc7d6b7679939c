"""What people see: progress and tables, on stderr. Results go to stdout elsewhere.

A plain line needs no rich, whose import takes as long as an answer of a small model.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

from gap_runtime.errors import show_line

if TYPE_CHECKING:
    from PIL import Image
    from rich.console import Console
    from rich.table import Table

_UNITS: Final = ("B", "kB", "MB", "GB", "TB")
_LINE_SECONDS: Final = 60
_WIDEST: Final = 10_000
_SHORT: Final = 20
_PICTURE_LINES: Final = 24


class Display:
    """Step lines with elapsed time: a live one on a terminal, plain ones elsewhere."""

    def __init__(self, *, quiet: bool = False) -> None:
        """A display on stderr; a quiet one shows nothing."""
        self.is_quiet = quiet
        """Whether nothing is shown, so that libraries should say nothing either."""

    @cached_property
    def _console(self) -> Console:
        from rich.console import Console  # noqa: PLC0415 - for more than lines

        # A fixed width keeps lines and tables whole in log files.
        return Console(
            stderr=True,
            quiet=self.is_quiet,
            highlight=False,
            width=None if sys.stderr.isatty() else 120,
        )

    @contextmanager
    def step(self, name: str, *, live: bool = True) -> Iterator[None]:
        """Show that a step runs, and when it is done how long it took.

        Args:
            name: Of the step.
            live: Without, nothing is shown meanwhile: a library shows its own progress.
        """
        if self.is_quiet:
            yield
            return
        began = time.monotonic()
        if self._console.is_terminal and live:
            with self._console.status(name):
                yield
        else:
            yield
        self._console.print(f"{name} [dim]({time.monotonic() - began:.1f} s)[/dim]")

    @contextmanager
    def progress(self, name: str) -> Iterator[Callable[[float | None, str], None]]:
        """Show how far a long step is; what it gives takes the share done and what is done now.

        The share is None where the end is not known; else the time that is left is shown too.
        """
        if self.is_quiet:
            yield _Lines(self, name)
            return
        began = time.monotonic()
        if self._console.is_terminal:
            from rich.progress import (  # noqa: PLC0415
                BarColumn,
                Progress,
                TaskProgressColumn,
                TextColumn,
                TimeElapsedColumn,
            )

            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
            with Progress(
                *columns,
                TextColumn("[dim]{task.fields[now]}"),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            ) as bar:
                task = bar.add_task(name, total=None, now="")

                def show(share: float | None, now: str) -> None:
                    total = None if share is None else 1.0
                    said = now + _tell_left(share, began)
                    bar.update(task, total=total, completed=share or 0.0, now=said)

                yield show
        else:
            yield _Lines(self, name)
        self._console.print(f"{name} [dim]({time.monotonic() - began:.1f} s)[/dim]")

    @contextmanager
    def count(self, name: str, noun: str, total: int) -> Iterator[Pace]:
        """Show how far a long step is of which it is known how much there is to do.

        Args:
            name: Of the step.
            noun: What is counted, as for Pace.
            total: How many there are to do.
        """
        with self.progress(name) as show:
            yield Pace(show, total, noun)

    def say(self, text: str) -> None:
        """One line."""
        if sys.stderr is not None and not self.is_quiet:
            # As it is: rich makes pictures of words between colons. While something is live, it
            # has put itself in stderr's place.
            sys.stderr.write(f"{show_line(text)}\n")

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table; numbers are right-aligned."""
        _print_whole(self._console, _make_table(title, header, rows))


def can_show_pictures() -> bool:
    """Whether people look at a terminal that shows pictures, and the library for it is there.

    The terminal is asked, so this takes a tenth of a second where it does not answer.
    """
    streams = (sys.stdin, sys.stdout, sys.stderr)
    if find_spec("textual_image") is None or not all(
        stream and stream.isatty() for stream in streams
    ):
        return False
    # A serial line says that it has no columns, by which the library would divide.
    if 0 in os.get_terminal_size(sys.stdout.fileno()):
        return False
    from textual_image import renderable  # noqa: PLC0415 - asks the terminal

    # What is left shows coarse blocks: no picture to find a small thing in.
    return renderable.Image in (renderable.SixelImage, renderable.TGPImage)


def show_picture(picture: Image.Image) -> None:
    """Show a picture on stdout, where `can_show_pictures`; as large as is handy between lines."""
    from rich.console import Console  # noqa: PLC0415
    from textual_image import renderable  # noqa: PLC0415

    console = Console()
    height = max(1, min(_PICTURE_LINES, console.height - 4))
    console.print(renderable.Image(picture, width="auto", height=height))


class _Lines:
    """Progress as a line a minute, for log files."""

    def __init__(self, display: Display, name: str) -> None:
        """Begin now."""
        self._display, self._name = display, name
        self._began = self._said = time.monotonic()

    def __call__(self, share: float | None, now: str) -> None:
        """So much is done."""
        if time.monotonic() - self._said >= _LINE_SECONDS:
            self._said = time.monotonic()
            done = "" if share is None else f"{share:.0%}, "
            self._display.say(f"{self._name}: {done}{now}{_tell_left(share, self._began)}")


def _tell_left(share: float | None, began: float) -> str:
    """The time that is left, at the pace since the beginning."""
    if not share:
        return ""
    left = (time.monotonic() - began) * max(1 - share, 0.0) / share
    return f", {format_seconds(left)} left"


class Pace:
    """Counts what is done of many, from any thread, and tells a progress the rate."""

    def __init__(self, show: Callable[[float, str], None], total: int, noun: str) -> None:
        """Begin now.

        Args:
            show: What `Display.progress` gives.
            total: How many there are to do.
            noun: What is counted, in the plural; `bytes` are shown in larger units.
        """
        self._show, self._total, self._noun = show, total, noun
        self._done, self._began = 0, time.monotonic()
        self._lock = threading.Lock()

    def __call__(self, more: int) -> None:
        """So many more are done."""
        with self._lock:
            self._done += more
        rate = self._done / max(time.monotonic() - self._began, 1e-9)
        if self._noun == "bytes":
            done, total = format_bytes(self._done), format_bytes(self._total)
            said = f"{done} of {total}, {format_bytes(round(rate))}/s"
        else:
            said = f"{self._done:,} of {self._total:,} {self._noun}, {format_rate(rate)}"
        self._show(self._done / max(self._total, 1), said)


def format_rate(rate: float) -> str:
    """So many a second, or a minute where that reads better."""
    return f"{rate:.1f}/s" if rate >= 1 else f"{60 * rate:.1f}/min"


def format_seconds(seconds: float) -> str:
    """A duration, for example `2 h 05 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on stdout, for commands whose result it is."""
    from rich.console import Console  # noqa: PLC0415

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    _print_whole(console, _make_table(title, header, rows))


def _print_whole(console: Console, table: Table) -> None:
    """A table of which nothing is cut: where a window is too narrow, it wraps the lines itself."""
    from rich.measure import Measurement  # noqa: PLC0415

    least = Measurement.get(console, console.options.update(width=_WIDEST), table).minimum
    before = console.width
    console.width = max(before, least)
    console.print(table, soft_wrap=False, crop=False)
    console.width = before


def _make_table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(title=Text(show_line(title)), title_justify="left", title_style="bold")
    cells = [
        [f"{v:.3g}" if isinstance(v, float) else show_line(str(v)) for v in row] for row in rows
    ]
    for k, name in enumerate(header):
        numeric = all(isinstance(row[k], (int, float)) for row in rows)
        widths = [_least_width(text) for text in (*name.split(), *(row[k] for row in cells))]
        table.add_column(
            name, justify="right" if numeric else "left", min_width=max(widths, default=0)
        )
    for row in cells:
        # As it is: brackets in a name are no colours.
        table.add_row(*map(Text, row))
    return table


def _least_width(text: str) -> int:
    """Columns in which a text can be read: short ones whole, long ones by words."""
    return len(text) if len(text) <= _SHORT else max(map(len, text.split()), default=0)


def format_bytes(size: int) -> str:
    """A size in decimal units, for example `14.1 GB`."""
    value, unit = float(size), 0
    while value >= 1000 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.0f} {_UNITS[unit]}" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"
