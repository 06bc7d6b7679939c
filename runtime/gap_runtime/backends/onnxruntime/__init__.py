"""CUDA where it is there, else the CPU; :cpu, :cuda, :tensorrt, :nvtensorrtrtx: that or nothing.

The graphs run as they are, through one of onnxruntime's providers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from gap_runtime.backends.onnxruntime.session import open_decoder, open_stage

if TYPE_CHECKING:
    from gap_runtime.machines.survey import Machine
    from gap_runtime.machines.target import Target

SHORT_NAMES: Final = {
    "cpu": "onnxruntime:cpu",
    "cuda": "onnxruntime:cuda",
    "gpu": "onnxruntime:cuda",
    "ort": "onnxruntime",
}
"""Other names that `--backend` takes for it."""

__all__ = ["find_missing", "open_decoder", "open_stage"]


def find_missing(machine: Machine, target: Target) -> list[str]:
    """What a target misses on a machine that runs it with onnxruntime."""
    # Whoever runs graphs has what it needs, and looks at no machine.
    from gap_runtime.backends.onnxruntime.missing import find_missing as find  # noqa: PLC0415

    return find(machine, target)
