"""A decoder on onnxruntime's CUDA whose steps and drafts are one CUDA graph each.

A call of one row, and one of eight, is recorded at its first run and launched as a whole from then
on: at the speeds of today's GPUs, launching a step's kernels one by one takes longer than they do.
All inputs of a call lie in one block of page-locked memory, which is copied in one piece; the
logits come back in one. Both copies and the launch are queued on one stream, and waited for once.
Prompts, whose lengths differ, are run kernel by kernel on the same stream.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

import numpy as np

from gap_runtime.backends._cuda import Device, DeviceCache, DeviceMemory
from gap_runtime.backends._kv_cache import SlotCopy, require_room
from gap_runtime.backends.onnxruntime.cudart import find_cudart
from gap_runtime.backends.onnxruntime.loading import list_errors, open_session, preload
from gap_runtime.bundle.bundle import Bundle
from gap_runtime.bundle.manifest import Stage
from gap_runtime.bundle.tensors import MOST_LOGITS
from gap_runtime.errors import EngineError

_DIALECTS: Final = ("cuda", "native")
"""Whose graphs compute nothing of a step on the CPU, but for shapes."""
_OUTSIDE: Final = "-1"
"""onnxruntime's number of a run that is neither recorded nor replayed."""
_REFUSAL: Final = "graph capture"
"""Words of onnxruntime's where it starts and records nothing."""
_ALIGNED: Final = 256
"""Bytes that the address of a tensor is a multiple of, as of memory that CUDA allocates."""
_LOG: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """One number of rows: its inputs in page-locked memory, how they are bound, how it is run."""

    inputs: dict[str, np.ndarray]
    size: int
    binding: Any
    options: Any


class GraphDecoder:
    """A decoder graph on CUDA with its cache, its inputs and its logits at fixed addresses."""

    def __init__(
        self, ort: ModuleType, session: Any, device: Device, bundle: Bundle, stage: Stage
    ) -> None:
        """Make an empty cache and room for the longest prompt.

        Raises:
            EngineError: They do not fit the GPU's memory.
        """
        self._ort, self._session, self._device = ort, session, device
        self._errors = list_errors(ort)
        self._specs = {spec.name: spec for spec in (*stage.inputs, *stage.outputs)}
        self._capacity = bundle.manifest.layout.capacity
        size = self._place(self._capacity, MOST_LOGITS)[1]
        vocabulary = int(self._specs["logits"].shape[-1])
        try:
            self._cache = DeviceCache(device, stage, in_place=True)
            self._memory, self._host = device.allocate(size), device.pin((size,), "uint8")
            self._logits = device.pin((MOST_LOGITS, vocabulary), "float32")
            self._logits_memory = device.allocate(self._logits.nbytes)
            device.synchronize()
        except EngineError as error:
            raise EngineError(
                f"no room for the KV cache where the decoder runs: {error}"
            ) from error
        self._calls: dict[tuple[int, int], _Call] = {}

    def fit(self, rows: int) -> int:
        """One row or eight, which are recorded; any number above."""
        return rows if rows == 1 else max(rows, MOST_LOGITS)

    def run(
        self,
        embeddings: np.ndarray,
        position_ids: np.ndarray,
        write_slot: int,
        logits_rows: np.ndarray,
    ) -> np.ndarray:
        """Logits float32 [R, V] of some rows; see gap_runtime.backends.DecoderSession."""
        rows, wanted = embeddings.shape[1], len(logits_rows)
        require_room(write_slot, rows, self._capacity)
        try:
            call = self._prepare(rows, min(rows, MOST_LOGITS))
            call.inputs["embeddings"][:] = embeddings
            call.inputs["position_ids"][:] = position_ids
            call.inputs["write_slot"][0] = write_slot
            call.inputs["logits_rows"][:] = logits_rows[-1]
            call.inputs["logits_rows"][:wanted] = logits_rows
            self._device.to_device(self._memory, self._host[: call.size])
            self._session.run_with_iobinding(call.binding, call.options)
        except self._errors as error:
            raise EngineError(f"onnxruntime could not run the decoder: {error}") from error
        logits: np.ndarray = self._logits[:wanted]
        self._device.to_host(logits, self._logits_memory)
        self._device.synchronize()
        return logits

    def copy_slots(self, count: int) -> SlotCopy[DeviceMemory]:
        """A copy of the first slots on the device; see gap_runtime.backends.SlotSaver."""
        return self._cache.copy_slots(count)

    def put_slots(self, saved: SlotCopy[DeviceMemory]) -> None:
        """Write slots back; see gap_runtime.backends.SlotSaver."""
        self._cache.put_slots(saved)

    def _place(self, rows: int, wanted: int) -> tuple[dict[str, tuple[int, tuple[int, ...]]], int]:
        """Where in the block each input of a call begins, with its shape; bytes of all."""
        places, end = {}, 0
        for name in ("write_slot", "logits_rows", "position_ids", "embeddings"):
            shape = self._specs[name].shape_at(rows)
            if name == "logits_rows":
                shape = (wanted,)
            places[name] = end, shape
            size = math.prod(shape) * np.dtype(self._specs[name].dtype).itemsize
            end += -(-size // _ALIGNED) * _ALIGNED
        return places, end

    def _prepare(self, rows: int, wanted: int) -> _Call:
        """Inputs and binding of a number of rows."""
        call = self._calls.get((rows, wanted))
        if call is None:
            # Prompts have many lengths: what was bound for the last one is kept, no more.
            self._calls = {key: c for key, c in self._calls.items() if key[0] <= MOST_LOGITS}
            call = self._calls[rows, wanted] = self._bind(rows, wanted)
        return call

    def _bind(self, rows: int, wanted: int) -> _Call:
        places, size = self._place(rows, wanted)
        binding, inputs = self._session.io_binding(), {}
        for name, (begin, shape) in places.items():
            dtype = np.dtype(self._specs[name].dtype)
            length = math.prod(shape) * dtype.itemsize
            inputs[name] = self._host[begin : begin + length].view(dtype).reshape(shape)
            address = self._memory.address + begin
            binding.bind_input(name, "cuda", 0, dtype.type, shape, address)
        for name, memory in self._cache.inputs(0).items():
            spec = self._specs[name]
            place = (np.dtype(spec.dtype).type, spec.fixed_shape(), memory.address)
            binding.bind_input(name, "cuda", 0, *place)
            # Where these are the same memory, one row is written, and nothing copied.
            binding.bind_output(f"next_{name}", "cuda", 0, *place)
        shape = (wanted, self._logits.shape[1])
        binding.bind_output("logits", "cuda", 0, np.float32, shape, self._logits_memory.address)
        options = self._ort.RunOptions()
        is_recorded = rows in (1, MOST_LOGITS)
        options.add_run_config_entry("gpu_graph_id", str(rows) if is_recorded else _OUTSIDE)
        # The copy of the logits waits on the same stream, and for all that is before it.
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return _Call(inputs=inputs, size=size, binding=binding, options=options)


def open_graph_decoder(ort: ModuleType, bundle: Bundle, stage: Stage) -> GraphDecoder | None:
    """The decoder with recorded steps; None, and a line on stderr, where they cannot be.

    Args:
        ort: onnxruntime, whose CUDA provider is wanted and there.
        bundle: The opened bundle.
        stage: Its decoder.
    """
    if bundle.manifest.target.dialect not in _DIALECTS:
        return None
    reason = "the CUDA runtime that onnxruntime is linked with is not found by its name"
    preload(ort, "cuda")
    cuda = find_cudart(ort)
    if cuda is not None:
        try:
            device = Device(cuda)
            session = open_session(
                ort,
                bundle,
                stage,
                "cuda",
                settings={"enable_cuda_graph": "1", "user_compute_stream": str(device.stream)},
            )
        except EngineError as error:
            reason = str(error)
            if _REFUSAL not in reason:
                # It does not start at all; who opens it the other way says why.
                return None
        else:
            return GraphDecoder(ort, session, device, bundle, stage)
    _LOG.warning(
        "%s: steps are launched kernel by kernel, which is slower than one CUDA graph: %s",
        bundle.folder / stage.file,
        reason,
    )
    return None
