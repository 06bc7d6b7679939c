"""A decoder whose cache is OpenVINO's states: rows are put behind those that are there.

What a state holds cannot be written over. Rows of a refused draft stay, and a mask hides them;
where many would be hidden, the states are written anew without them.

Behind columns that are there, the plugin's attention goes row by row. So a prompt whose beginning
(the text before the picture) is shorter than the rest of it is run as a whole.
Shape letters: S rows of a call, R rows whose logits are wanted, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any, Final

import numpy as np

from gap_runtime.backends._calls import Calls
from gap_runtime.backends._kv_cache import SlotCopy, cache_specs
from gap_runtime.backends.openvino.messages import first_words
from gap_runtime.backends.openvino.states import BEAMS, KEPT_INPUTS, MASK
from gap_runtime.bundle.manifest import Stage
from gap_runtime.errors import EngineError

_ROWS: Final = ("embeddings", "position_ids")
_MOST_HIDDEN: Final = 64
"""Columns that a mask hides before the states are written without them, which takes as long as
several steps."""


class StateDecoder:
    """A decoder whose cache is states; slots of the bundle's cache are columns of theirs."""

    def __init__(self, ov: ModuleType, compiled: Any, stage: Stage) -> None:
        """Begin with an empty cache."""
        self._ov = ov
        self._request = compiled.create_infer_request()
        self._states = {each.name: each for each in self._request.query_state()}
        self._names = [spec.name for spec in cache_specs(stage)]
        self._request.set_tensor(BEAMS, ov.Tensor(np.zeros(1, np.int32)))
        self._calls = Calls(stage, self._bind)
        self._columns: list[int] = []
        """The column of each slot."""
        self._count = 0
        """Columns of the states."""
        self._prompt: dict[str, np.ndarray] = {}
        """Rows of the first slots: `embeddings` [1, n, D] and `position_ids` [axes, n]."""

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
        self._drop_behind(write_slot)
        if 0 < write_slot == self._known < embeddings.shape[1]:
            embeddings = np.concatenate([self._prompt["embeddings"], embeddings], axis=1)
            position_ids = np.concatenate([self._prompt["position_ids"], position_ids], axis=1)
            write_slot, logits_rows = 0, logits_rows + write_slot
            self._drop_behind(0)
        call = self._calls.fill(embeddings, position_ids, write_slot, logits_rows)
        rows = embeddings.shape[1]
        mask = self._make_mask(rows)
        try:
            for name, tensor in call.bound.items():
                self._request.set_tensor(name, tensor)
            self._request.set_tensor(MASK, self._ov.Tensor(mask, shared_memory=True))
            self._request.infer()
        except RuntimeError as error:
            raise EngineError(
                f"OpenVINO could not run the decoder: {first_words(error)}"
            ) from error
        self._columns += range(self._count, self._count + rows)
        self._count += rows
        if not write_slot:
            self._prompt = {name: call.inputs[name].copy() for name in _ROWS}
        return call.logits

    def copy_slots(self, count: int) -> SlotCopy[np.ndarray]:
        """A copy of the first slots; see gap_runtime.backends.SlotSaver."""
        columns = self._columns[:count]
        tensors = {name: self._states[name].state.data[:, :, columns] for name in self._names}
        tensors |= {name: rows[:, :count].copy() for name, rows in self._prompt.items()}
        size = sum(array.nbytes for array in tensors.values())
        return SlotCopy(count=count, tensors=tensors, size=size)

    def put_slots(self, saved: SlotCopy[np.ndarray]) -> None:
        """Write slots back; see gap_runtime.backends.SlotSaver."""
        for name in self._names:
            self._states[name].state = self._ov.Tensor(saved.tensors[name])
        self._prompt = {name: saved.tensors[name] for name in _ROWS if name in saved.tensors}
        self._columns, self._count = list(range(saved.count)), saved.count

    @property
    def _known(self) -> int:
        """The first slots whose rows are known."""
        return self._prompt["embeddings"].shape[1] if self._prompt else 0

    def _drop_behind(self, slot: int) -> None:
        """Forget the slots from one on."""
        del self._columns[slot:]
        self._prompt = {name: rows[:, :slot] for name, rows in self._prompt.items()}
        if not slot:
            self._request.reset_state()
            self._count = 0
        elif self._count - slot > _MOST_HIDDEN:
            self.put_slots(self.copy_slots(slot))

    def _make_mask(self, rows: int) -> np.ndarray:
        """What each row does not see: dropped columns, and rows that come after it."""
        hidden = np.finfo(np.float32).min
        mask = np.full((1, 1, rows, self._count + rows), hidden, np.float32)
        mask[..., self._columns] = 0
        mask[..., self._count :] = np.triu(np.full((rows, rows), hidden), 1)
        return mask

    def _bind(self, inputs: Mapping[str, np.ndarray], logits: np.ndarray) -> dict[str, Any]:
        """OpenVINO's tensors on the memory of a call's arrays."""
        arrays = {name: inputs[name] for name in KEPT_INPUTS} | {"logits": logits}
        return {name: self._ov.Tensor(array, shared_memory=True) for name, array in arrays.items()}
