"""What TensorRT-RTX compiles on the machine that runs an engine, kept for the next process."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import ModuleType
from typing import Any

from gap_runtime.bundle.bundle import Bundle
from gap_runtime.bundle.engines import provider_cache
from gap_runtime.bundle.files import write_whole
from gap_runtime.errors import EngineError
from gap_runtime.records.files import read_bytes

_RUNTIME = "tensorrt-rtx"


class CompiledKernels:
    """How contexts of an RTX engine are made: all kernels ready before the first run.

    `settings` is what `create_execution_context` takes.
    """

    def __init__(self, trt: ModuleType, engine: Any, bundle: Bundle, stage: str) -> None:
        """Read what earlier processes compiled, where that is of this GPU, driver and version."""
        self.settings = engine.create_runtime_config()
        self.settings.set_execution_context_allocation_strategy(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        # By default a slow kernel serves until the right one is compiled, and a captured step
        # would keep the slow one for good.
        self.settings.dynamic_shapes_kernel_specialization_strategy = (
            trt.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        self._cache = self.settings.create_runtime_cache()
        folder = provider_cache(bundle, _RUNTIME)
        self._path: Path | None = None if folder is None else folder / f"{stage}.kernels"
        self._size = 0
        with contextlib.suppress(EngineError):
            blob = read_bytes(self._path, EngineError) if self._path else b""
            # The library proves it, and takes nothing of what is not for here.
            if blob and self._cache.deserialize(blob):
                self._size = len(blob)
        self.settings.set_runtime_cache(self._cache)

    def keep(self) -> None:
        """Write what has been compiled since; where nothing can be written, nothing is kept."""
        if self._path is None:
            return
        blob = bytes(self._cache.serialize())
        if len(blob) == self._size:
            return
        with contextlib.suppress(OSError), write_whole(self._path) as aside:
            aside.write_bytes(blob)
            self._size = len(blob)
