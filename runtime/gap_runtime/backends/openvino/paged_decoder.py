"""A decoder whose cache is pages: a call writes its rows where it is told, in place.

Slot n of the bundle's cache is row n % PAGE of page n // PAGE.
Shape letters: S rows of a call, R rows whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np

from gap_runtime.backends._calls import Calls
from gap_runtime.backends._kv_cache import SlotCopy, cache_specs, require_room
from gap_runtime.backends.openvino.memory import DTYPES, Memory, allocate, infer
from gap_runtime.backends.openvino.messages import first_words
from gap_runtime.backends.openvino.pages import KEPT_INPUTS, PAGE, OtherFormError
from gap_runtime.backends.openvino.single_row import SingleRow
from gap_runtime.bundle.manifest import Stage
from gap_runtime.bundle.tensors import MOST_LOGITS, TensorSpec
from gap_runtime.errors import EngineError


class PagedDecoder:
    """A decoder whose cache is pages of OpenVINO's own attention."""

    def __init__(
        self,
        ov: ModuleType,
        compiled: Any,
        stage: Stage,
        compile_fixed: Callable[[Mapping[str, list[int]]], Any] | None,
    ) -> None:
        """Make an empty cache.

        Args:
            ov: The library.
            compiled: The graph for any number of rows.
            stage: Its entry in the manifest.
            compile_fixed: Compiles it once more for shapes of its inputs by name; None where its
                weights are too large to lie in memory twice.

        Raises:
            OtherFormError: The compiled model wants pages of another form.
        """
        self._ov = ov
        specs = cache_specs(stage)
        self._capacity = specs[0].fixed_shape()[2]
        count = _count_pages(self._capacity)
        self._pages = {spec.name: self._allocate(compiled, spec, count) for spec in specs}
        # There is one sequence, whose pages lie one behind the other.
        self._filled, self._rows = np.zeros(1, np.int32), np.zeros(2, np.int32)
        self._end = np.zeros((), np.int32)
        # The requests' tensors are on the memory of these.
        self._places = {
            "past_lens": self._filled,
            "subsequence_begins": self._rows,
            "block_indices": np.arange(count, dtype=np.int32),
            "block_indices_begins": np.array([0, count], np.int32),
            "max_context_len": self._end,
        }
        self._calls = Calls(stage, self._bind)
        self._request = self._open_request(compiled)
        shapes = self._fix_shapes(stage)
        self._single = SingleRow(
            None if compile_fixed is None else lambda: self._open_request(compile_fixed(shapes))
        )
        self._last_rows = 0

    def fit(self, rows: int) -> int:
        """Any number of rows will do.

        Where single rows do not come between, a call of a few is filled up to the rows of the one
        before, which costs less than a change of their number.
        """
        if self._single.is_open and 1 < rows < self._last_rows <= MOST_LOGITS:
            return self._last_rows
        return rows

    def run(
        self,
        embeddings: np.ndarray,
        position_ids: np.ndarray,
        write_slot: int,
        logits_rows: np.ndarray,
    ) -> np.ndarray:
        """Logits float32 [R, V] of some rows; see gap_runtime.backends.DecoderSession."""
        rows = embeddings.shape[1]
        require_room(write_slot, rows, self._capacity)
        call = self._calls.fill(embeddings, position_ids, write_slot, logits_rows)
        self._filled[0], self._rows[1], self._end[()] = write_slot, rows, write_slot + rows
        if rows == 1 and self._single.run(call.bound):
            return call.logits
        self._last_rows = rows
        try:
            infer(self._request, call.bound)
        except RuntimeError as error:
            raise EngineError(
                f"OpenVINO could not run the decoder: {first_words(error)}"
            ) from error
        return call.logits

    def copy_slots(self, count: int) -> SlotCopy[np.ndarray]:
        """A copy of the pages of the first slots; see gap_runtime.backends.SlotSaver."""
        pages = _count_pages(count)
        tensors = {name: each.array[:pages].copy() for name, each in self._pages.items()}
        size = sum(array.nbytes for array in tensors.values())
        return SlotCopy(count=count, tensors=tensors, size=size)

    def put_slots(self, saved: SlotCopy[np.ndarray]) -> None:
        """Write pages back; see gap_runtime.backends.SlotSaver."""
        for name, each in self._pages.items():
            array = saved.tensors[name]
            each.array[: len(array)] = array

    def _open_request(self, compiled: Any) -> Any:
        """A request of a compiled graph, on the cache and on what says where a call writes."""
        request = compiled.create_infer_request()
        for name, memory in self._pages.items():
            request.set_tensor(name, memory.tensor)
        for name, array in self._places.items():
            request.set_tensor(name, self._ov.Tensor(array, shared_memory=True))
        return request

    def _fix_shapes(self, stage: Stage) -> dict[str, list[int]]:
        """Shapes of all inputs in a call of a single row, by name."""
        kept = {
            spec.name: [size if isinstance(size, int) else 1 for size in spec.shape]
            for spec in stage.inputs
            if spec.name in KEPT_INPUTS
        }
        pages = {name: list(memory.array.shape) for name, memory in self._pages.items()}
        return kept | pages | {name: list(array.shape) for name, array in self._places.items()}

    def _allocate(self, compiled: Any, spec: TensorSpec, count: int) -> Memory:
        """The pages of a tensor of the cache, in the dtype that the compiled model wants."""
        _, heads, _, width = spec.fixed_shape()
        wanted = compiled.input(spec.name)
        dtype = DTYPES.get(wanted.get_element_type().get_type_name())
        shape = wanted.get_partial_shape()
        if dtype is None or list(shape)[1:] != [heads, PAGE, width]:
            raise OtherFormError(f"pages are {wanted.get_element_type()} {shape}")
        return allocate(self._ov, (count, heads, PAGE, width), dtype)

    def _bind(self, inputs: Mapping[str, np.ndarray], logits: np.ndarray) -> dict[str, Any]:
        """OpenVINO's tensors on the memory of a call's arrays."""
        arrays = {name: inputs[name] for name in KEPT_INPUTS} | {"logits": logits}
        return {name: self._ov.Tensor(array, shared_memory=True) for name, array in arrays.items()}


def _count_pages(slots: int) -> int:
    """Pages that hold so many slots."""
    return -(-slots // PAGE)
