"""OpenVINO: graphs as they are on a CPU, an Intel GPU or an Intel NPU.

`openvino` is the CPU; `openvino:gpu`, `openvino:gpu.1`, `openvino:npu` are devices by OpenVINO's
own names. It computes in the bundle's dtype: float32 in float32, bfloat16 where the device has it,
float16 where a device other than the CPU has it. Beside weights in few bits, rows are rounded to
8 bits and a CPU's cache to float16, as it is for a float16 model.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any, Final

import numpy as np

from gap_runtime.backends._calls import Calls
from gap_runtime.backends._interface import GraphTensor, require_interface
from gap_runtime.backends._kv_cache import KvCache, SlotCopy
from gap_runtime.backends._weights import move_weights
from gap_runtime.backends.openvino.memory import DTYPES, Memory, allocate, infer
from gap_runtime.backends.openvino.messages import first_words
from gap_runtime.backends.openvino.paged_decoder import PagedDecoder
from gap_runtime.backends.openvino.pages import OtherFormError, move_cache_into_pages
from gap_runtime.bundle.bundle import Bundle
from gap_runtime.bundle.engines import prove_cache, provider_cache, seal_cache
from gap_runtime.bundle.manifest import DECODER, Stage
from gap_runtime.bundle.onnx_file import require_no_loop
from gap_runtime.bundle.tensors import TensorSpec
from gap_runtime.errors import BackendMissingError, EngineError
from gap_runtime.machines.environment import read_threads, wants_fastmath
from gap_runtime.machines.telemetry import without_reports

_LOG: Final = logging.getLogger(__name__)
_OPENING: Final = Lock()
_CPU: Final = "CPU"
_CACHE: Final = "CACHE_DIR"
_PRECISIONS: Final = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_CAPABILITIES: Final = {"f16": "FP16", "bf16": "BF16"}
"""What OpenVINO says a device has that computes so; every device has float32."""
_MOST_TWICE: Final = 256 * 2**20
"""Bytes of a decoder's weights that may lie in memory twice, for calls of a single row. What a
change of the number of rows costs does not grow with them: a larger decoder would gain little."""
_BLOCK: Final = 128
"""Inputs that share a scale, where the exporter makes int4."""
_LARGEST_OPSET: Final = 21
"""A decoder of a later one writes its cache with TensorScatter, which OpenVINO does not read."""


class OpenvinoStage:
    """A vision or text graph that OpenVINO compiled."""

    def __init__(self, bundle: Bundle, stage: Stage, device: str) -> None:
        """Load the graph."""
        compiled = _compile(_read(bundle, stage, device))
        self._request = compiled.create_infer_request()
        self._role = stage.role
        self._names = [spec.name for spec in stage.outputs]

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name for the stage's inputs by name."""
        try:
            self._request.infer(inputs, share_inputs=True)
        except RuntimeError as error:
            raise EngineError(
                f"OpenVINO could not run the {self._role} graph: {first_words(error)}"
            ) from error
        return {name: self._request.get_tensor(name).data.copy() for name in self._names}


class OpenvinoDecoder:
    """A decoder graph that OpenVINO compiled, its cache in two places that change sides."""

    def __init__(self, ov: ModuleType, compiled: Any, stage: Stage) -> None:
        """Make an empty cache."""
        self._ov = ov
        self._cache: KvCache[Memory] = KvCache(stage, self._allocate, in_place=False)
        # A request each: what is bound to it stays, but for the few inputs of a call.
        self._requests = [compiled.create_infer_request() for _ in range(self._cache.sides)]
        for side, request in enumerate(self._requests):
            for name, memory in (self._cache.inputs(side) | self._cache.outputs(side)).items():
                request.set_tensor(name, memory.tensor)
        self._calls = Calls(stage, self._bind)

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
        call = self._calls.fill(embeddings, position_ids, write_slot, logits_rows)
        request = self._requests[self._cache.side]
        try:
            infer(request, call.bound)
        except RuntimeError as error:
            raise EngineError(
                f"OpenVINO could not run the decoder: {first_words(error)}"
            ) from error
        self._cache.turn()
        return call.logits

    def copy_slots(self, count: int) -> SlotCopy[np.ndarray]:
        """A copy of the first slots; see gap_runtime.backends.SlotSaver."""
        memories = self._cache.inputs(self._cache.side)
        tensors = {name: each.array[:, :, :count].copy() for name, each in memories.items()}
        size = sum(array.nbytes for array in tensors.values())
        return SlotCopy(count=count, tensors=tensors, size=size)

    def put_slots(self, saved: SlotCopy[np.ndarray]) -> None:
        """Write slots back; see gap_runtime.backends.SlotSaver."""
        for name, each in self._cache.inputs(self._cache.side).items():
            each.array[:, :, : saved.count] = saved.tensors[name]

    def _bind(self, inputs: Mapping[str, np.ndarray], logits: np.ndarray) -> dict[str, Any]:
        """OpenVINO's tensors on the memory of a call's arrays."""
        return {
            name: self._ov.Tensor(array, shared_memory=True)
            for name, array in {**inputs, "logits": logits}.items()
        }

    def _allocate(self, spec: TensorSpec) -> Memory:
        """A tensor of zeros."""
        return allocate(self._ov, spec.fixed_shape(), spec.dtype)


def open_stage(bundle: Bundle, stage: Stage, device: str) -> OpenvinoStage:
    """Load a vision or text graph."""
    return OpenvinoStage(bundle, stage, device)


def open_decoder(bundle: Bundle, stage: Stage, device: str) -> PagedDecoder | OpenvinoDecoder:
    """Load the decoder graph and make an empty cache."""
    graph = _read(bundle, stage, device)
    if graph.device != _CPU:
        return OpenvinoDecoder(graph.ov, _compile(graph), stage)
    decoder: PagedDecoder | OpenvinoDecoder | None = _open_pages(bundle, stage, graph)
    if decoder is None:
        graph = _read(bundle, stage, device)
        decoder = OpenvinoDecoder(graph.ov, _compile(graph), stage)
    move_weights(bundle)
    return decoder


def _open_pages(bundle: Bundle, stage: Stage, graph: _Graph) -> PagedDecoder | None:
    """A decoder whose cache is pages; None where this OpenVINO or this processor has none."""
    try:
        graph = replace(graph, model=move_cache_into_pages(graph.ov, graph.model, stage))
        compiled = _compile(graph)
        twice = _count_weights(graph.model) <= _MOST_TWICE
        fixed = partial(_compile_fixed, bundle, graph) if twice else None
        return PagedDecoder(graph.ov, compiled, stage, fixed)
    except (OtherFormError, EngineError) as error:
        _LOG.warning(
            "%s: every call copies the cache, which is several times slower than attention over "
            "pages: %s",
            graph.path,
            error,
        )
        return None


def _compile_fixed(bundle: Bundle, graph: _Graph, shapes: Mapping[str, list[int]]) -> Any:
    """A graph of the CPU, compiled once more, for the shapes of its inputs by name.

    Raises:
        EngineError: OpenVINO cannot compile it.
        RuntimeError: It cannot have these shapes.
    """
    graph.model.reshape(shapes)
    compiled = _compile(graph)
    move_weights(bundle)
    return compiled


def _count_weights(model: Any) -> int:
    """Bytes of a model's constants."""
    nodes = (node for node in model.get_ops() if node.get_type_name() == "Constant")
    return sum(node.get_byte_size() for node in nodes)


def _open_core(ov: ModuleType) -> Any:
    """OpenVINO itself, once for a process and as long as it lives.

    Each one gives the thread that opens it a stack for signals, and takes it away at its end: with
    several, a signal that comes after the end of one kills the process (2026.4).
    """
    with _OPENING:
        return _make_core(ov)


@cache
def _make_core(ov: ModuleType) -> Any:
    return ov.Core()


def _import_openvino() -> ModuleType:
    try:
        with without_reports():
            return import_module("openvino")
    except ImportError as error:
        raise BackendMissingError(
            "openvino is not installed; pip install 'gap-runtime[openvino]'"
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class _Graph:
    """A graph that OpenVINO has read, and for what device and how it is compiled."""

    ov: ModuleType
    core: Any
    model: Any
    device: str
    settings: dict[str, Any]
    path: Path


def _read(bundle: Bundle, stage: Stage, device: str) -> _Graph:
    """Read a graph.

    Raises:
        BackendMissingError: OpenVINO is not installed.
        BundleError: The graph is not what the manifest says, or has a loop.
        EngineError: It has no such device, or cannot read the graph.
    """
    path = bundle.folder / stage.file
    opset = bundle.manifest.target.opset
    if stage.role == DECODER and opset > _LARGEST_OPSET:
        raise EngineError(
            f"{path}: OpenVINO reads decoders of opset {_LARGEST_OPSET} at most, found {opset}; "
            "export with --target openvino"
        )
    ov = _import_openvino()
    core = _open_core(ov)
    wanted = device.upper() or _CPU
    # Every OpenVINO has the CPU; looking for devices loads the plugins of all others.
    if wanted != _CPU and wanted.partition(".")[0] not in {
        each.partition(".")[0] for each in core.available_devices
    }:
        raise EngineError(
            f"OpenVINO finds no device {wanted}, only {', '.join(core.available_devices)}; "
            "install its driver, or take --backend openvino for the CPU"
        )
    require_no_loop(path)
    try:
        settings = _choose_settings(core, bundle, wanted)
        model = core.read_model(str(path))
    except RuntimeError as error:
        raise _cannot_load(ov, path, wanted, error) from error
    found = [[_read_tensor(each) for each in side] for side in (model.inputs, model.outputs)]
    require_interface(path, stage, *found)
    return _Graph(ov=ov, core=core, model=model, device=wanted, settings=settings, path=path)


def _compile(graph: _Graph) -> Any:
    """A graph, compiled for its device.

    Raises:
        EngineError: OpenVINO cannot compile it.
    """
    settings = graph.settings
    try:
        compiled = graph.core.compile_model(graph.model, graph.device, settings)
    except RuntimeError as error:
        raise _cannot_load(graph.ov, graph.path, graph.device, error) from error
    if _CACHE in settings:
        seal_cache(Path(settings[_CACHE]))
    return compiled


def _cannot_load(ov: ModuleType, path: Path, device: str, error: RuntimeError) -> EngineError:
    version = ov.__version__.partition("-")[0]
    return EngineError(
        f"{path}: OpenVINO {version} cannot load it on {device}: {first_words(error)}"
    )


def _read_tensor(found: Any) -> GraphTensor:
    """An input or output of a model."""
    return GraphTensor(
        name=found.get_any_name(),
        dtype=DTYPES.get(found.get_element_type().get_type_name()),
        shape=tuple(
            None if size.is_dynamic else size.get_length() for size in found.get_partial_shape()
        ),
    )


def _is_quantized_here(bundle: Bundle) -> bool:
    """Whether the exporter quantized weights, so that their blocks are what it makes."""
    quantization = bundle.manifest.quantization
    return quantization is not None and quantization.method != "checkpoint"


def _choose_cache(bundle: Bundle, precision: str) -> str:
    """Precision of a cache of pages: float16 for float32 beside a decoder's weights in few bits.

    That is rounded finer than the rows that such weights multiply, and read in half the time; a
    graph in float16 rounds its cache so itself. A model in bfloat16 may have keys beyond float16's
    range.
    """
    manifest = bundle.manifest
    in_few_bits = manifest.quantization is not None and DECODER in manifest.quantization.parts
    takes_half = manifest.dtype == "float16" or (in_few_bits and manifest.dtype == "float32")
    return "f16" if takes_half and precision == "f32" else precision


def _choose_settings(core: Any, bundle: Bundle, device: str) -> dict[str, Any]:
    """How a graph is compiled: for one caller at a time, in the bundle's precision or float32."""
    precision = _PRECISIONS[bundle.manifest.dtype]
    if device == _CPU:
        if precision == "f16":
            # In float16, attention over pages is wrong, and a tower rounds too much (2026.4).
            precision = "f32"
        elif precision == "f32" and wants_fastmath():
            precision = "bf16"
    capability = _CAPABILITIES.get(precision)
    if capability and capability not in core.get_property(device, "OPTIMIZATION_CAPABILITIES"):
        precision = "f32"
    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_PRECISION_HINT": precision,
    }
    if device == _CPU:
        # By default it keeps a cache of pages in 8 bits.
        settings["KV_CACHE_PRECISION"] = _choose_cache(bundle, precision)
        if _is_quantized_here(bundle):
            # Rows are rounded to 8 bits in blocks like those of int4 weights: with blocks of 32,
            # OpenVINO's default, a prefill and a tower take 1.2 times as long.
            settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = str(_BLOCK)
        threads = read_threads()
        return settings if threads is None else settings | {"INFERENCE_NUM_THREADS": threads}
    # Compiling for these takes minutes; for the CPU a copy of the weights is all that it saves.
    folder = provider_cache(bundle, f"openvino-{device.lower()}")
    if folder is None:
        return settings
    try:
        # What it finds there it takes as it is: a flipped bit is another answer.
        prove_cache(folder)
    except OSError:
        return settings
    return settings | {_CACHE: str(folder)}
