"""CUDA where it is there, else the CPU; :cpu, :cuda, :tensorrt, :nvtensorrtrtx: that or nothing.

The graphs run as they are, through one of onnxruntime's providers.
"""

from typing import Final

from gap_runtime.backends.onnxruntime.missing import find_missing
from gap_runtime.backends.onnxruntime.session import open_decoder, open_stage

SHORT_NAMES: Final = {
    "cpu": "onnxruntime:cpu",
    "cuda": "onnxruntime:cuda",
    "gpu": "onnxruntime:cuda",
    "ort": "onnxruntime",
}
"""Other names that `--backend` takes for it."""

__all__ = ["find_missing", "open_decoder", "open_stage"]
