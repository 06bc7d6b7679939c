"""What this machine has. Reads; changes and loads nothing.

Facts come from what other programs and files say. Each text has a function of its own that reads
it, and `survey_machine` is the one place that asks.
"""

from __future__ import annotations

import ctypes
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import metadata, util
from pathlib import Path
from typing import Any, Final

from gap_runtime.machines.fat_binary import ONNXRUNTIME_CUDA, list_kernels
from gap_runtime.machines.memory import Memory, read_memory
from gap_runtime.machines.target import list_targets, load_target
from gap_runtime.machines.telemetry import silence_telemetry

_QUERY: Final = ("name", "compute_cap", "driver_version", "memory.total", "memory.free")
_ONNXRUNTIMES: Final = ("onnxruntime", "onnxruntime-gpu")
_BOTH: Final = (
    "onnxruntime and onnxruntime-gpu are both installed and overwrite each other; "
    "pip uninstall onnxruntime onnxruntime-gpu, then pip install 'gap-runtime[cpu]' or "
    "'gap-runtime[gpu]'"
)
_CUDA_PYTHON: Final = ("cuda-bindings", "cuda-python")
_DEBIAN: Final = ("nvidia-jetpack", "nvidia-l4t-core", "libnvinfer10", "python3-libnvinfer")
JETSON_CHIPS: Final = {"Thor": "11.0", "Orin": "8.7", "Xavier": "7.2"}
_JETPACKS: Final = {"36": "6", "38": "7", "39": "7"}
"""JetPack by the major number of its Jetson Linux."""
_PATIENCE: Final = 60
_MIB: Final = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU; null is what nobody tells. On a Jetson the memory is the machine's own."""

    name: str
    compute_capability: str | None
    memory_mib: int | None
    free_mib: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Jetson:
    """A Jetson: its model, Jetson Linux (`36.4.7`) and JetPack (`6.2.1`, or `6` alone)."""

    model: str
    linux: str | None
    jetpack: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What was found. `engines` are the packages that targets name, by import name with versions.

    `engine_cudas` has the major version of CUDA that such a package was made for, where its wheel
    says it. `cuda_python` is the version of the package through which engines run, `onnxruntimes`
    are the installed distributions of onnxruntime with their versions, `onnxruntime_cuda` the CUDA
    that one is built for, `onnxruntime_kernels` the GPUs that it has kernels for (in the words of
    `list_kernels`; nothing where that is not known), `providers` what the one that can be imported
    has. `problems` need mending, whatever the target.
    """

    system: str
    python: str
    memory_mib: int | None
    free_mib: int | None
    disk_free_mib: int
    driver: str | None
    cuda: str | None
    gpus: tuple[Gpu, ...]
    jetson: Jetson | None
    engines: dict[str, str]
    engine_cudas: dict[str, int]
    cuda_python: str | None
    debian: dict[str, str]
    onnxruntimes: dict[str, str]
    onnxruntime_cuda: str | None
    onnxruntime_kernels: tuple[str, ...]
    providers: tuple[str, ...]
    problems: tuple[str, ...]


def describe_size(mib: int | None) -> str:
    """Memory or disk, for people."""
    return "unknown" if mib is None else f"{mib / 1024:.1f} GiB"


def describe_gpu(gpu: Gpu) -> str:
    """A GPU on one line."""
    free = f" ({describe_size(gpu.free_mib)} free)" if gpu.free_mib is not None else ""
    capability = gpu.compute_capability or "unknown"
    size = describe_size(gpu.memory_mib)
    return f"{gpu.name}, compute capability {capability}, {size}{free}"


def read_gpus(text: str) -> tuple[tuple[Gpu, ...], str | None]:
    """GPUs and the driver's version, from `nvidia-smi --query-gpu=... --format=csv`."""
    gpus, driver = [], None
    for line in text.splitlines():
        values = [value.strip() for value in line.split(",")]
        if len(values) != len(_QUERY):
            continue
        name, capability, found, total, free = values
        driver = driver or _known(found)
        gpus.append(
            Gpu(
                name=name,
                compute_capability=_known(capability),
                memory_mib=_number(total),
                free_mib=_number(free),
            )
        )
    return tuple(gpus), driver


def read_cuda_version(text: str) -> str | None:
    """The newest CUDA that the driver runs, from the head of `nvidia-smi`."""
    found = re.search(r"CUDA(?: UMD)? Version:\s*(\d+\.\d+)", text)
    return found.group(1) if found else None


def read_jetson_linux(text: str) -> str | None:
    """Version of Jetson Linux, from /etc/nv_tegra_release."""
    found = re.search(r"R(\d+)\b.*?REVISION:\s*([\d.]+)", text)
    return f"{found.group(1)}.{found.group(2)}" if found else None


def read_debian_versions(text: str, names: Iterable[str]) -> dict[str, str]:
    """Versions of the named packages that are installed, from /var/lib/dpkg/status."""
    wanted, found = set(names), {}
    for entry in text.split("\n\n"):
        fields = dict(
            line.split(": ", 1) for line in entry.splitlines() if ": " in line and line[0] != " "
        )
        if fields.get("Package") in wanted and fields.get("Status", "").endswith(" installed"):
            found[fields["Package"]] = fields.get("Version", "")
    return found


def read_source_version(text: str) -> str | None:
    """The `__version__` that a module's source sets, without running it."""
    found = re.search(r"^__version__\s*=\s*[\"']([^\"']+)[\"']", text, flags=re.MULTILINE)
    return found.group(1) if found else None


def read_built_for(text: str) -> str | None:
    """The CUDA that onnxruntime-gpu was built for, from its build_and_package_info.py."""
    found = re.search(r"^cuda_version\s*=\s*[\"'](\d+\.\d+)", text, flags=re.MULTILINE)
    return found.group(1) if found else None


def is_newer(wanted: str | None, cuda: str | None) -> bool:
    """Whether something is made for a later major version of CUDA than the driver runs."""
    return bool(wanted and cuda) and _major(wanted) > _major(cuda)


def _major(version: str | None) -> int:
    return int((version or "0").partition(".")[0])


def read_jetson(model: str, release: str, debian: Mapping[str, str]) -> Jetson | None:
    """The Jetson, None where this is none.

    Args:
        model: /proc/device-tree/model.
        release: /etc/nv_tegra_release.
        debian: Versions of installed Debian packages.
    """
    name = model.strip("\0 \n")
    linux = read_jetson_linux(release)
    if linux is None and "nvidia-l4t-core" in debian:
        linux = debian["nvidia-l4t-core"].partition("-")[0]
    if linux is None and "Jetson" not in name:
        return None
    jetpack = debian.get("nvidia-jetpack", "").partition("+")[0].partition("-")[0]
    major = (linux or "").partition(".")[0]
    return Jetson(
        model=name or "Jetson", linux=linux, jetpack=jetpack or _JETPACKS.get(major) or None
    )


def complete_gpus(
    gpus: tuple[Gpu, ...], jetson: Jetson | None, memory: Memory | None
) -> tuple[Gpu, ...]:
    """GPUs with what a Jetson's tools leave out: its chip tells the rest, its memory is shared."""
    if jetson is None:
        return gpus
    capability = next((c for chip, c in JETSON_CHIPS.items() if chip in jetson.model), None)
    total, free = _count_mib(memory)
    unknown = Gpu(name=jetson.model, compute_capability=None, memory_mib=None, free_mib=None)
    return tuple(
        replace(
            gpu,
            compute_capability=gpu.compute_capability or capability,
            memory_mib=gpu.memory_mib or total,
            free_mib=gpu.free_mib or free,
        )
        for gpu in gpus or (unknown,)
    )


def ask_driver(library: Any) -> tuple[tuple[Gpu, ...], str | None]:
    """GPUs and CUDA's version from the driver's own library; nothing where it does not start.

    Args:
        library: libcuda, loaded by ctypes.
    """
    count, version = ctypes.c_int(), ctypes.c_int()
    if library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(count)):
        return (), None
    library.cuDriverGetVersion(ctypes.byref(version))
    cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"
    gpus = []
    for index in range(count.value):
        handle, name, size = ctypes.c_int(), ctypes.create_string_buffer(128), ctypes.c_size_t()
        major, minor = ctypes.c_int(), ctypes.c_int()
        library.cuDeviceGet(ctypes.byref(handle), index)
        library.cuDeviceGetName(name, len(name), handle)
        library.cuDeviceTotalMem_v2(ctypes.byref(size), handle)
        # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
        library.cuDeviceGetAttribute(ctypes.byref(major), 75, handle)
        library.cuDeviceGetAttribute(ctypes.byref(minor), 76, handle)
        gpus.append(
            Gpu(
                name=name.value.decode(errors="replace"),
                compute_capability=f"{major.value}.{minor.value}",
                memory_mib=size.value // _MIB or None,
                free_mib=None,
            )
        )
    return tuple(gpus), cuda


def survey_machine(folder: Path) -> Machine:
    """What this machine has; `folder` is where bundles would lie."""
    debian = read_debian_versions(_read(Path("/var/lib/dpkg/status")), _DEBIAN)
    memory = read_memory()
    total, free = _count_mib(memory)
    jetson = read_jetson(
        _read(Path("/proc/device-tree/model")), _read(Path("/etc/nv_tegra_release")), debian
    )
    gpus, driver, cuda = _find_gpus()
    engines = {name: _find_version(name, debian) for name in _list_packages()}
    installed = _find_onnxruntimes()
    providers, failure = _ask_providers() if installed else ((), None)
    problems = [_BOTH] if len(installed) > 1 else []
    onnxruntime_file = _find_file("onnxruntime", ONNXRUNTIME_CUDA)
    built_for = read_built_for(_find_source("onnxruntime", "capi/build_and_package_info.py"))
    if is_newer(built_for, cuda):
        problems.append(
            f"onnxruntime-gpu is built for CUDA {built_for}, this driver runs CUDA {cuda}: "
            "it starts on the CPU alone; update the driver, or install one for that CUDA"
        )
    if failure:
        problems.append(f"onnxruntime cannot be imported: {failure}; install it again")
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        memory_mib=total,
        free_mib=free,
        disk_free_mib=shutil.disk_usage(folder).free // _MIB,
        driver=driver,
        cuda=cuda,
        gpus=complete_gpus(gpus, jetson, memory),
        jetson=jetson,
        engines={name: version for name, version in engines.items() if version is not None},
        engine_cudas=_find_engine_cudas(engines),
        cuda_python=_find_distribution(*_CUDA_PYTHON),
        debian=debian,
        onnxruntimes=installed,
        onnxruntime_cuda=built_for,
        onnxruntime_kernels=list_kernels(onnxruntime_file) if onnxruntime_file else (),
        providers=providers,
        problems=tuple(problems),
    )


def _count_mib(memory: Memory | None) -> tuple[int | None, int | None]:
    """Memory in all, and what is free of it."""
    return (None, None) if memory is None else (memory.total // _MIB, memory.free // _MIB)


def _find_gpus() -> tuple[tuple[Gpu, ...], str | None, str | None]:
    """GPUs, driver and CUDA: from nvidia-smi, and the driver's library where that says less."""
    query = ["--query-gpu=" + ",".join(_QUERY), "--format=csv,noheader,nounits"]
    gpus, driver = read_gpus(_ask("nvidia-smi", *query))
    cuda = read_cuda_version(_ask("nvidia-smi")) if gpus else None
    if not gpus or cuda is None or any(gpu.compute_capability is None for gpu in gpus):
        try:
            seen, version = ask_driver(ctypes.CDLL("libcuda.so.1"))
        except (OSError, AttributeError):
            seen, version = (), None
        gpus, cuda = seen or gpus, cuda or version
    return gpus, driver, cuda


def _list_packages() -> list[str]:
    """Import names of all packages that a target asks for by version."""
    return sorted({name for target in list_targets() for name in load_target(target).packages})


def _find_version(name: str, debian: Mapping[str, str]) -> str | None:
    """Version of a package without importing it; None where there is none.

    JetPack's has a module and no metadata that Python knows.
    """
    spec = util.find_spec(name)
    if spec is None:
        return None
    version = _find_distribution(name, f"{name}-cu13", f"{name}-cu12")
    if version is not None:
        return version
    source = _read(Path(spec.origin)) if spec.origin else ""
    packaged = debian.get("python3-libnvinfer", "").partition("-")[0]
    return read_source_version(source) or packaged or _ask_version(name) or "unknown"


def _find_engine_cudas(names: Iterable[str]) -> dict[str, int]:
    """The major version of CUDA in the name of the wheel that brought each package."""
    return {
        name: major
        for name in names
        for major in (12, 13)
        if _find_distribution(f"{name}-cu{major}") is not None
    }


def _find_file(package: str, path: str) -> Path | None:
    """Where a file of a package would lie, without importing it; None without the package."""
    spec = util.find_spec(package)
    return Path(spec.origin).parent / path if spec and spec.origin else None


def _find_source(package: str, path: str) -> str:
    """The text of a file of a package, without importing it; empty where there is none."""
    found = _find_file(package, path)
    return "" if found is None else _read(found)


def _find_distribution(*names: str) -> str | None:
    """Version of the first of these distributions that is installed."""
    found = (each for name in names for each in metadata.distributions(name=name))
    return next((each.version for each in found), None)


def _ask_version(name: str) -> str:
    """A module's own version, from another process: a broken one must not end this one."""
    return _ask(sys.executable, "-c", f"import {name}; print({name}.__version__)").strip()


def _find_onnxruntimes() -> dict[str, str]:
    return {
        name: found.version
        for name in _ONNXRUNTIMES
        for found in metadata.distributions(name=name)
    }


def _ask_providers() -> tuple[tuple[str, ...], str | None]:
    """Providers of the installed onnxruntime, or why it cannot be imported."""
    silence_telemetry()
    code = "import onnxruntime; print(*onnxruntime.get_available_providers())"
    try:
        done = subprocess.run(  # noqa: S603 - this Python itself
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=False,
            timeout=_PATIENCE,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return (), type(error).__name__
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return (), lines[-1][:200] if lines else f"exit code {done.returncode}"
    return tuple(done.stdout.split()), None


def _ask(program: str, *arguments: str) -> str:
    """What a program says; nothing where it is missing, fails or does not answer."""
    path = shutil.which(program)
    if path is None:
        return ""
    try:
        done = subprocess.run(  # noqa: S603 - found on the path, arguments are ours
            [path, *arguments], capture_output=True, text=True, check=False, timeout=_PATIENCE
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _known(value: str) -> str | None:
    """A value of nvidia-smi, which writes `[N/A]` and `[Not Supported]` for what it lacks."""
    return None if not value or value.startswith("[") or value == "N/A" else value


def _number(value: str) -> int | None:
    return int(value) if value.isdigit() else None
