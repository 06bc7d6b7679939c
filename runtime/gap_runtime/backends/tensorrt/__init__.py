"""The engines of `gap-runtime build`; :FOLDER those of that folder under engines/."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from gap_runtime.backends.tensorrt.session import open_decoder, open_stage

if TYPE_CHECKING:
    from gap_runtime.bundle.bundle import Bundle
    from gap_runtime.bundle.engines import BuildReport, BuildRequest
    from gap_runtime.display import Display
    from gap_runtime.machines.survey import Machine
    from gap_runtime.machines.target import Target

__all__ = ["build", "find_missing", "open_decoder", "open_stage"]

SHORT_NAMES: Final = {"trt": "tensorrt"}
"""Other names that `--backend` takes for it."""


def find_missing(machine: Machine, target: Target) -> list[str]:
    """What a target misses on a machine that runs it with TensorRT."""
    # Whoever runs engines has what they need, and looks at no machine.
    from gap_runtime.backends.tensorrt.missing import find_missing as find  # noqa: PLC0415

    return find(machine, target)


def build(bundle: Bundle, request: BuildRequest, display: Display) -> BuildReport:
    """Make the engines of a bundle; see gap_runtime.backends.Builder."""
    # Whoever runs engines loads nothing that builds them.
    from gap_runtime.backends.tensorrt.builder import build_engines  # noqa: PLC0415

    return build_engines(bundle, request, display)
