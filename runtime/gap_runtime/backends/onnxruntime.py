"""onnxruntime: CPU anywhere, CUDA where onnxruntime-gpu is installed.

`onnxruntime` takes CUDA when it is there; `onnxruntime:cpu` and `onnxruntime:cuda` insist.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from importlib import import_module, metadata
from types import ModuleType
from typing import Any, Final

import numpy as np

from gap_runtime.bundle import Bundle
from gap_runtime.errors import BackendMissingError, ConfigError, EngineError
from gap_runtime.manifest import Stage

_PROVIDERS: Final = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
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
_SMALL_INPUTS: Final = ("embeddings", "position_ids", "write_slot", "logits_row")
_OPSET_24: Final = (1, 24)


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
    """Buffers for one row count, written in place and bound anew at every run."""

    binding: Any
    embeddings: np.ndarray
    position_ids: np.ndarray
    write_slot: np.ndarray
    logits_row: np.ndarray
    logits: np.ndarray


class OnnxDecoder:
    """A decoder graph in an onnxruntime session, its cache bound as input and as output."""

    def __init__(self, bundle: Bundle, stage: Stage, device: str) -> None:
        """Load the graph and make an empty cache on its device."""
        self._ort = _import_onnxruntime()
        self._session = _open_session(self._ort, bundle, stage, device)
        on_cuda = "CUDAExecutionProvider" in self._session.get_providers()
        self._cache = {
            spec.name: _zeros(self._ort, spec.shape, spec.dtype, "cuda" if on_cuda else "cpu")
            for spec in stage.inputs
            if spec.name.startswith("cache_")
        }
        specs = {spec.name: spec for spec in (*stage.inputs, *stage.outputs)}
        self._width = int(specs["embeddings"].shape[-1])
        self._vocabulary = int(specs["logits"].shape[-1])
        self._calls: dict[int, _Call] = {}

    def run(
        self, embeddings: np.ndarray, position_ids: np.ndarray, write_slot: int, logits_row: int
    ) -> np.ndarray:
        """Logits float32 [V] of one row; see gap_runtime.session.DecoderSession."""
        rows = embeddings.shape[1]
        if rows not in self._calls:
            self._calls[rows] = self._bind(rows)
        call = self._calls[rows]
        call.embeddings[:] = embeddings
        call.position_ids[:] = position_ids
        call.write_slot[0] = write_slot
        call.logits_row[0] = logits_row
        # Binding is what copies to a device, so it has to happen after writing.
        for name in _SMALL_INPUTS:
            call.binding.bind_cpu_input(name, getattr(call, name))
        try:
            self._session.run_with_iobinding(call.binding)
        except _run_errors(self._ort) as error:
            raise EngineError(f"onnxruntime could not run the decoder: {error}") from error
        logits: np.ndarray = call.logits[0]
        return logits

    def _bind(self, rows: int) -> _Call:
        binding = self._session.io_binding()
        call = _Call(
            binding=binding,
            embeddings=np.zeros((1, rows, self._width), np.float32),
            position_ids=np.zeros((1, rows), np.int64),
            write_slot=np.zeros(1, np.int64),
            logits_row=np.zeros(1, np.int64),
            logits=np.zeros((1, self._vocabulary), np.float32),
        )
        logits = call.logits
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        for name, value in self._cache.items():
            # The same memory in and out: TensorScatter then writes one row, copying nothing.
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(f"next_{name}", value)
        return call


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
    providers = _choose_providers(ort, device)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    path = bundle.folder / stage.file
    version = tuple(int(part) for part in ort.__version__.split(".")[:2])
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
    try:
        with contextlib.redirect_stdout(sys.stderr):
            session = ort.InferenceSession(str(path), options, providers=providers)
    except _run_errors(ort) as error:
        reason = str(error).splitlines()[0].rpartition("failed:")[2][:200]
        raise EngineError(f"{path}: {_installed_packages()} cannot load it: {reason}") from error
    if device and _PROVIDERS[device] not in session.get_providers():
        raise EngineError(
            f"{path}: {_installed_packages()} could not start {_PROVIDERS[device]} (driver, CUDA "
            "and cuDNN must fit it); without :cuda it runs on the CPU"
        )
    return session


def _choose_providers(ort: ModuleType, device: str) -> list[str]:
    available = ort.get_available_providers()
    if not device:
        return [name for name in reversed(_PROVIDERS.values()) if name in available]
    if device not in _PROVIDERS:
        raise ConfigError(f"unknown onnxruntime device '{device}'; have {', '.join(_PROVIDERS)}")
    if _PROVIDERS[device] not in available:
        raise BackendMissingError(
            f"{_installed_packages()} has no {_PROVIDERS[device]}; for CUDA: pip uninstall "
            "onnxruntime, then pip install 'gap-runtime[gpu]'"
        )
    return [_PROVIDERS[device]]


def _zeros(ort: ModuleType, shape: tuple[int | str, ...], dtype: str, device: str) -> Any:
    """A cache tensor on the device. Zeros, because masked slots are still multiplied by 0."""
    array = np.zeros([int(size) for size in shape], dtype)
    return ort.OrtValue.ortvalue_from_numpy(array, device, 0)


def _run_errors(ort: ModuleType) -> tuple[type[Exception], ...]:
    """All error classes of onnxruntime, which share no base of their own."""
    state = ort.capi.onnxruntime_pybind11_state
    return tuple(getattr(state, name) for name in _ERRORS if hasattr(state, name))
