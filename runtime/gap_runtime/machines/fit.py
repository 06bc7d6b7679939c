"""Which targets fit a machine, and what stands against the others and how to get it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from gap_runtime.machines.survey import JETSON_CHIPS, Machine
from gap_runtime.machines.target import Target, list_targets, load_target

_OPSET_24: Final = Version("1.24")
_ROOM: Final = 0.9
"""Share of its nominal memory that a machine has at least; firmware keeps the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Whether a target fits; `missing` says what stands against it and how to get it."""

    target: str
    description: str
    fits: bool
    missing: tuple[str, ...]
    notes: tuple[str, ...]


def fit_targets(machine: Machine) -> tuple[Fit, ...]:
    """Every target, and what stands against it on this machine."""
    return tuple(fit_target(machine, load_target(name)) for name in list_targets())


def fit_target(machine: Machine, target: Target) -> Fit:
    """One target, and what stands against it on this machine."""
    found = [_miss_gpu(machine, target) if target.compute_capabilities else None]
    if target.packages:
        found += [_miss_engine(machine, target), _miss_cuda_python(machine)]
    else:
        found.append(_miss_onnxruntime(machine, target))
    missing = tuple(text for text in found if text is not None)
    note = None if missing else _note_memory(machine, target)
    return Fit(
        target=target.name,
        description=target.description,
        fits=not missing,
        missing=missing,
        notes=() if note is None else (note,),
    )


def _miss_gpu(machine: Machine, target: Target) -> str | None:
    wanted = " or ".join(target.compute_capabilities)
    if not machine.gpus:
        return (
            f"no NVIDIA GPU found, needs one of compute capability {wanted}; where there is one, "
            "install its driver until nvidia-smi shows it"
        )
    found = [gpu.compute_capability for gpu in machine.gpus]
    if any(capability in target.compute_capabilities for capability in found):
        return None
    names = ", ".join(
        f"{gpu.name} ({gpu.compute_capability or 'unknown'})" for gpu in machine.gpus
    )
    return f"needs a GPU of compute capability {wanted}, found {names}; choose the target of that"


def _miss_engine(machine: Machine, target: Target) -> str | None:
    found = []
    for name, wanted in target.packages.items():
        version = machine.engines.get(name)
        if version is not None:
            if _fits_version(version, wanted):
                return None
            found.append(f"{name} {version}")
    wanted_all = " or ".join(f"{name} {wanted}" for name, wanted in target.packages.items())
    listed = ", ".join(found) or "none"
    return f"needs {wanted_all}, found {listed}; {_advise_engine(machine, target)}"


def _miss_cuda_python(machine: Machine) -> str | None:
    if machine.cuda_python is not None:
        return None
    major = int((machine.cuda or "13").partition(".")[0])
    return (
        "engines run through cuda-python, which is not installed; pip install "
        f"'cuda-python>={major},<{major + 1}'"
    )


def _advise_engine(machine: Machine, target: Target) -> str:
    """How to get the engine package of a target."""
    if set(target.compute_capabilities) & set(JETSON_CHIPS.values()):
        return _advise_jetson(machine)
    extra = "rtx" if "tensorrt_rtx" in target.packages else "tensorrt"
    return f"pip install 'gap-runtime[{extra}]'"


def _advise_jetson(machine: Machine) -> str:
    """How to get JetPack's TensorRT, which comes by no other way."""
    if machine.jetson is None:
        return "it comes with JetPack, on the Jetson itself"
    if "tensorrt" in machine.engines:
        return "it comes with JetPack: install the one that this target names, or choose another"
    if "libnvinfer10" not in machine.debian:
        return "sudo apt install nvidia-jetpack"
    if "python3-libnvinfer" not in machine.debian:
        return "sudo apt install python3-libnvinfer"
    return (
        "JetPack's is there, but this Python does not see it: make the environment with "
        "python3 -m venv --system-site-packages"
    )


def _miss_onnxruntime(machine: Machine, target: Target) -> str | None:
    if not machine.onnxruntimes:
        return (
            "onnxruntime is not installed; pip install 'gap-runtime[cpu]', or 'gap-runtime[gpu]' "
            "for CUDA, never both"
        )
    if not machine.providers:
        return "onnxruntime is installed but does not work; see the problem above"
    name, version = next(iter(machine.onnxruntimes.items()))
    if target.opset < 24 or _fits_version(version, f">={_OPSET_24}"):
        return None
    return (
        f"opset {target.opset} needs onnxruntime >={_OPSET_24}, found {name} {version}; take "
        "Python 3.11 or newer and pip install --upgrade it, or export with --target portable"
    )


def _note_memory(machine: Machine, target: Target) -> str | None:
    """What to say of a machine that is smaller than its kind."""
    sizes = [gpu.memory_mib for gpu in machine.gpus if gpu.memory_mib is not None]
    if target.memory_mib is None or not sizes or max(sizes) >= _ROOM * target.memory_mib:
        return None
    return (
        f"the target counts on {target.memory_mib} MiB, this machine has {max(sizes)}; "
        "gap-export MODEL --dry-run --target NAME says what a bundle takes"
    )


def _fits_version(version: str, wanted: str) -> bool:
    try:
        return SpecifierSet(wanted).contains(Version(version), prereleases=True)
    except InvalidVersion:
        return False
