"""What stands against building and running a target's engines, and how to get it."""

from __future__ import annotations

from typing import Final

from packaging.version import InvalidVersion, Version

from gap_runtime.machines.fit import fits_version
from gap_runtime.machines.survey import JETSON_CHIPS, Machine, is_newer
from gap_runtime.machines.target import Target

_EXTRAS_CUDA: Final = 13
"""The CUDA of the extras whose names say none."""


def find_missing(machine: Machine, target: Target) -> list[str]:
    """What a target misses on a machine that runs it with TensorRT."""
    found = (_miss_engine(machine, target), _miss_cuda_python(machine))
    return [text for text in found if text is not None]


def _miss_engine(machine: Machine, target: Target) -> str | None:
    found = []
    for name, wanted in target.packages.items():
        version = machine.engines.get(name)
        if version is None:
            continue
        made_for = machine.engine_cudas.get(name)
        if not fits_version(version, wanted):
            found.append(f"{name} {version}")
        elif made_for is not None and is_newer(str(made_for), machine.cuda):
            return (
                f"{name} {version} is made for CUDA {made_for}, this driver runs CUDA "
                f"{machine.cuda}; update the driver, or pip uninstall {name.replace('_', '-')} "
                f"and its parts, and pip install '{_extra(machine, name)}'"
            )
        else:
            return None
    wanted_all = " or ".join(f"{name} {wanted}" for name, wanted in target.packages.items())
    listed = ", ".join(found) or "none"
    return f"needs {wanted_all}, found {listed}; {_advise_engine(machine, target)}"


def _miss_cuda_python(machine: Machine) -> str | None:
    advice = f"pip install '{_fitting_cuda_python(machine)}'"
    if machine.cuda_python is None:
        return f"engines run through cuda-python, which is not installed; {advice}"
    if machine.cuda is None or _starts(machine.cuda_python, machine.cuda, machine):
        return None
    return (
        f"cuda-python {machine.cuda_python} does not start with this driver, which runs CUDA "
        f"{machine.cuda}; {advice}"
    )


def _fitting_cuda_python(machine: Machine) -> str:
    """The versions of cuda-python that this machine's driver runs."""
    cuda = machine.cuda or "13.0"
    if machine.jetson is not None and machine.cuda is not None:
        # A Jetson's driver refuses a CUDA runtime of a later minor version too.
        return f"cuda-python=={cuda}.*"
    major = int(cuda.partition(".")[0])
    return f"cuda-python>={major},<{major + 1}"


def _starts(cuda_python: str, cuda: str, machine: Machine) -> bool:
    """Whether a driver runs what a version of cuda-python has inside."""
    try:
        has, runs = Version(cuda_python).release[:2], Version(cuda).release[:2]
    except InvalidVersion:
        return True
    return has <= runs if machine.jetson is not None else has[0] <= runs[0]


def _advise_engine(machine: Machine, target: Target) -> str:
    """How to get the engine package of a target."""
    if set(target.compute_capabilities) & set(JETSON_CHIPS.values()):
        return _advise_jetson(machine)
    name = "tensorrt_rtx" if "tensorrt_rtx" in target.packages else "tensorrt"
    return f"pip install '{_extra(machine, name)}'"


def _extra(machine: Machine, name: str) -> str:
    """The extra that brings a package for the CUDA that the machine's driver runs."""
    extra = "rtx" if name == "tensorrt_rtx" else "tensorrt"
    is_older = is_newer(str(_EXTRAS_CUDA), machine.cuda)
    return f"gap-runtime[{extra}-cu12]" if is_older else f"gap-runtime[{extra}]"


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
