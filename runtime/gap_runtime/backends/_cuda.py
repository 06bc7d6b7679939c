"""A CUDA device: memory, one stream, copies and graphs, and a KV cache in its memory.

`Device` calls the functions of the CUDA runtime in the form that cuda-python gives them, an error
code first, which it turns into EngineError. Nothing of CUDA is imported before one is made.

The underscore keeps this file from being taken for a backend.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import weakref
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any, Final

import numpy as np

from gap_runtime.backends._kv_cache import KvCache, SlotCopy, cache_specs
from gap_runtime.bundle.manifest import Stage
from gap_runtime.bundle.tensors import ITEM_BYTES
from gap_runtime.errors import BackendMissingError, EngineError

# The second name is that of cuda-python before 12.6.
_MODULES: Final = ("cuda.bindings.runtime", "cuda.cudart")
_NON_BLOCKING: Final = 1
"""cudaStreamNonBlocking."""
_INSTALL: Final = "pip install 'cuda-python>=12', of the major version of this machine's CUDA"


class Device:
    """The first CUDA device, and a stream on it: what engines are built for and run on."""

    def __init__(self, cuda: Any = None) -> None:
        """Find the device.

        Args:
            cuda: The CUDA runtime's functions as cuda-python has them; None: cuda-python itself.

        Raises:
            BackendMissingError: cuda-python is not installed.
            EngineError: There is no GPU, or its driver does not work.
        """
        self._cuda = _import_cuda() if cuda is None else cuda
        try:
            status, count = self._cuda.cudaGetDeviceCount()
        except RuntimeError as error:
            # Versions before 12.9 load the driver themselves, and raise where there is none.
            raise EngineError(
                f"no GPU that CUDA can use on this machine ({error}); check its driver"
            ) from error
        if int(status) != 0 or not count:
            reason = "no device" if int(status) == 0 else _describe(self._cuda, status)
            raise EngineError(
                f"no GPU that CUDA can use on this machine ({reason}); check its driver"
            )
        self.call("cudaSetDevice", 0)
        self._stream: Any = None

    def call(self, name: str, *arguments: Any) -> Any:
        """What a function of the CUDA runtime gives behind its error code."""
        status, *values = getattr(self._cuda, name)(*arguments)
        if int(status) != 0:
            raise EngineError(f"CUDA: {name}: {_describe(self._cuda, status)}")
        return values[0] if len(values) == 1 else tuple(values)

    @property
    def compute_capability(self) -> str:
        """Of the device, for example `8.9`."""
        names = self._cuda.cudaDeviceAttr
        major, minor = (
            self.call("cudaDeviceGetAttribute", attribute, 0)
            for attribute in (
                names.cudaDevAttrComputeCapabilityMajor,
                names.cudaDevAttrComputeCapabilityMinor,
            )
        )
        return f"{major}.{minor}"

    @property
    def shares_memory(self) -> bool:
        """Whether its memory is the machine's, as on a Jetson."""
        attribute = self._cuda.cudaDeviceAttr.cudaDevAttrIntegrated
        return bool(self.call("cudaDeviceGetAttribute", attribute, 0))

    @property
    def free_bytes(self) -> int:
        """Of its memory, now."""
        free, _ = self.call("cudaMemGetInfo")
        return int(free)

    @property
    def stream(self) -> int:
        """The stream that all work of this device is queued on."""
        if self._stream is None:
            # What libraries queue on the default stream must not spoil a recording on this one.
            self._stream = self.call("cudaStreamCreateWithFlags", _NON_BLOCKING)
        return int(self._stream)

    def allocate(self, size: int) -> DeviceMemory:
        """Zeroed memory on the device."""
        return DeviceMemory(self, size)

    def pin(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """A zeroed array in page-locked host memory, from which copies are asynchronous.

        The memory is released when the array and all views of it are gone.
        """
        size = max(math.prod(shape) * np.dtype(dtype).itemsize, 1)
        address = int(self.call("cudaHostAlloc", size, 0))
        buffer = (ctypes.c_byte * size).from_address(address)
        weakref.finalize(buffer, self._cuda.cudaFreeHost, address).atexit = False
        raw = np.frombuffer(memoryview(buffer).cast("B"), np.uint8)
        raw[:] = 0
        return raw[: math.prod(shape) * np.dtype(dtype).itemsize].view(dtype).reshape(shape)

    def to_device(self, memory: DeviceMemory, array: np.ndarray) -> None:
        """Queue a copy of a contiguous array."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call(
            "cudaMemcpyAsync", memory.address, array.ctypes.data, array.nbytes, kind, self.stream
        )

    def to_host(self, array: np.ndarray, memory: DeviceMemory) -> None:
        """Queue a copy into a contiguous array."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call(
            "cudaMemcpyAsync", array.ctypes.data, memory.address, array.nbytes, kind, self.stream
        )

    def copy_rows(
        self,
        to: DeviceMemory,
        to_pitch: int,
        source: DeviceMemory,
        pitch: int,
        *,
        width: int,
        rows: int,
    ) -> None:
        """Queue a copy on the device of the first `width` bytes of rows that lie a pitch apart."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        places = (to.address, to_pitch, source.address, pitch)
        self.call("cudaMemcpy2DAsync", *places, width, rows, kind, self.stream)

    def synchronize(self) -> None:
        """Wait until all that was queued is done."""
        self.call("cudaStreamSynchronize", self.stream)

    def capture(self, enqueue: Callable[[], None]) -> CapturedGraph:
        """What `enqueue` queues, as a graph that is launched at once; nothing is run yet.

        Raises:
            EngineError: It cannot be captured; the stream is as it was before.
        """
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.call("cudaStreamBeginCapture", self.stream, mode)
        try:
            enqueue()
        except EngineError:
            # Ends the capture; what it gives is worth nothing.
            self._cuda.cudaStreamEndCapture(self.stream)
            self._forget_error()
            raise
        try:
            graph = self.call("cudaStreamEndCapture", self.stream)
        except EngineError:
            self._forget_error()
            raise
        try:
            return CapturedGraph(self, self.call("cudaGraphInstantiate", graph, 0))
        finally:
            self._cuda.cudaGraphDestroy(graph)

    def _forget_error(self) -> None:
        """Clear CUDA's last error: a library that asks for it would take it for its own."""
        self._cuda.cudaGetLastError()

    def free(self, function: str, handle: Any) -> None:
        """Release something; called by finalizers, so it says nothing of errors."""
        getattr(self._cuda, function)(handle)


class DeviceMemory:
    """Zeroed memory on the device, released with the object."""

    def __init__(self, device: Device, size: int) -> None:
        """Allocate `size` bytes."""
        self._device, self.size = device, size
        self.address = 0
        # CUDA gives no address for nothing.
        self.address = int(device.call("cudaMalloc", max(size, 1)))
        device.call("cudaMemsetAsync", self.address, 0, max(size, 1), device.stream)

    def __del__(self) -> None:
        if self.address:
            self._device.free("cudaFree", self.address)


class DeviceCache(KvCache[DeviceMemory]):
    """A KV cache on a device, whose first slots can be copied aside there and put back."""

    def __init__(self, device: Device, stage: Stage, *, in_place: bool) -> None:
        """Allocate it; `in_place` is whether the graph writes where it reads."""
        self._device = device
        # Heads of a tensor, bytes of one of them and of a slot of it; all tensors are alike.
        spec = cache_specs(stage)[0]
        _, self._heads, slots, width = spec.fixed_shape()
        self._slot = width * ITEM_BYTES[spec.dtype]
        self._pitch = slots * self._slot
        super().__init__(
            stage, lambda each: device.allocate(each.count_bytes()), in_place=in_place
        )

    def copy_slots(self, count: int) -> SlotCopy[DeviceMemory]:
        """A copy of the first slots on the device; see gap_runtime.backends.SlotSaver."""
        width, device = count * self._slot, self._device
        tensors = {}
        for name, memory in self.inputs(self.side).items():
            tensors[name] = device.allocate(self._heads * width)
            device.copy_rows(
                tensors[name], width, memory, self._pitch, width=width, rows=self._heads
            )
        device.synchronize()
        return SlotCopy(count=count, tensors=tensors, size=self._heads * width * len(tensors))

    def put_slots(self, saved: SlotCopy[DeviceMemory]) -> None:
        """Write slots back; see gap_runtime.backends.SlotSaver."""
        width = saved.count * self._slot
        for name, memory in self.inputs(self.side).items():
            self._device.copy_rows(
                memory, self._pitch, saved.tensors[name], width, width=width, rows=self._heads
            )
        self._device.synchronize()


class CapturedGraph:
    """Queued work that is launched as one."""

    def __init__(self, device: Device, handle: Any) -> None:
        """Take over an instantiated graph."""
        self._device, self._handle = device, handle

    def launch(self) -> None:
        """Queue it."""
        self._device.call("cudaGraphLaunch", self._handle, self._device.stream)

    def __del__(self) -> None:
        self._device.free("cudaGraphExecDestroy", self._handle)


def _import_cuda() -> ModuleType:
    for name in _MODULES:
        with contextlib.suppress(ImportError):
            return import_module(name)
    raise BackendMissingError(f"cuda-python is not installed, which reaches the GPU; {_INSTALL}")


def _describe(cuda: ModuleType, status: Any) -> str:
    found, text = cuda.cudaGetErrorString(status)
    return text.decode() if int(found) == 0 else f"error {int(status)}"
