"""What stands against running a target's graphs with onnxruntime, and how to get it."""

from __future__ import annotations

from typing import Final

from packaging.version import Version

from gap_runtime.machines.fit import fits_version
from gap_runtime.machines.survey import Machine
from gap_runtime.machines.target import Target

_OPSET_24: Final = Version("1.24")


def find_missing(machine: Machine, target: Target) -> list[str]:
    """What a target misses on a machine that runs it with onnxruntime."""
    if not machine.onnxruntimes:
        text = (
            "onnxruntime is not installed; pip install 'gap-runtime[cpu]', or 'gap-runtime[gpu]' "
            "for CUDA, never both"
        )
        return [text]
    if not machine.providers:
        return ["onnxruntime is installed but does not work; see the problem above"]
    name, version = next(iter(machine.onnxruntimes.items()))
    if target.opset < 24 or fits_version(version, f">={_OPSET_24}"):
        return []
    text = (
        f"opset {target.opset} needs onnxruntime >={_OPSET_24}, found {name} {version}; take "
        "Python 3.11 or newer and pip install --upgrade it, or export with --target portable"
    )
    return [text]
