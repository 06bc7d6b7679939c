"""TensorRT: `tensorrt` on servers and Jetson, `tensorrt_rtx` on RTX cards, one API.

`tensorrt` takes the engines of the bundle's own target, `tensorrt:FOLDER` those of that folder
under engines/. `gap-runtime build` makes them. Tensors and the KV cache stay on the GPU; each
call copies its inputs in and its outputs out.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np

from gap_runtime.backends._cuda import CapturedGraph, Device, DeviceCache, DeviceMemory
from gap_runtime.backends._interface import GraphTensor, require_interface
from gap_runtime.backends._kv_cache import SlotCopy, cache_specs, require_room
from gap_runtime.backends.tensorrt.kernels import CompiledKernels
from gap_runtime.backends.tensorrt.library import (
    RTX,
    dtype_name,
    find_mismatch,
    import_package,
    last_error,
    load_engine,
    make_log,
    scratch_bytes,
)
from gap_runtime.backends.tensorrt.scratch import share_scratch
from gap_runtime.bundle.bundle import Bundle
from gap_runtime.bundle.engines import (
    EngineRecord,
    engine_file,
    find_engine_folder,
    find_fault,
    read_engine_record,
    rebuild_command,
)
from gap_runtime.bundle.manifest import Stage
from gap_runtime.bundle.tensors import MOST_LOGITS, TensorSpec
from gap_runtime.errors import BundleError, EngineError
from gap_runtime.machines.memory import free_memory

_SMALL_INPUTS: Final = ("embeddings", "position_ids", "write_slot", "logits_rows")
_RUNS_BEFORE_CAPTURE: Final = 2
"""Runs of the step before it is captured: the first ones allocate, which a graph may not."""
_LOG: Final = logging.getLogger(__name__)


class _Engine:
    """A loaded engine: its library, its device, and the scratch memory that it shares."""

    def __init__(self, bundle: Bundle, stage: Stage, folder_name: str) -> None:
        """Find the engine, prove that it is for this bundle and this machine, load it."""
        folder = find_engine_folder(bundle, folder_name, "tensorrt")
        self.path: Path = engine_file(folder, stage.name)
        self.rebuild = rebuild_command(bundle, folder)
        fault = find_fault(bundle, stage, folder)
        record = read_engine_record(folder, stage.name)
        if fault or record is None:
            raise EngineError(f"{self.path}: {fault}; build it: {self.rebuild}")
        self.record: EngineRecord = record
        self.trt: ModuleType = import_package(record.package)
        try:
            self.device = Device()
        except EngineError as error:
            raise type(error)(
                f"{self.path}: {error}; --backend onnxruntime runs the graphs without one"
            ) from error
        capability = self.device.compute_capability
        mismatch = find_mismatch(record, self.trt, (capability,))
        if mismatch:
            raise EngineError(f"{self.path}: {mismatch}; build it again: {self.rebuild}")
        self._require_room()
        self.log = make_log(self.trt)
        self.engine: Any = load_engine(self.trt, self.log, self.path)
        self._require_interface(stage)
        self.scratch = share_scratch()
        self.scratch.reserve(self.device, scratch_bytes(self.engine))
        self._kernels = (
            CompiledKernels(self.trt, self.engine, bundle, stage.name)
            if record.package == RTX
            else None
        )

    def _require_interface(self, stage: Stage) -> None:
        """Refuse an engine that takes or gives something else than the manifest says.

        Its record proves bytes, not what is in them.
        """
        held: dict[bool, list[GraphTensor]] = {True: [], False: []}
        for k in range(self.engine.num_io_tensors):
            name = self.engine.get_tensor_name(k)
            is_input = self.engine.get_tensor_mode(name) == self.trt.TensorIOMode.INPUT
            shape = (None if size < 0 else size for size in self.engine.get_tensor_shape(name))
            dtype = dtype_name(self.engine.get_tensor_dtype(name))
            held[is_input].append(GraphTensor(name=name, dtype=dtype, shape=tuple(shape)))
        try:
            require_interface(self.path, stage, held[True], held[False])
        except BundleError as error:
            found = str(error).removesuffix("; export again")
            raise EngineError(f"{found}; build it again: {self.rebuild}") from error

    def _require_room(self) -> None:
        """Refuse an engine that a machine of one memory has no room for; others say so themselves.

        There, what is taken too much ends a process.
        """
        size, free = self.record.size, free_memory()
        if self.device.shares_memory and free < size:
            raise EngineError(
                f"{self.path}: {free / 1e9:.1f} GB of memory free, it takes about "
                f"{size / 1e9:.1f} GB; close other programs, or export with --quantize int4"
            )

    def make_context(self, profile: int) -> Any:
        """An execution context with a profile chosen."""
        context = self.engine.create_execution_context(
            self._kernels.settings
            if self._kernels
            else self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if context is None:
            raise EngineError(f"{self.path}: no execution context: {last_error(self.log)}")
        if not context.set_optimization_profile_async(profile, self.device.stream):
            raise EngineError(f"{self.path}: profile {profile}: {last_error(self.log)}")
        return context

    def settle(self, context: Any, moves: int) -> int:
        """Have a context work where the scratch memory lies; its `moves`, those before given."""
        if moves != self.scratch.moves:
            address, size = self.scratch.place
            context.set_device_memory(address, size)
        return self.scratch.moves

    def set_address(self, context: Any, name: str, memory: DeviceMemory) -> None:
        """Say where a tensor lies."""
        if not context.set_tensor_address(name, memory.address):
            raise EngineError(f"{self.path}: tensor '{name}': {last_error(self.log)}")

    def set_shape(self, context: Any, name: str, shape: tuple[int, ...]) -> None:
        """Say how large an input with a free dimension is."""
        if not context.set_input_shape(name, shape):
            raise EngineError(f"{self.path}: input '{name}' {shape}: {last_error(self.log)}")

    def why_not_captured(self, context: Any) -> str:
        """Why a context's runs cannot be a CUDA graph; empty where they can, as far as is told."""
        ask = getattr(context, "is_stream_capturable", None)
        if ask is None or ask(self.device.stream):
            return ""
        return f"{self.record.package} says that they cannot be captured"

    def keep_kernels(self) -> None:
        """After a first run: keep what was compiled for it."""
        if self._kernels is not None:
            self._kernels.keep()

    def enqueue(self, context: Any) -> None:
        """Queue one run."""
        if not context.execute_async_v3(self.device.stream):
            raise EngineError(f"{self.path}: it could not be run: {last_error(self.log)}")


class TensorrtStage:
    """A vision or text engine; every tensor has its place on the device from the start."""

    def __init__(self, bundle: Bundle, stage: Stage, device: str) -> None:
        """Load the engine."""
        self._engine = _Engine(bundle, stage, device)
        self._context = self._engine.make_context(0)
        self._moves = 0
        self._has_run = False
        device_ = self._engine.device
        self._inputs = {spec.name: _place(device_, spec) for spec in stage.inputs}
        self._outputs = {spec.name: _place(device_, spec) for spec in stage.outputs}
        for name, tensor in (self._inputs | self._outputs).items():
            self._engine.set_address(self._context, name, tensor.memory)

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name for the stage's inputs by name."""
        device = self._engine.device
        for name, tensor in self._inputs.items():
            tensor.write(inputs[name])
            device.to_device(tensor.memory, tensor.host)
        with self._engine.scratch.lock:
            self._moves = self._engine.settle(self._context, self._moves)
            self._engine.enqueue(self._context)
            for tensor in self._outputs.values():
                device.to_host(tensor.host, tensor.memory)
            device.synchronize()
        if not self._has_run:
            self._has_run = True
            self._engine.keep_kernels()
        return {name: tensor.host.copy() for name, tensor in self._outputs.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tensor:
    """A tensor on the device and its counterpart in page-locked host memory."""

    host: np.ndarray
    memory: DeviceMemory

    def write(self, values: np.ndarray) -> None:
        """Put values into the host's side, of the tensor's dtype and shape."""
        if values.shape != self.host.shape:
            raise EngineError(f"input of shape {values.shape}, expected {self.host.shape}")
        self.host[...] = values


@dataclass(slots=True, kw_only=True)
class _Call:
    """What runs one row count. `graphs` are by the cache that is read.

    `moves` is how often the scratch memory had moved when the context was told where it lies.
    """

    rows: int
    context: Any
    inputs: dict[str, _Tensor]
    logits: _Tensor
    runs: int = 0
    moves: int = 0
    graphs: dict[int, CapturedGraph]


class TensorrtDecoder:
    """A decoder engine and its KV cache on the device.

    Where the engine writes the cache in place, there is one, bound as input and as output.
    Otherwise there are two, which change sides at every run.
    """

    def __init__(self, bundle: Bundle, stage: Stage, device: str) -> None:
        """Load the engine and make an empty cache."""
        self._engine = _Engine(bundle, stage, device)
        self._capacity = bundle.manifest.layout.capacity
        specs = {spec.name: spec for spec in (*stage.inputs, *stage.outputs)}
        self._specs = {name: specs[name] for name in (*_SMALL_INPUTS, "logits")}
        self._require_aliases(cache_specs(stage))
        self._cache = DeviceCache(
            self._engine.device, stage, in_place=self._engine.record.is_cache_in_place
        )
        self._calls: dict[int, _Call] = {}
        self._captures = True

    def fit(self, rows: int) -> int | None:
        """The smallest of the engine's row counts that has room for so many."""
        return min((size for size in self._engine.record.profiles if size >= rows), default=None)

    def run(
        self,
        embeddings: np.ndarray,
        position_ids: np.ndarray,
        write_slot: int,
        logits_rows: np.ndarray,
    ) -> np.ndarray:
        """Logits float32 [R, V] of some rows; see gap_runtime.backends.DecoderSession."""
        rows = embeddings.shape[1]
        require_room(write_slot, rows, self._capacity, f"{self._engine.path}: ")
        if rows not in self._calls:
            self._calls[rows] = self._prepare(rows)
        call = self._calls[rows]
        call.inputs["embeddings"].write(embeddings)
        call.inputs["position_ids"].write(position_ids)
        call.inputs["write_slot"].host[0] = write_slot
        call.inputs["logits_rows"].host[...] = logits_rows[-1]
        call.inputs["logits_rows"].host[: len(logits_rows)] = logits_rows
        with self._engine.scratch.lock:
            self._settle(call)
            self._launch(call)
            self._engine.device.synchronize()
        if call.runs == 0:
            self._engine.keep_kernels()
        call.runs += 1
        self._cache.turn()
        logits: np.ndarray = call.logits.host[: len(logits_rows)]
        return logits

    def copy_slots(self, count: int) -> SlotCopy[DeviceMemory]:
        """A copy of the first slots on the device; see gap_runtime.backends.SlotSaver."""
        return self._cache.copy_slots(count)

    def put_slots(self, saved: SlotCopy[DeviceMemory]) -> None:
        """Write slots back; see gap_runtime.backends.SlotSaver."""
        self._cache.put_slots(saved)

    def _settle(self, call: _Call) -> None:
        """Have a call work where the scratch memory lies; a graph of it knows the old place."""
        moves = self._engine.settle(call.context, call.moves)
        if moves != call.moves and call.graphs:
            call.graphs.clear()
            # Once more as it is before it is captured anew.
            call.runs = _RUNS_BEFORE_CAPTURE - 1
        call.moves = moves

    def _launch(self, call: _Call) -> None:
        """Queue one run: as a graph where there is one, or where one can be made now."""
        is_step = call.rows <= MOST_LOGITS
        is_due = self._captures and is_step and call.runs >= _RUNS_BEFORE_CAPTURE
        side = self._cache.side
        if is_due and side not in call.graphs:
            # Some kernels cannot be captured; running them one by one gives the same.
            reason = self._engine.why_not_captured(call.context)
            try:
                if not reason:
                    call.graphs[side] = self._engine.device.capture(lambda: self._queue(call))
            except EngineError as error:
                reason = str(error)
            if reason:
                self._captures = False
                _LOG.warning(
                    "%s: steps are launched kernel by kernel, which is slower than one CUDA "
                    "graph: %s",
                    self._engine.path,
                    reason,
                )
        graph = call.graphs.get(side)
        if graph is None:
            self._queue(call)
        else:
            graph.launch()

    def _queue(self, call: _Call) -> None:
        device, context = self._engine.device, call.context
        for tensor in call.inputs.values():
            device.to_device(tensor.memory, tensor.host)
        if self._cache.sides > 1 or call.runs == 0:
            self._bind_caches(context)
        self._engine.enqueue(context)
        device.to_host(call.logits.host, call.logits.memory)

    def _bind_caches(self, context: Any) -> None:
        side = self._cache.side
        for name, memory in (self._cache.inputs(side) | self._cache.outputs(side)).items():
            self._engine.set_address(context, name, memory)

    def _prepare(self, rows: int) -> _Call:
        """Context and inputs for one row count."""
        profiles = self._engine.record.profiles
        if rows not in profiles:
            have = ", ".join(map(str, profiles))
            raise EngineError(
                f"{self._engine.path}: it has profiles for {have} rows, {rows} are wanted; build "
                f"it for all ratios: {self._engine.rebuild}"
            )
        context = self._engine.make_context(profiles.index(rows))
        tensors = {}
        for name, spec in self._specs.items():
            shape = spec.shape_at(rows)
            tensors[name] = _place(self._engine.device, replace(spec, shape=shape))
            if shape != spec.shape and name in _SMALL_INPUTS:
                self._engine.set_shape(context, name, shape)
            self._engine.set_address(context, name, tensors[name].memory)
        logits = tensors.pop("logits")
        return _Call(rows=rows, context=context, inputs=tensors, logits=logits, graphs={})

    def _require_aliases(self, caches: list[TensorSpec]) -> None:
        """Compare what the record says of the cache with what the engine does."""
        find = getattr(self._engine.engine, "get_aliased_input_tensor", None)
        if find is None:
            return
        for spec in caches:
            is_aliased = find(f"next_{spec.name}") == spec.name
            if is_aliased != self._engine.record.is_cache_in_place:
                raise EngineError(
                    f"{self._engine.path}: its record does not say how it writes "
                    f"'{spec.name}'; build it again: {self._engine.rebuild} --force"
                )


def open_stage(bundle: Bundle, stage: Stage, device: str) -> TensorrtStage:
    """Load a vision or text engine."""
    return TensorrtStage(bundle, stage, device)


def open_decoder(bundle: Bundle, stage: Stage, device: str) -> TensorrtDecoder:
    """Load the decoder engine and make an empty cache."""
    return TensorrtDecoder(bundle, stage, device)


def _place(device: Device, spec: TensorSpec) -> _Tensor:
    """Room for a tensor on both sides; its dtype is one that numpy has."""
    return _Tensor(
        host=device.pin(spec.fixed_shape(), spec.dtype), memory=device.allocate(spec.count_bytes())
    )
