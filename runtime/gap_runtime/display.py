"""What people see: progress and tables, on stderr. Results go to stdout elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from rich.console import Console
from rich.table import Table

_UNITS: Final = ("B", "kB", "MB", "GB", "TB")


class Display:
    """Step lines with elapsed time: a live one on a terminal, plain ones elsewhere."""

    def __init__(self, *, quiet: bool = False) -> None:
        """A display on stderr; a quiet one shows nothing."""
        # A fixed width keeps lines and tables whole in log files.
        self._console = Console(
            stderr=True,
            quiet=quiet,
            highlight=False,
            width=None if sys.stderr.isatty() else 120,
        )

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Show that a step runs, and when it is done how long it took."""
        began = time.monotonic()
        if self._console.is_terminal:
            with self._console.status(name):
                yield
        else:
            yield
        self._console.print(f"{name} [dim]({time.monotonic() - began:.1f} s)[/dim]")

    def say(self, text: str) -> None:
        """One line."""
        self._console.print(text, markup=False)

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table; numbers are right-aligned."""
        self._console.print(_make_table(title, header, rows))


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on stdout, for commands whose result it is."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(_make_table(title, header, rows))


def _make_table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for k, name in enumerate(header):
        numeric = all(isinstance(row[k], (int, float)) for row in rows)
        table.add_column(name, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row))
    return table


def format_bytes(size: int) -> str:
    """A size in decimal units, for example `14.1 GB`."""
    value, unit = float(size), 0
    while value >= 1000 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.0f} {_UNITS[unit]}" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"
