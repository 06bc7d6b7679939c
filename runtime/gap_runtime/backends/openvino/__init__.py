"""OpenVINO on the CPU; :gpu, :npu: on Intel's GPU or NPU, as OpenVINO names them.

The graphs of portable bundles run as they are, as do vision and text graphs of opset 24.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from gap_runtime.backends.openvino.session import open_decoder, open_stage

if TYPE_CHECKING:
    from gap_runtime.machines.survey import Machine
    from gap_runtime.machines.target import Target

SHORT_NAMES: Final = {"ov": "openvino"}
"""Other names that `--backend` takes for it."""

__all__ = ["find_missing", "open_decoder", "open_stage"]


def find_missing(machine: Machine, target: Target) -> list[str]:
    """What a target misses on a machine that runs it with OpenVINO."""
    # Whoever runs graphs has what it needs, and looks at no machine.
    from gap_runtime.backends.openvino.missing import find_missing as find  # noqa: PLC0415

    return find(machine, target)
