"""`gap-runtime triton`: a bundle as a model of NVIDIA's Triton Inference Server."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from gap_runtime.cli.options import add_backend, add_bundle, open_bundle, print_json

SUMMARY: Final = "write it as a model repository for Triton Inference Server"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_bundle(parser)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of the model repository"
    )
    add_backend(parser)


def run(options: argparse.Namespace) -> int:
    """Do it; the exit code."""
    from gap_runtime.service.triton import write_repository  # noqa: PLC0415

    folder = write_repository(open_bundle(options), options.out, options.backend)
    if options.json:
        print_json({"model": str(folder)})
    else:
        print(folder)
    return 0
