"""gap-export itself, on onnxruntime."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Final

sys.path.append(str(Path(__file__).resolve().parent))

from measure import run
from own import measure_bundle, prepare_bundle

NAME: Final = "gap-export"
SCOPE: Final = "whole"
PRECISIONS: Final = ("fp32", "int4", "fp16")


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """A bundle with all visual tokens and one with half of them, which share their weights."""
    return prepare_bundle(options, "cpu")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Times of a bundle."""
    return measure_bundle(options, "onnxruntime:cpu", "onnxruntime")


if __name__ == "__main__":
    run(prepare, measure)
