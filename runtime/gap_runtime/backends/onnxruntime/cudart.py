"""The CUDA runtime that onnxruntime's CUDA provider is linked with, in cuda-python's form.

The provider has loaded that library anyway, and memory and streams that both use have to be of the
same one. So nothing else needs to be installed. gap_runtime.backends._cuda.Device calls it.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from types import ModuleType, SimpleNamespace
from typing import Any, Final

_SIGNATURES: Final[dict[str, tuple[Any, ...]]] = {
    "cudaFree": (c_void_p,),
    "cudaFreeHost": (c_void_p,),
    "cudaMemcpy2DAsync": (
        *(c_void_p, c_size_t, c_void_p, c_size_t),
        *(c_size_t, c_size_t, c_int, c_void_p),
    ),
    "cudaMemcpyAsync": (c_void_p, c_void_p, c_size_t, c_int, c_void_p),
    "cudaMemsetAsync": (c_void_p, c_int, c_size_t, c_void_p),
    "cudaSetDevice": (c_int,),
    "cudaStreamSynchronize": (c_void_p,),
}
"""Functions that give an error code and nothing else, with their parameters."""
_GIVING: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "cudaDeviceGetAttribute": (c_int, (c_int, c_int)),
    "cudaGetDeviceCount": (c_int, ()),
    "cudaHostAlloc": (c_void_p, (c_size_t, c_uint)),
    "cudaMalloc": (c_void_p, (c_size_t,)),
    "cudaStreamCreateWithFlags": (c_void_p, (c_uint,)),
}
"""Functions that give a value through a pointer, their first parameter, and their other ones."""


class Cudart:
    """The functions of the library that a device, a stream, memory and copies need.

    Each gives a tuple, the error code first.
    """

    cudaDeviceAttr: Final = SimpleNamespace(  # noqa: N815 - CUDA's name
        cudaDevAttrComputeCapabilityMajor=75, cudaDevAttrComputeCapabilityMinor=76
    )
    cudaMemcpyKind: Final = SimpleNamespace(  # noqa: N815 - CUDA's name
        cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3
    )

    def __init__(self, library: Any) -> None:
        """Wrap a loaded library."""
        self._library = library
        library.cudaGetErrorString.restype = c_char_p
        library.cudaGetErrorString.argtypes = (c_int,)
        for name, parameters in _SIGNATURES.items():
            getattr(library, name).argtypes = parameters
        for name, (kind, parameters) in _GIVING.items():
            getattr(library, name).argtypes = (POINTER(kind), *parameters)

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        """A function by CUDA's name."""
        if name in _SIGNATURES:
            plain = getattr(self._library, name)
            return lambda *arguments: (plain(*arguments),)
        if name in _GIVING:
            giving, kind = getattr(self._library, name), _GIVING[name][0]

            def call(*arguments: Any) -> tuple[Any, ...]:
                value = kind()
                status = giving(byref(value), *arguments)
                return status, value.value

            return call
        raise AttributeError(name)

    def cudaGetErrorString(self, status: int) -> tuple[int, bytes]:  # noqa: N802
        """What an error code means."""
        text: bytes = self._library.cudaGetErrorString(int(status))
        return 0, text


def find_cudart(ort: ModuleType) -> Cudart | None:
    """The CUDA runtime of an onnxruntime that was built with one; None where it does not load."""
    major = str(getattr(ort, "cuda_version", "")).partition(".")[0]
    name = f"cudart64_{major}.dll" if sys.platform == "win32" else f"libcudart.so.{major}"
    if major:
        with contextlib.suppress(OSError, AttributeError):
            return Cudart(ctypes.CDLL(name))
    return None
