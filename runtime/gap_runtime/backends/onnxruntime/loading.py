"""Opening a graph in onnxruntime: which installation, which provider, with which options."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, Final

from gap_runtime.backends._cuda import Device
from gap_runtime.backends._interface import GraphTensor, require_interface
from gap_runtime.backends.onnxruntime.cudart import find_cudart
from gap_runtime.backends.onnxruntime.providers import (
    CUDA,
    Provider,
    choose_options,
    describe_lack,
    describe_strangers,
    find_provider,
)
from gap_runtime.bundle.bundle import Bundle
from gap_runtime.bundle.manifest import Stage
from gap_runtime.bundle.onnx_file import require_no_loop
from gap_runtime.errors import BackendMissingError, EngineError
from gap_runtime.machines.environment import read_threads, wants_fastmath
from gap_runtime.machines.fat_binary import ONNXRUNTIME_CUDA, list_kernels
from gap_runtime.machines.telemetry import silence_telemetry

_ERRORS: Final = (
    "EPFail",
    "EngineError",
    "Fail",
    "InvalidArgument",
    "InvalidGraph",
    "InvalidProtobuf",
    "NoModel",
    "NoSuchFile",
    "ModelLoaded",
    "ModelRequiresCompilation",
    "NotImplemented",
    "RuntimeException",
)
_OPSET_24: Final = (1, 24)
_INT8_CACHE: Final = (1, 27)
"""Before it, attention on the CPU takes such a cache and fails at the first run."""
_LOG: Final = logging.getLogger(__name__)


def import_onnxruntime() -> ModuleType:
    """Onnxruntime.

    Raises:
        BackendMissingError: It is not installed.
    """
    silence_telemetry()
    try:
        return import_module("onnxruntime")
    except ImportError as error:
        raise BackendMissingError(
            "onnxruntime is not installed; pip install 'gap-runtime[cpu]', or "
            "'gap-runtime[gpu]' for CUDA, never both"
        ) from error


def _installed_packages() -> str:
    """Which of the packages that share the import name `onnxruntime` are installed."""
    from importlib import metadata  # noqa: PLC0415 - mail and archives, for an error's words

    names = ("onnxruntime", "onnxruntime-gpu")
    found = [d for name in names for d in metadata.distributions(name=name)]
    described = (f"{each.name} {each.version}" for each in found)
    return " and ".join(described) or "onnxruntime of unknown origin"


def open_session(
    ort: ModuleType,
    bundle: Bundle,
    stage: Stage,
    device: str,
    *,
    settings: Mapping[str, str] = MappingProxyType({}),
) -> Any:
    """A session on the wanted provider, and a line on stderr where it is not all of it there.

    Args:
        ort: onnxruntime.
        bundle: The opened bundle.
        stage: What is to be run.
        device: A key of PROVIDERS, which insists; nothing for CUDA where it is, else the CPU.
        settings: Of the provider, besides those that it always gets.

    Raises:
        BundleError: The graph has a loop.
        EngineError: The installed onnxruntime cannot load the graph, or not on that provider.
    """
    path = bundle.folder / stage.file
    require_no_loop(path)
    version = _version(ort)
    wanted = device or ("cuda" if CUDA in ort.get_available_providers() else "cpu")
    if wanted == "cuda" and not _is_served(ort, path, insists=bool(device)):
        wanted = "cpu"
    provider = find_provider(wanted)
    is_plugin = needs_plugin(ort, provider)
    _require_version(bundle, version, path)
    options = _make_options(ort, bundle, wanted)
    devices = _start_plugin(ort, provider, where=str(path)) if is_plugin else []
    name = str(devices[0].ep_name) if devices else provider.name
    settings = choose_options(wanted, bundle, stage, version) | dict(settings)
    try:
        if devices:
            options.add_provider_for_devices(devices[:1], settings)
        else:
            preload(ort, wanted)
        # Its own way back is to print some lines and to take what it likes.
        session = ort.InferenceSession(
            str(path),
            options,
            providers=None if devices else _provider_list(provider, settings),
            enable_fallback=0,
        )
    except list_errors(ort) as error:
        raise EngineError(
            f"{path}: {_installed_packages()} cannot load it: {first_words(error)}"
        ) from error
    found = (session.get_inputs(), session.get_outputs())
    require_interface(path, stage, *(map(_read_tensor, side) for side in found))
    if name not in session.get_providers():
        failure = (
            f"{path}: {_installed_packages()} could not start {provider.name} "
            f"({_describe_needs(ort, wanted)}; gap-runtime doctor says what is here)"
        )
        if device:
            raise EngineError(f"{failure}; without :{device} it runs on the CPU")
        _LOG.warning("%s; it runs on the CPU", failure)
    elif wanted != "cpu":
        _judge_nodes(ort, _list_nodes(session), name, str(path))
    return session


def _describe_needs(ort: ModuleType, wanted: str) -> str:
    """What a provider of NVIDIA's needs of the machine, for people who have another CUDA."""
    made_for = f"CUDA {getattr(ort, 'cuda_version', '')}".rstrip()
    needs = f"it is made for {made_for}, which the driver has to run and whose libraries it needs"
    libraries = {
        "cuda": "pip install 'onnxruntime-gpu[cuda,cudnn]'",
        "tensorrt": "pip install 'onnxruntime-gpu[cuda,cudnn]' 'tensorrt-cu13>=10.16,<11'",
    }
    return f"{needs}: {libraries[wanted]}" if wanted in libraries else needs


def _require_version(bundle: Bundle, version: tuple[int, ...], path: Path) -> None:
    """Refuse a bundle that the installed onnxruntime, or any, does not run."""
    opset = bundle.manifest.target.opset
    if opset >= 24 and version < _OPSET_24:
        raise EngineError(
            f"{path}: opset {opset} needs onnxruntime 1.24 or newer (on Python "
            f"3.11 or newer), found {_installed_packages()}"
        )
    if bundle.manifest.has_int8_cache and version < _INT8_CACHE:
        raise EngineError(
            f"{path}: its KV cache of int8 needs onnxruntime 1.27 or newer, found "
            f"{_installed_packages()}; or export without --kv-cache"
        )
    if bundle.manifest.dtype == "bfloat16":
        raise EngineError(
            f"{path}: onnxruntime has no bfloat16 kernels on CPU, and none were tried on CUDA; "
            "export float32 or float16"
        )


def _is_served(ort: ModuleType, path: Path, *, insists: bool) -> bool:
    """Whether the CUDA provider has kernels for this GPU, as far as is known.

    Raises:
        EngineError: It has not, and nothing else is wanted.
    """
    lack = _miss_kernels(ort)
    failure = f"{path}: {_installed_packages()} {lack}"
    if lack and insists:
        raise EngineError(f"{failure}; without :cuda it runs on the CPU")
    if lack:
        _LOG.warning("%s; it runs on the CPU", failure)
    return not lack


def _miss_kernels(ort: ModuleType) -> str:
    """What the CUDA provider lacks for this GPU; empty where it has kernels, or none can say.

    It would start, and fail at the first one.
    """
    where = getattr(ort, "__file__", None)
    kernels = list_kernels(Path(where).parent / ONNXRUNTIME_CUDA) if where else ()
    if not kernels:
        return ""
    preload(ort, "cuda")
    cuda = find_cudart(ort)
    try:
        return "" if cuda is None else describe_lack(kernels, [Device(cuda).compute_capability])
    except EngineError:
        # There is no GPU, or CUDA does not start: what the session says of that is more.
        return ""


def _make_options(ort: ModuleType, bundle: Bundle, wanted: str) -> Any:
    """Options of a session that do not depend on its graph."""
    options = ort.SessionOptions()
    # What it would log of an error it raises as well, which is one line of ours.
    options.log_severity_level = 4
    options.intra_op_num_threads = read_threads() or 0
    entries = {
        # Threads of one session that wait busily take the cores from the next one's.
        "session.intra_op.allow_spinning": "0",
        # A residual that is added to a product would keep it from its quantized weight's kernel.
        "optimization.disable_specified_optimizers": "MatMulAddFusion",
    }
    if wanted == "cpu" and wants_fastmath():
        entries["mlas.enable_gemm_fastmath_arm64_bfloat16"] = "1"
    if wanted != "cpu" and _version(ort) >= _OPSET_24:
        entries["session.record_ep_graph_assignment_info"] = "1"
    quantized = bundle.manifest.quantization
    if bundle.manifest.target.provider == wanted and quantized and quantized.weights == "int4":
        # Weights in 4 bits are laid out for CUDA's fastest kernels while they are loaded. Those
        # for 8 bits fail where a weight's inputs are no multiple of 64, which is not known here.
        entries["ep.cuda.fpa_intb_gemm"] = "1"
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    return options


def _version(ort: ModuleType) -> tuple[int, ...]:
    return tuple(int(part) for part in ort.__version__.split(".")[:2])


def _read_tensor(found: Any) -> GraphTensor:
    """An input or output of a session."""
    kind = str(found.type).removeprefix("tensor(").removesuffix(")")
    return GraphTensor(
        name=found.name,
        dtype={"float": "float32"}.get(kind, kind),
        shape=tuple(size if isinstance(size, int) else None for size in found.shape),
    )


def needs_plugin(ort: ModuleType, provider: Provider) -> bool:
    """Whether a provider has to be brought by its own package.

    Raises:
        BackendMissingError: The installed onnxruntime has it not, and its package is not there.
    """
    if provider.name in ort.get_available_providers():
        return False
    if provider.plugin and hasattr(ort, "register_execution_provider_library"):
        with contextlib.suppress(ImportError):
            import_module(provider.plugin)
            return True
    found = _installed_packages()
    if " and " in found:
        raise BackendMissingError(
            f"{found} are both installed and overwrite each other, {provider.name} is lost; "
            f"pip uninstall onnxruntime onnxruntime-gpu, then install the one that has it: "
            f"{provider.source}"
        )
    raise BackendMissingError(f"{found} has no {provider.name}; {provider.source}")


def _provider_list(
    provider: Provider, options: dict[str, str]
) -> list[tuple[str, dict[str, str]]]:
    """The provider, and CUDA behind TensorRT for what that cannot run."""
    if "Tensorrt" in provider.name:
        return [(provider.name, options), (CUDA, {"use_tf32": "0"})]
    return [(provider.name, options)]


def preload(ort: ModuleType, device: str) -> None:
    """Load CUDA from NVIDIA's Python packages where it is installed so."""
    if device in {"cuda", "tensorrt"} and hasattr(ort, "preload_dlls"):
        # What it misses it prints; the session that cannot start then says it again. Only its own
        # `print` is taken meanwhile, as sys.stdout is that of all threads.
        vars(ort)["print"] = _print_nothing
        try:
            ort.preload_dlls()
        finally:
            vars(ort).pop("print", None)


def _print_nothing(*_: object) -> None:
    """Stands where a library would print."""


def _start_plugin(ort: ModuleType, provider: Provider, *, where: str) -> list[Any]:
    """Register a provider that is a package of its own; the devices that it can use.

    Raises:
        EngineError: It does not start, or finds no GPU that it can use.
    """
    plugin = import_module(provider.plugin)
    name = str(plugin.get_ep_name())

    def find() -> list[Any]:
        return [each for each in ort.get_ep_devices() if each.ep_name == name]

    try:
        if not find():
            # A second registration of one name would be an error.
            ort.register_execution_provider_library(name, plugin.get_library_path())
        devices = find()
    except list_errors(ort) as error:
        raise EngineError(
            f"{where}: {provider.name} does not start ({first_words(error)}); it needs NVIDIA's "
            "driver and an RTX card, gap-runtime doctor says what is here"
        ) from error
    if not devices:
        raise EngineError(
            f"{where}: {provider.name} finds no GPU that it can use (an RTX card with a current "
            "driver); gap-runtime doctor says what is here"
        )
    return devices


def _list_nodes(session: Any) -> list[tuple[str, str]]:
    """Provider and operator of every node, which onnxruntime keeps to itself; [] before 1.24."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return []
    return [
        (str(part.ep_name), str(node.op_type))
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]


def _judge_nodes(ort: ModuleType, nodes: list[tuple[str, str]], name: str, where: str) -> None:
    """Say what does not run on the wanted provider, and refuse what could not run on it."""
    found = describe_strangers(nodes, name)
    if found:
        _LOG.warning("%s: %s", where, found)
    if (CUDA, "Conv") in nodes:
        _require_cudnn(ort, where)


def _require_cudnn(ort: ModuleType, where: str) -> None:
    """Refuse a graph with a convolution on CUDA where cuDNN is missing.

    onnxruntime starts without it since 1.28, and would fail at the first picture.

    Raises:
        EngineError: It is not found.
    """
    name = "cudnn64_9.dll" if sys.platform == "win32" else "libcudnn.so.9"
    try:
        ctypes.CDLL(name)
    except OSError as error:
        major = str(getattr(ort, "cuda_version", "")).partition(".")[0] or "13"
        raise EngineError(
            f"{where}: its convolution needs cuDNN on CUDA, and {name} is not found; "
            f"pip install nvidia-cudnn-cu{major}"
        ) from error


def first_words(error: Exception) -> str:
    """What an error of onnxruntime says, without where in its source that is said."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    for mark in ("with error: ", "failed:"):
        if mark in text:
            return text.rpartition(mark)[2][:200]
    if text.startswith("/onnxruntime_src"):
        text = text.partition(") ")[2] or text
    return text[:200].rstrip(". ")


def list_errors(ort: ModuleType) -> tuple[type[Exception], ...]:
    """All error classes of onnxruntime, which share no base of their own."""
    state = ort.capi.onnxruntime_pybind11_state
    own = (getattr(state, name) for name in _ERRORS if hasattr(state, name))
    # Its messages quote names of a damaged graph, which may be no text.
    return (RuntimeError, UnicodeDecodeError, *own)
