"""What stands against building and running a target's engines, and how to get it."""

from __future__ import annotations

from gap_runtime.machines.fit import fits_version
from gap_runtime.machines.survey import JETSON_CHIPS, Machine
from gap_runtime.machines.target import Target


def find_missing(machine: Machine, target: Target) -> list[str]:
    """What a target misses on a machine that runs it with TensorRT."""
    found = (_miss_engine(machine, target), _miss_cuda_python(machine))
    return [text for text in found if text is not None]


def _miss_engine(machine: Machine, target: Target) -> str | None:
    found = []
    for name, wanted in target.packages.items():
        version = machine.engines.get(name)
        if version is not None:
            if fits_version(version, wanted):
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
