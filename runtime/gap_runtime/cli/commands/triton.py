"""`gap-runtime triton`: a bundle as a model of NVIDIA's Triton Inference Server."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final, TypedDict

from gap_runtime.cli.options import add_backend, add_bundle, open_bundle, print_json

SUMMARY: Final = "write it as a model repository for Triton Inference Server"


class TritonModel(TypedDict):
    """The folder of the model in the repository."""

    model: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_bundle(parser)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of the model repository"
    )
    add_backend(parser)


def json_types() -> dict[str, Any]:
    """By what decides it, the type of what `--json` prints."""
    return {"--json": TritonModel}


def run(options: argparse.Namespace) -> int:
    """Do it; the exit code."""
    from gap_runtime.service.triton import write_repository  # noqa: PLC0415

    folder = write_repository(open_bundle(options), options.out, options.backend)
    if options.json:
        model: TritonModel = {"model": str(folder)}
        print_json(model)
    else:
        print(folder)
    return 0
