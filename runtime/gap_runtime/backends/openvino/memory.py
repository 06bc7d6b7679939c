"""Memory as numpy and as OpenVINO see it: a decoder's cache, and what a call reads and writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

import numpy as np

DTYPES: Final = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "i64": "int64"}
"""Dtypes by OpenVINO's words; others are not told apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """An array of the cache, bfloat16 as uint16, and OpenVINO's tensor on the same memory."""

    array: np.ndarray
    tensor: Any


def allocate(ov: ModuleType, shape: Sequence[int], dtype: str) -> Memory:
    """Zeros of a manifest's dtype."""
    if dtype == "bfloat16":
        # numpy has none: the array holds its bits.
        array = np.zeros(shape, np.uint16)
        tensor = ov.Tensor(array, ov.Shape(shape), ov.Type.bf16)
    else:
        array = np.zeros(shape, dtype)
        tensor = ov.Tensor(array, shared_memory=True)
    return Memory(array=array, tensor=tensor)


def infer(request: Any, tensors: Mapping[str, Any]) -> None:
    """Run a graph with these tensors, by name, beside those that are bound to the request already.

    Raises:
        RuntimeError: OpenVINO cannot run it.
    """
    for name, tensor in tensors.items():
        request.set_tensor(name, tensor)
    request.infer()
