"""What command lines of benchmarks share: what is wrong with them is one line, exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Iterable
from typing import NoReturn

from gap_runtime.cli.options import run_command
from gap_runtime.errors import UnknownNameError, describe_unknown


def run_benchmark(main: Callable[[], None]) -> NoReturn:
    """Run a benchmark and end the program; errors are told as those of the two commands.

    Its parser is `gap_runtime.cli.options.ArgumentParser`.
    """

    def run(_: object) -> int:
        main()
        return 0

    sys.exit(run_command(run, None))


def require_known(what: str, names: Iterable[str], known: Collection[str]) -> None:
    """Refuse a name that is misspelt, before the work on those in front of it.

    Raises:
        UnknownNameError: One is.
    """
    for name in names:
        if name not in known:
            raise UnknownNameError(describe_unknown(what, name, list(known)))


def read_number(text: str) -> int:
    """A whole number of 1 or more, as the type of an argument."""
    if not (text.isdecimal() and len(text) < 10 and int(text)):
        raise argparse.ArgumentTypeError(f"'{text:.60}': expected a number of 1 or more")
    return int(text)


def read_seconds(text: str) -> float:
    """Seconds, more than 0, as the type of an argument."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e9:  # NaN is neither
        raise argparse.ArgumentTypeError(f"'{text:.60}': expected seconds, more than 0")
    return seconds
