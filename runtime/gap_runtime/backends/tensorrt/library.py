"""TensorRT's two packages, which share one API: finding one, its types, its messages, engines."""

from __future__ import annotations

import mmap
import platform
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, Final

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from gap_runtime.bundle.engines import EngineRecord
from gap_runtime.errors import BackendMissingError, ConfigError, EngineError
from gap_runtime.machines.target import Target

PLAIN: Final = "tensorrt"
RTX: Final = "tensorrt_rtx"
"""TensorRT-RTX builds for GPUs that are not there, and compiles the rest where it runs."""

_INSTALL: Final = {
    PLAIN: "pip install 'gap-runtime[tensorrt]'; on Jetson it comes with JetPack",
    RTX: "pip install 'gap-runtime[rtx]'",
}
_DTYPES: Final = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "BOOL": "bool",
}


def choose_package(target: Target, wanted: str | None) -> ModuleType:
    """The package that builds for a target: the one that is wanted, or the first that fits.

    Raises:
        ConfigError: The target has no such package.
        BackendMissingError: None is installed.
        EngineError: Those that are installed have another version, or do not load.
    """
    if wanted is not None and wanted not in target.packages:
        raise ConfigError(
            f"tensorrt.package: target '{target.name}' has no package '{wanted}'; have "
            f"{', '.join(target.packages) or 'none'}"
        )
    names = target.packages if wanted is None else {wanted: target.packages[wanted]}
    unfit, broken = [], []
    for name, versions in names.items():
        try:
            package = _try_import(name)
        except EngineError as error:
            broken.append(error)
            continue
        if package is None:
            continue
        if SpecifierSet(versions).contains(Version(package.__version__), prereleases=True):
            return package
        unfit.append(f"{name} {package.__version__}")
    described = " or ".join(f"{name}{versions}" for name, versions in names.items())
    if broken and not unfit:
        raise broken[0]
    if unfit:
        raise EngineError(
            f"target '{target.name}' needs {described}, found {' and '.join(unfit)}; install "
            "that, or choose a target for this version (gap-runtime build --help)"
        )
    advice = "; or ".join(_INSTALL.get(name, f"pip install {name}") for name in names)
    raise BackendMissingError(
        f"target '{target.name}' needs {described or 'a TensorRT'}, none is installed; {advice}"
    )


def import_package(name: str) -> ModuleType:
    """The package of that name.

    Raises:
        BackendMissingError: It is not installed.
        EngineError: It is, and does not load.
    """
    package = _try_import(name)
    if package is None:
        raise BackendMissingError(
            f"{name} is not installed, with which the engine was built; "
            f"{_INSTALL.get(name, f'pip install {name}')}"
        )
    return package


def _try_import(name: str) -> ModuleType | None:
    """The package; None where it is not installed.

    Raises:
        EngineError: It is installed, and its own libraries are missing or do not load.
    """
    if name not in _INSTALL:
        return None
    try:
        return import_module(name)
    except (ImportError, OSError) as error:
        # What its libraries lack is an ImportError on Linux and an OSError on Windows.
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            return None
        raise EngineError(
            f"{name} is installed and does not load ({' '.join(str(error).split())[:200]}); its "
            f"libraries are missing or of another version: {_INSTALL[name]}"
        ) from error


def package_name(trt: ModuleType) -> str:
    """The import name of the package."""
    return trt.__name__


def dtype_name(dtype: Any) -> str:
    """Our name of a TensorRT dtype, or TensorRT's where it has none."""
    name = str(dtype).rpartition(".")[2].partition(":")[0]
    return _DTYPES.get(name, name.lower())


@lru_cache
def make_log(trt: ModuleType) -> Any:
    """The logger of a package, which keeps warnings and errors in lists and shows nothing.

    There is one: the library takes no other beside one that is alive, and says so to the first.
    """

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.WARNING:
                self.warnings.append(message)

    return Log()


def make_builder(trt: ModuleType, log: Any) -> Any:
    """A builder.

    Raises:
        EngineError: The library does not start, for example with a driver that is too old for it.
    """
    return _start(trt, log, trt.Builder)


def write_engine(trt: ModuleType, builder: Any, network: Any, config: Any, file: BinaryIO) -> bool:
    """Build a network and write its engine; whether it could be built.

    It is written piece by piece where the library does that, which 10.3 does not: memory then
    holds the engine once, not twice.

    Raises:
        OSError: The file takes no more.
    """
    if not hasattr(builder, "build_serialized_network_to_stream"):
        engine = builder.build_serialized_network(network, config)
        if engine is not None:
            file.write(engine)
        return engine is not None

    class Writer(trt.IStreamWriter):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                return file.write(data)
            except OSError as error:
                # The library takes a count for an answer, no exception.
                self.error = error
                return 0

    writer = Writer()
    is_built = bool(builder.build_serialized_network_to_stream(network, config, writer))
    if writer.error is not None:
        raise writer.error
    return is_built


def _start(trt: ModuleType, log: Any, make: Callable[[Any], Any]) -> Any:
    try:
        return make(log)
    except TypeError as error:
        # What the binding makes of a null from the library.
        raise EngineError(
            f"{package_name(trt)} {trt.__version__} does not start: {last_error(log)}; "
            "gap-runtime doctor says whether the driver is new enough for it"
        ) from error


def last_error(log: Any, source: str = "") -> str:
    """What the library said last, in one line; what `source` said, where that said anything."""
    if not log.errors:
        return "it gave no reason"
    found = [message for message in log.errors if message.startswith(source)] or log.errors
    return " ".join(found[-1].split())[:400]


def find_mismatch(record: EngineRecord, trt: ModuleType, capabilities: tuple[str, ...]) -> str:
    """Why an engine does not run here; empty where it does.

    Args:
        record: Of the engine.
        trt: The package that would run it.
        capabilities: Compute capabilities that it has to run on.
    """
    built, found = (record.package, record.version), (package_name(trt), trt.__version__)
    if built != found:
        return f"it was built with {' '.join(built)}, found {' '.join(found)}"
    if record.platform != describe_platform():
        return f"it was built on {record.platform}, this is {describe_platform()}"
    if not set(capabilities) <= set(record.compute_capabilities):
        has = ", ".join(record.compute_capabilities)
        return (
            f"it was built for GPUs of compute capability {has}, found {', '.join(capabilities)}"
        )
    return ""


def describe_platform() -> str:
    """System and processor, for example `Linux-aarch64`."""
    return f"{platform.system()}-{platform.machine()}"


def load_engine(trt: ModuleType, log: Any, path: Path) -> Any:
    """An engine from its file, which is mapped and not read into memory first.

    Raises:
        EngineError: The library does not take it.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        engine = _start(trt, log, trt.Runtime).deserialize_cuda_engine(mapped)
    if engine is None:
        raise EngineError(
            f"{path}: {package_name(trt)} {trt.__version__} cannot load it: {last_error(log)}"
        )
    return engine


def scratch_bytes(engine: Any) -> int:
    """Memory that any of an engine's profiles needs while it runs, beside weights and tensors."""
    # The first name is there since 10.1, the second is what it was before.
    size = getattr(engine, "device_memory_size_v2", None)
    return int(engine.device_memory_size if size is None else size)
