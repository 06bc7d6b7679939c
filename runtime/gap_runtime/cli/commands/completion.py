"""`gap-runtime completion`: the script by which a shell completes its command lines."""

from __future__ import annotations

import argparse
from typing import Final

from gap_runtime.cli import completion

SUMMARY: Final = "print a script that makes your shell complete commands and options"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    completion.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Do it; the exit code."""
    from gap_runtime.cli.main import PROGRAM  # noqa: PLC0415 - it lists this module

    print(completion.make_script(PROGRAM, options.shell))
    return 0
