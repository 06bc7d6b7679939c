"""`gap-runtime push`: a bundle onto the hub."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

from gap_runtime.cli.options import add_backend, add_bundle, open_bundle, print_json
from gap_runtime.cli.sharing import Pushed, add_push_arguments, push_bundle

SUMMARY: Final = "share it on the hub, with a card"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_bundle(parser)
    parser.add_argument("name", metavar="ORG/NAME", help="repository, or ORG/NAME@BRANCH")
    add_push_arguments(parser)
    parser.add_argument(
        "--accuracy",
        type=Path,
        metavar="FILE",
        help="what `gap-runtime evaluate --json` printed of this bundle, for the card",
    )
    parser.add_argument(
        "--no-check",
        action="store_false",
        dest="check",
        help="do not compare with PyTorch's answers first; the card says so",
    )
    add_backend(parser)


def json_types() -> dict[str, Any]:
    """By what decides it, the type of what `--json` prints."""
    return {"--json": Pushed}


def run(options: argparse.Namespace) -> int:
    """Do it; the exit code."""
    from gap_runtime.bundle.hub import parse_name  # noqa: PLC0415
    from gap_runtime.bundle.license import find_license  # noqa: PLC0415
    from gap_runtime.bundle.push import require_login  # noqa: PLC0415
    from gap_runtime.display import Display  # noqa: PLC0415
    from gap_runtime.grounding.check import check_bundle, count_rows  # noqa: PLC0415
    from gap_runtime.report.card import read_accuracy  # noqa: PLC0415

    display = Display()
    name = parse_name(options.name)
    bundle = open_bundle(options)
    accuracy = None if options.accuracy is None else read_accuracy(options.accuracy, bundle)
    require_login(name)
    found = find_license(bundle.manifest.source, options.license)
    found.require_shareable(accepted=options.accept_license)
    report = None
    if options.check and bundle.manifest.reference is not None:
        rows = count_rows(bundle)
        with display.count("comparing with PyTorch's answers", "answers", rows) as pace:
            report = check_bundle(bundle, options.backend, on_row=lambda _: pace(1))
    result = push_bundle(options, display, bundle, name, found, report=report, accuracy=accuracy)
    if options.json:
        print_json(result)
    else:
        print(result["url"])
    return 0
