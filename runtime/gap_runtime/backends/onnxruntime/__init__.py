"""onnxruntime runs the graphs, on the CPU or through one of its providers."""

from typing import Final

from gap_runtime.backends.onnxruntime.session import open_decoder, open_stage

SHORT_NAMES: Final = {
    "cpu": "onnxruntime:cpu",
    "cuda": "onnxruntime:cuda",
    "gpu": "onnxruntime:cuda",
    "ort": "onnxruntime",
}
"""Other names that `--backend` takes for it."""

__all__ = ["open_decoder", "open_stage"]
