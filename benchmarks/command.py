"""What command lines of benchmarks share: what is wrong with them is one line, exit code 2."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Final, NoReturn

from gap_runtime.cli.options import run_command
from gap_runtime.errors import ConfigError, UnknownNameError, describe_unknown
from gap_runtime.records.files import exists, is_file, is_folder

MOST_THREADS: Final = 1024


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


def read_count(text: str) -> int:
    """A whole number of 0 or more, as the type of an argument."""
    if not (text.isdecimal() and len(text) < 10):
        raise argparse.ArgumentTypeError(f"'{text:.60}': expected a number of 0 or more")
    return int(text)


def read_threads(text: str) -> int:
    """A number of threads, as the type of an argument."""
    threads = read_count(text)
    if not 1 <= threads <= MOST_THREADS:
        raise argparse.ArgumentTypeError(f"'{text}': expected threads, 1 to {MOST_THREADS}")
    return threads


def read_ratio(text: str) -> float:
    """A share of visual tokens to remove, as the type of an argument."""
    try:
        ratio = float(text)
    except ValueError:
        ratio = -1.0
    if not 0 <= ratio < 1:  # NaN is neither
        raise argparse.ArgumentTypeError(f"'{text:.60}': expected a ratio in [0, 1)")
    return ratio


def read_output(text: str) -> Path:
    """A file to be written, as the type of an argument; the folders above it are made."""
    path = Path(text)
    if not text or (exists(path) and not is_file(path)):
        raise argparse.ArgumentTypeError(f"'{text:.200}': no file, expected one to write")
    _require_folder(path.parent)
    return path


def read_home(text: str) -> Path:
    """A folder to work in, as the type of an argument; it is made."""
    if not text:
        raise argparse.ArgumentTypeError("'': expected a folder")
    _require_folder(Path(text))
    return Path(text)


def _require_folder(path: Path) -> None:
    """Refuse a folder that cannot be made, or written to."""
    there = next(each for each in (path, *path.absolute().parents) if exists(each))
    if not is_folder(there) or not os.access(there, os.W_OK):
        what = "cannot be written to" if is_folder(there) else "is no folder"
        raise argparse.ArgumentTypeError(f"'{path}': '{there}' {what}")


def run_export(arguments: Sequence[str]) -> None:
    """An export in a process of its own, of which nothing is printed.

    Raises:
        ConfigError: It failed; the message is its own.
    """
    program = Path(sys.executable).parent / "gap-export"
    done = subprocess.run(
        [str(program), *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ConfigError(f"gap-export {arguments[0]}: {said.removeprefix('error: ')}")


def read_seconds(text: str) -> float:
    """Seconds, more than 0, as the type of an argument."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e9:  # NaN is neither
        raise argparse.ArgumentTypeError(f"'{text:.60}': expected seconds, more than 0")
    return seconds
