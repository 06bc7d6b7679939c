"""What stands against running a target's graphs with onnxruntime, and how to get it."""

from __future__ import annotations

from typing import Final

from packaging.version import Version

from gap_runtime.backends.onnxruntime.providers import describe_lack, find_provider
from gap_runtime.machines.fit import fits_version
from gap_runtime.machines.survey import Machine, is_newer
from gap_runtime.machines.target import Target

_OPSET_24: Final = Version("1.24")
_BLOCKS_ON_CUDA: Final = Version("1.30")
"""Since then its wheels have fast kernels for weights in 4 bits, and all that a step needs."""


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
    if target.provider is not None:
        return _miss_provider(machine, target.provider, f"{name} {version}", version)
    if target.opset < 24 or fits_version(version, f">={_OPSET_24}"):
        return []
    text = (
        f"opset {target.opset} needs onnxruntime >={_OPSET_24}, found {name} {version}; take "
        "Python 3.11 or newer and pip install --upgrade it, or export with --target portable"
    )
    return [text]


def _miss_provider(machine: Machine, device: str, installed: str, version: str) -> list[str]:
    """What a target misses whose graphs are made for one of onnxruntime's providers."""
    provider = find_provider(device)
    found = []
    if not machine.gpus:
        found.append(
            "no NVIDIA GPU found; where there is one, install its driver until nvidia-smi shows it"
        )
    if provider.name not in machine.providers:
        found.append(f"needs {provider.name}, {installed} has none; {provider.source}")
    elif not fits_version(version, f">={_BLOCKS_ON_CUDA}"):
        found.append(
            f"needs onnxruntime-gpu >={_BLOCKS_ON_CUDA}, found {version}; pip install --upgrade "
            "'gap-runtime[gpu]'"
        )
    if is_newer(machine.onnxruntime_cuda, machine.cuda):
        found.append(
            f"{installed} is made for CUDA {machine.onnxruntime_cuda}, this driver runs CUDA "
            f"{machine.cuda}; update the driver, or export with --target standard and pip install "
            "'gap-runtime[gpu-cu12]'"
        )
    capabilities = [gpu.compute_capability for gpu in machine.gpus]
    if None not in capabilities:
        lack = describe_lack(machine.onnxruntime_kernels, list(filter(None, capabilities)))
        if lack:
            found.append(f"{installed} {lack}")
    return found
