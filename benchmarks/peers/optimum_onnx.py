"""optimum-onnx: the language model alone, as it knows no LLaVA, on onnxruntime."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Final

sys.path.append(str(Path(__file__).resolve().parent))

from measure import OnnxDecoder, find_versions, measure_session, run

NAME: Final = "optimum-onnx"
SCOPE: Final = "decoder"
PRECISIONS: Final = ("fp32",)


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """A decoder with a growing cache."""
    from optimum.exporters.onnx import main_export

    main_export(
        str(options.checkpoint / "decoder"),
        output=str(options.out),
        task="text-generation-with-past",
        dtype="fp32",
        local_files_only=True,
    )
    return {"note": "logits of all rows; a growing cache"}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Times of the graph."""
    import onnxruntime  # noqa: F401 - loading libraries is not loading the model

    return measure_session(
        lambda: OnnxDecoder(
            options.out / "model.onnx", options.threads, past="past_key_values", present="present"
        ),
        options,
        versions=find_versions("optimum-onnx", "transformers", "onnxruntime"),
    )


if __name__ == "__main__":
    run(prepare, measure)
