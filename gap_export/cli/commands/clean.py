"""`gap-export clean`: what exports that were killed have left, and its removal."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from gap_runtime.cli.options import print_json, print_line
from gap_runtime.errors import InputError

SUMMARY: Final = "say what killed exports have left in a folder, and remove it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "folders",
        nargs="*",
        type=Path,
        default=[Path()],
        metavar="DIR",
        help="folders that bundles were exported to (default: this one)",
    )
    parser.add_argument("--remove", action="store_true", help="remove it, not only say it")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(options: argparse.Namespace) -> int:
    """Do it; the exit code."""
    from gap_export.pipeline.remains import clear, find_remains  # noqa: PLC0415
    from gap_runtime.display import Display, format_bytes  # noqa: PLC0415

    for folder in options.folders:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder")
    found = [left for folder in options.folders for left in find_remains(folder)]
    if options.json:
        print_json([{"folder": str(each.folder), "size": each.size} for each in found])
    for left in found:
        what = "a bundle that gave way" if left.is_whole else "an export that was stopped"
        if not options.json:
            print_line(f"{left.folder}  {format_bytes(left.size)}, {what}: {left.bundle.name}")
        if options.remove:
            try:
                clear(left)
            except OSError as error:
                raise InputError(
                    f"{left.folder}: cannot be removed ({error.strerror or error})"
                ) from error
    display = Display()
    if not found:
        display.say("nothing is left of killed exports")
    elif not options.remove:
        display.say("gap-export clean --remove removes it; so does the next export beside it")
    return 0
