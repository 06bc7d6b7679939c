"""onnxruntime: CPU anywhere, and NVIDIA's providers where an onnxruntime that has them is.

`onnxruntime` takes CUDA when it is there; `onnxruntime:cpu`, `:cuda`, `:tensorrt` and
`:nvtensorrtrtx` insist. On a GPU the weights and the KV cache stay on the device, and only
embeddings, positions and logits cross.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from gap_runtime.backends import DecoderSession
from gap_runtime.backends._calls import Calls
from gap_runtime.backends._kv_cache import KvCache, SlotCopy, cache_specs, make_arrays
from gap_runtime.backends._weights import move_weights
from gap_runtime.backends.onnxruntime.graphs import open_graph_decoder
from gap_runtime.backends.onnxruntime.loading import (
    first_words,
    import_onnxruntime,
    list_errors,
    needs_plugin,
    open_session,
)
from gap_runtime.backends.onnxruntime.providers import CPU, CUDA, find_provider, writes_in_place
from gap_runtime.bundle.bundle import Bundle
from gap_runtime.bundle.manifest import Stage
from gap_runtime.bundle.tensors import TensorSpec
from gap_runtime.errors import EngineError

_CPU_NAMES: Final = ("Cpu", "CpuPinned")
_NVIDIA: Final = 0x10DE
"""NVIDIA's PCI vendor ID, by which providers that are plug-ins find their memory."""


class OnnxStage:
    """A vision or text graph in an onnxruntime session."""

    def __init__(self, bundle: Bundle, stage: Stage, device: str) -> None:
        """Load the graph."""
        self._ort = import_onnxruntime()
        self._session = open_session(self._ort, bundle, stage, device)
        self._role = stage.role
        self._names = [spec.name for spec in stage.outputs]

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name for the stage's inputs by name."""
        try:
            values = self._session.run(self._names, inputs)
        except list_errors(self._ort) as error:
            raise EngineError(
                f"onnxruntime could not run the {self._role} graph: {error}"
            ) from error
        return dict(zip(self._names, values, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bound:
    """Buffers of a call, bound once and written in place at every run.

    `bindings` take turns: one where the cache is read and written in one place, else two. `moved`
    are inputs that lie on a device and `rebound` those that onnxruntime has to place itself, each
    with the array on the host that it is copied from.
    """

    bindings: list[Any]
    moved: list[tuple[Any, np.ndarray]]
    rebound: list[tuple[str, np.ndarray]]


class OnnxDecoder:
    """A decoder graph in an onnxruntime session, its cache bound as input and as output."""

    def __init__(self, bundle: Bundle, stage: Stage, device: str) -> None:
        """Load the graph and make an empty cache on its device."""
        self._ort = import_onnxruntime()
        self._errors = list_errors(self._ort)
        self._session = open_session(self._ort, bundle, stage, device)
        self._on_gpu = self._session.get_providers()[0] != CPU
        self._is_plugin = bool(device) and needs_plugin(self._ort, find_provider(device))
        self._on_host = self._find_host_inputs()
        self._host_memory: dict[int, np.ndarray] = {}
        if not self._on_gpu:
            move_weights(bundle)
        in_place = writes_in_place(device, bundle.manifest.target.opset)
        self._cache = self._make_cache(stage, in_place=in_place)
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
        try:
            call = self._calls.fill(embeddings, position_ids, write_slot, logits_rows)
            binding = call.bound.bindings[self._cache.side]
            for value, array in call.bound.moved:
                value.update_inplace(array)
            for name, array in call.bound.rebound:
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

    def _bind(self, arrays: Mapping[str, np.ndarray], logits: np.ndarray) -> _Bound:
        """A binding of a call's buffers for each turn of the caches."""
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
        return _Bound(
            bindings=bindings,
            moved=[(value, arrays[name]) for name, value in placed.items()],
            rebound=[] if self._on_host is not None else list(arrays.items()),
        )

    def _make_cache(self, stage: Stage, *, in_place: bool) -> KvCache[Any]:
        """An empty cache, each tensor of it where the graph reads it.

        A kernel that its provider lacks runs on the CPU, and reads and writes its cache there.

        Raises:
            EngineError: It does not fit there.
        """
        specs, made = cache_specs(stage), dict[str, np.ndarray]()

        def allocate(spec: TensorSpec) -> Any:
            if self._on_gpu:
                return self._place_cache(spec.name, np.zeros(spec.fixed_shape(), spec.dtype))
            if not made:
                made.update(make_arrays(specs))
            return self._place_cache(spec.name, made.pop(spec.name))

        refusals: tuple[type[Exception], ...] = (*self._errors, MemoryError)
        try:
            return KvCache(stage, allocate, in_place=in_place)
        except refusals as error:
            raise EngineError(
                f"no room for the KV cache of {len(specs)} tensors of shape "
                f"{list(specs[0].shape)} where the decoder runs: {first_words(error)}"
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


def open_decoder(bundle: Bundle, stage: Stage, device: str) -> DecoderSession:
    """Load the decoder graph and make an empty cache."""
    ort = import_onnxruntime()
    if device in ("", "cuda") and CUDA in ort.get_available_providers():
        decoder = open_graph_decoder(ort, bundle, stage)
        if decoder is not None:
            return decoder
    return OnnxDecoder(bundle, stage, device)
