"""What crosses to a decoder at every call, in arrays that are made once and written in place.

The underscore keeps this file from being taken for a backend.
Shape letters: S rows of a call, R rows whose logits are wanted, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from gap_runtime.bundle.manifest import Stage
from gap_runtime.bundle.tensors import MOST_LOGITS

B = TypeVar("B")
"""What a backend has of arrays that it reads and writes in place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[B]):
    """Arrays for one number of rows and of logits, and what a backend made of them.

    `inputs` are by the name of the graph's input: `embeddings` float32 [1, S, D], `position_ids`
    int64 [axes, S], `write_slot` int64 [1] and `logits_rows` int64 [R]; `logits` is
    float32 [R, V].
    """

    inputs: dict[str, np.ndarray]
    logits: np.ndarray
    bound: B


class Calls(Generic[B]):
    """The calls of a decoder graph that take any number of rows."""

    def __init__(
        self, stage: Stage, bind: Callable[[Mapping[str, np.ndarray], np.ndarray], B]
    ) -> None:
        """Make none yet.

        Args:
            stage: The decoder's graph.
            bind: Called once with the inputs and the logits of a number of rows and of logits.
        """
        specs = {spec.name: spec for spec in (*stage.inputs, *stage.outputs)}
        self._width = int(specs["embeddings"].shape[-1])
        self._axes = int(specs["position_ids"].shape[0])
        self._vocabulary = int(specs["logits"].shape[-1])
        self._bind = bind
        self._calls: dict[tuple[int, int], Call[B]] = {}

    def fill(
        self,
        embeddings: np.ndarray,
        position_ids: np.ndarray,
        write_slot: int,
        logits_rows: np.ndarray,
    ) -> Call[B]:
        """The call for so many rows, with these values in it; see DecoderSession for them."""
        sizes = embeddings.shape[1], len(logits_rows)
        call = self._calls.get(sizes)
        if call is None:
            call = self._make(*sizes)
            # Prompts have many lengths: the buffers of the last one are kept, no more.
            self._calls = {key: c for key, c in self._calls.items() if key[0] <= MOST_LOGITS}
            self._calls[sizes] = call
        call.inputs["embeddings"][:] = embeddings
        call.inputs["position_ids"][:] = position_ids
        call.inputs["write_slot"][0] = write_slot
        call.inputs["logits_rows"][:] = logits_rows
        return call

    def _make(self, rows: int, wanted: int) -> Call[B]:
        """Arrays for a number of rows and of logits."""
        inputs: dict[str, np.ndarray] = {
            "embeddings": np.zeros((1, rows, self._width), np.float32),
            "position_ids": np.zeros((self._axes, rows), np.int64),
            "write_slot": np.zeros(1, np.int64),
            "logits_rows": np.zeros(wanted, np.int64),
        }
        logits = np.zeros((wanted, self._vocabulary), np.float32)
        return Call(inputs=inputs, logits=logits, bound=self._bind(inputs, logits))
