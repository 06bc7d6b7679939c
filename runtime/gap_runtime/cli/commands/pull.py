"""`gap-runtime pull`: a bundle from the hub."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any, Final, TypedDict

from gap_runtime.cli.options import print_json, print_line

SUMMARY: Final = "download a bundle from the hub and compare it with its manifest"


class Pulled(TypedDict):
    """A bundle that came from the hub: its folder, where it is from, how much it is."""

    bundle: str
    repository: str
    revision: str | None
    files: int
    bytes: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("name", metavar="ORG/NAME", help="repository, or ORG/NAME@REVISION")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for it (default: the hub's cache)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def json_types() -> dict[str, Any]:
    """By what decides it, the type of what `--json` prints."""
    return {"--json": Pulled}


def run(options: argparse.Namespace) -> int:
    """Do it; the exit code."""
    from gap_runtime.bundle.hub import parse_name, pull  # noqa: PLC0415
    from gap_runtime.bundle.validation import read_manifest  # noqa: PLC0415
    from gap_runtime.display import Display, format_bytes  # noqa: PLC0415

    name = parse_name(options.name)
    display = Display()
    # The library shows how far it is.
    with display.step(f"pulling {name}", live=False):
        begin = partial(display.count, "comparing with the manifest", "bytes")
        folder = pull(name, options.out, verify_all=True, begin=begin)
    files = read_manifest(folder).files
    size = sum(entry.size for entry in files.values())
    display.say(f"{len(files)} files, {format_bytes(size)}, as the manifest has them")
    if options.json:
        pulled: Pulled = {
            "bundle": str(folder),
            "repository": name.repository,
            "revision": name.revision,
            "files": len(files),
            "bytes": size,
        }
        print_json(pulled)
    else:
        print_line(str(folder))
    return 0
