"""onnxruntime: CPU anywhere, and NVIDIA's providers where an onnxruntime that has them is.

`onnxruntime` takes CUDA when it is there; `onnxruntime:cpu`, `:cuda`, `:tensorrt` and
`:nvtensorrtrtx` insist. On a GPU the weights and the KV cache stay on the device, and only
embeddings, positions and logits cross.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from dataclasses import dataclass
from importlib import import_module, metadata
from types import ModuleType
from typing import Any, Final

import numpy as np

from gap_runtime.backends._kv_cache import KvCache, SlotCopy, cache_specs
from gap_runtime.backends.onnxruntime.providers import (
    CPU,
    CUDA,
    Provider,
    choose_options,
    describe_strangers,
    find_provider,
    writes_in_place,
)
from gap_runtime.bundle.bundle import Bundle
from gap_runtime.bundle.manifest import Stage
from gap_runtime.bundle.tensors import MOST_LOGITS
from gap_runtime.errors import BackendMissingError, EngineError
from gap_runtime.machines.threads import read_threads

_ERRORS: Final = (
    "EPFail",
    "Fail",
    "InvalidArgument",
    "InvalidGraph",
    "InvalidProtobuf",
    "NoModel",
    "NoSuchFile",
    "NotImplemented",
    "RuntimeException",
)
_OPSET_24: Final = (1, 24)
_CPU_NAMES: Final = ("Cpu", "CpuPinned")
_NVIDIA: Final = 0x10DE
"""NVIDIA's PCI vendor ID, by which providers that are plug-ins find their memory."""
_LOG: Final = logging.getLogger(__name__)


class OnnxStage:
    """A vision or text graph in an onnxruntime session."""

    def __init__(self, bundle: Bundle, stage: Stage, device: str) -> None:
        """Load the graph."""
        self._ort = _import_onnxruntime()
        self._session = _open_session(self._ort, bundle, stage, device)
        self._role = stage.role
        self._names = [spec.name for spec in stage.outputs]

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name for the stage's inputs by name."""
        try:
            values = self._session.run(self._names, inputs)
        except _run_errors(self._ort) as error:
            raise EngineError(
                f"onnxruntime could not run the {self._role} graph: {error}"
            ) from error
        return dict(zip(self._names, values, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """Buffers for one number of rows and of logits, bound once and written in place at every run.

    `bindings` take turns: one where the cache is read and written in one place, else two. `moved`
    are inputs that lie on a device and `rebound` those that onnxruntime has to place itself, each
    with the array on the host that it is copied from.
    """

    bindings: list[Any]
    arrays: dict[str, np.ndarray]
    moved: list[tuple[Any, np.ndarray]]
    rebound: list[tuple[str, np.ndarray]]
    logits: np.ndarray


class OnnxDecoder:
    """A decoder graph in an onnxruntime session, its cache bound as input and as output."""

    def __init__(self, bundle: Bundle, stage: Stage, device: str) -> None:
        """Load the graph and make an empty cache on its device."""
        self._ort = _import_onnxruntime()
        self._errors = _run_errors(self._ort)
        self._session = _open_session(self._ort, bundle, stage, device)
        self._on_gpu = self._session.get_providers()[0] != CPU
        self._is_plugin = bool(device) and _needs_plugin(self._ort, find_provider(device))
        self._on_host = self._find_host_inputs()
        self._host_memory: dict[int, np.ndarray] = {}
        in_place = writes_in_place(device, bundle.manifest.target.opset)
        self._cache = self._make_cache(stage, in_place=in_place)
        specs = {spec.name: spec for spec in (*stage.inputs, *stage.outputs)}
        self._width = int(specs["embeddings"].shape[-1])
        self._axes = int(specs["position_ids"].shape[0])
        self._vocabulary = int(specs["logits"].shape[-1])
        self._calls: dict[tuple[int, int], _Call] = {}

    def fit(self, rows: int) -> int:
        """Any number of rows will do."""
        return rows

    def run(
        self,
        embeddings: np.ndarray,
        position_ids: np.ndarray,
        write_slot: int,
        logits_rows: np.ndarray,
    ) -> np.ndarray:
        """Logits float32 [R, V] of some rows; see gap_runtime.backends.DecoderSession."""
        sizes = embeddings.shape[1], len(logits_rows)
        call = self._calls.get(sizes)
        try:
            if call is None:
                call = self._bind(*sizes)
                # Prompts have many lengths: the buffers of the last one are kept, no more.
                self._calls = {key: c for key, c in self._calls.items() if key[0] <= MOST_LOGITS}
                self._calls[sizes] = call
            call.arrays["embeddings"][:] = embeddings
            call.arrays["position_ids"][:] = position_ids
            call.arrays["write_slot"][0] = write_slot
            call.arrays["logits_rows"][:] = logits_rows
            binding = call.bindings[self._cache.side]
            for value, array in call.moved:
                value.update_inplace(array)
            for name, array in call.rebound:
                binding.bind_cpu_input(name, array)
            self._session.run_with_iobinding(binding)
        except self._errors as error:
            raise EngineError(f"onnxruntime could not run the decoder: {error}") from error
        self._cache.turn()
        return call.logits

    def copy_slots(self, count: int) -> SlotCopy[np.ndarray]:
        """A copy of the first slots on the host; see gap_runtime.backends.SlotSaver."""
        tensors = {
            name: self._look_into(value)[:, :, :count].copy()
            for name, value in self._cache.inputs(self._cache.side).items()
        }
        size = sum(array.nbytes for array in tensors.values())
        return SlotCopy(count=count, tensors=tensors, size=size)

    def put_slots(self, saved: SlotCopy[np.ndarray]) -> None:
        """Write slots back; see gap_runtime.backends.SlotSaver."""
        for name, value in self._cache.inputs(self._cache.side).items():
            array = self._look_into(value)
            array[:, :, : saved.count] = saved.tensors[name]
            if value.data_ptr() not in self._host_memory:
                value.update_inplace(array)

    def _look_into(self, value: Any) -> np.ndarray:
        """A tensor of the cache: its own memory on the host, a copy of it elsewhere."""
        memory = self._host_memory.get(value.data_ptr())
        copied: np.ndarray = value.numpy() if memory is None else memory
        return copied

    def _bind(self, rows: int, wanted: int) -> _Call:
        """Buffers for numbers of rows and logits, and a binding for each turn of the caches."""
        arrays: dict[str, np.ndarray] = {
            "embeddings": np.zeros((1, rows, self._width), np.float32),
            "position_ids": np.zeros((self._axes, rows), np.int64),
            "write_slot": np.zeros(1, np.int64),
            "logits_rows": np.zeros(wanted, np.int64),
        }
        logits = np.zeros((wanted, self._vocabulary), np.float32)
        hosted = {
            name: self._ort.OrtValue.ortvalue_from_numpy(array)
            for name, array in arrays.items()
            if self._is_on_host(name)
        }
        placed = {
            name: self._place(array)
            for name, array in arrays.items()
            if self._on_host is not None and not self._is_on_host(name)
        }
        bindings = []
        for side in range(self._cache.sides):
            binding = self._session.io_binding()
            for name, value in (hosted | placed).items():
                binding.bind_ortvalue_input(name, value)
            binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
            # Where these are the same memory, TensorScatter writes one row, copying nothing.
            for name, value in self._cache.inputs(side).items():
                binding.bind_ortvalue_input(name, value)
            for name, value in self._cache.outputs(side).items():
                binding.bind_ortvalue_output(name, value)
            bindings.append(binding)
        return _Call(
            bindings=bindings,
            arrays=arrays,
            moved=[(value, arrays[name]) for name, value in placed.items()],
            rebound=[] if self._on_host is not None else list(arrays.items()),
            logits=logits,
        )

    def _make_cache(self, stage: Stage, *, in_place: bool) -> KvCache[Any]:
        """An empty cache, each tensor of it where the graph reads it.

        A kernel that its provider lacks runs on the CPU, and reads and writes its cache there.

        Raises:
            EngineError: It does not fit there.
        """
        try:
            return KvCache(
                stage,
                lambda spec: self._place_cache(
                    spec.name, np.zeros(spec.fixed_shape(), spec.dtype)
                ),
                in_place=in_place,
            )
        except self._errors as error:
            specs = cache_specs(stage)
            raise EngineError(
                f"no room for the KV cache of {len(specs)} tensors of shape "
                f"{list(specs[0].shape)} where the decoder runs: {_first_words(error)}"
            ) from error

    def _place_cache(self, name: str, array: np.ndarray) -> Any:
        """A tensor of the cache where the graph reads it; on the host the array is its memory."""
        on_host = not self._on_gpu or self._is_on_host(name)
        value = self._place(array, on_host=on_host)
        if on_host:
            self._host_memory[value.data_ptr()] = array
        return value

    def _place(self, array: np.ndarray, *, on_host: bool = False) -> Any:
        """A copy of an array where the graph runs, or the array itself on the host."""
        make = self._ort.OrtValue.ortvalue_from_numpy
        if on_host or not self._on_gpu:
            return make(array)
        return make(array, "gpu", 0, _NVIDIA) if self._is_plugin else make(array, "cuda", 0)

    def _is_on_host(self, name: str) -> bool:
        """Whether the graph is known to read an input on the host."""
        return self._on_host is not None and name in self._on_host

    def _find_host_inputs(self) -> frozenset[str] | None:
        """Inputs that the graph reads on the host; None where onnxruntime does not tell.

        An input on the wrong side would be copied when it is bound, and never again.
        """
        names = [each.name for each in self._session.get_inputs()]
        if not self._on_gpu:
            return frozenset(names)
        if not hasattr(self._session, "get_input_memory_infos"):
            return None
        places = self._session.get_input_memory_infos()
        return frozenset(
            name
            for name, place in zip(names, places, strict=True)
            if place is not None and place.name in _CPU_NAMES
        )


def open_stage(bundle: Bundle, stage: Stage, device: str) -> OnnxStage:
    """Load a vision or text graph."""
    return OnnxStage(bundle, stage, device)


def open_decoder(bundle: Bundle, stage: Stage, device: str) -> OnnxDecoder:
    """Load the decoder graph and make an empty cache."""
    return OnnxDecoder(bundle, stage, device)


def _import_onnxruntime() -> ModuleType:
    try:
        return import_module("onnxruntime")
    except ImportError as error:
        raise BackendMissingError(
            "onnxruntime is not installed; pip install 'gap-runtime[cpu]', or "
            "'gap-runtime[gpu]' for CUDA, never both"
        ) from error


def _installed_packages() -> str:
    """Which of the packages that share the import name `onnxruntime` are installed."""
    names = ("onnxruntime", "onnxruntime-gpu")
    found = [d for name in names for d in metadata.distributions(name=name)]
    described = (f"{each.name} {each.version}" for each in found)
    return " and ".join(described) or "onnxruntime of unknown origin"


def _open_session(ort: ModuleType, bundle: Bundle, stage: Stage, device: str) -> Any:
    """A session on the wanted provider, and a line on stderr where it is not all of it there.

    Raises:
        EngineError: The installed onnxruntime cannot load the graph, or not on that provider.
    """
    path = bundle.folder / stage.file
    version = tuple(int(part) for part in ort.__version__.split(".")[:2])
    wanted = device or ("cuda" if CUDA in ort.get_available_providers() else "cpu")
    provider = find_provider(wanted)
    is_plugin = _needs_plugin(ort, provider)
    opset = bundle.manifest.target.opset
    if opset >= 24 and version < _OPSET_24:
        raise EngineError(
            f"{path}: opset {opset} needs onnxruntime 1.24 or newer (on Python "
            f"3.11 or newer), found {_installed_packages()}"
        )
    if bundle.manifest.dtype == "bfloat16":
        raise EngineError(
            f"{path}: onnxruntime has no bfloat16 kernels on CPU, and none were tried on CUDA; "
            "export float32 or float16"
        )
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = read_threads() or 0
    # Threads of one session that wait busily take the cores from the next one's.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # A residual that is added to a product would keep it from its quantized weight's kernel.
    options.add_session_config_entry(
        "optimization.disable_specified_optimizers", "MatMulAddFusion"
    )
    if wanted != "cpu" and version >= _OPSET_24:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    devices = _start_plugin(ort, provider, where=str(path)) if is_plugin else []
    name = str(devices[0].ep_name) if devices else provider.name
    settings = choose_options(wanted, bundle, stage, version)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            if devices:
                options.add_provider_for_devices(devices[:1], settings)
                session = ort.InferenceSession(str(path), options)
            else:
                _preload(ort, wanted)
                # Its own way back is to print some lines and to take what it likes.
                session = ort.InferenceSession(
                    str(path),
                    options,
                    providers=_provider_list(provider, settings),
                    enable_fallback=0,
                )
    except _run_errors(ort) as error:
        raise EngineError(
            f"{path}: {_installed_packages()} cannot load it: {_first_words(error)}"
        ) from error
    if name not in session.get_providers():
        failure = (
            f"{path}: {_installed_packages()} could not start {provider.name} (driver, CUDA "
            "and cuDNN must fit it)"
        )
        if device:
            raise EngineError(f"{failure}; without :{device} it runs on the CPU")
        _LOG.warning("%s; it runs on the CPU", failure)
    elif wanted != "cpu":
        _report_strangers(session, name, str(path))
    return session


def _needs_plugin(ort: ModuleType, provider: Provider) -> bool:
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


def _preload(ort: ModuleType, device: str) -> None:
    """Load CUDA from NVIDIA's Python packages where it is installed so."""
    if device in {"cuda", "tensorrt"} and hasattr(ort, "preload_dlls"):
        # What it misses it prints; the session that cannot start then says it again.
        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()


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
    except _run_errors(ort) as error:
        raise EngineError(
            f"{where}: {provider.name} does not start ({_first_words(error)}); it needs NVIDIA's "
            "driver and an RTX card, gap-runtime doctor says what is here"
        ) from error
    if not devices:
        raise EngineError(
            f"{where}: {provider.name} finds no GPU that it can use (an RTX card with a current "
            "driver); gap-runtime doctor says what is here"
        )
    return devices


def _report_strangers(session: Any, name: str, where: str) -> None:
    """Say which operators run elsewhere, which onnxruntime itself keeps to itself."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return
    nodes = [
        (str(part.ep_name), str(node.op_type))
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]
    found = describe_strangers(nodes, name)
    if found:
        _LOG.warning("%s: %s", where, found)


def _first_words(error: Exception) -> str:
    """What an error of onnxruntime says, without where in its source that is said."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    for mark in ("with error: ", "failed:"):
        if mark in text:
            return text.rpartition(mark)[2][:200]
    if text.startswith("/onnxruntime_src"):
        text = text.partition(") ")[2] or text
    return text[:200].rstrip(". ")


def _run_errors(ort: ModuleType) -> tuple[type[Exception], ...]:
    """All error classes of onnxruntime, which share no base of their own."""
    state = ort.capi.onnxruntime_pybind11_state
    own = (getattr(state, name) for name in _ERRORS if hasattr(state, name))
    return (RuntimeError, *own)
