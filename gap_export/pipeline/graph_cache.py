"""Graphs that several exports have in common, traced once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

from gap_export.pipeline.plan import ExportPlan
from gap_export.pipeline.stages import (
    decoder_key,
    pruning_key,
    text_key,
    tower_key,
    trace_decoder,
    trace_pruning,
    trace_text,
    trace_tower,
)
from gap_export.reference.memory import WORK_BYTES
from gap_export.tracing.aside import MOST_JOBS, can_work_aside, shared_work
from gap_export.tracing.graph import Traced
from gap_runtime.bundle.manifest import RatioEntry
from gap_runtime.machines.memory import free_memory
from gap_runtime.pictures.preprocess import Bucket

_LARGE_BYTES: Final = 256 * 2**20
_ROOM: Final = 4
"""Times the memory that tracing takes at least."""


def has_room_for_two(plan: ExportPlan) -> bool:
    """Whether a copy of the process pays and fits: small models are traced beside other work."""
    is_large = plan.weights.size >= _LARGE_BYTES
    return is_large and free_memory() >= _ROOM * WORK_BYTES and can_work_aside()


class GraphCache:
    """Gives each graph that an export is made of, and traces only what it has not seen.

    A tower is the same for all exports of a model whose pruners need the same of it, CLIP's text
    tower for all of a model, a decoder for all that have as many slots and positions, a pruning
    stage only for the same choice at the same ratio. What is given is the asker's own: passes
    change it, and weights are bound to it.
    """

    def __init__(self, *, keeps: bool = True) -> None:
        """Nothing is known yet.

        Args:
            keeps: Whether graphs will be asked for again; else each is given away, not copied.
        """
        self._keeps = keeps
        self._known: dict[tuple[object, ...], Traced] = {}

    def tower(self, plan: ExportPlan, bucket: Bucket) -> Traced:
        """See `trace_tower`."""
        return self._find(tower_key(plan, bucket), partial(trace_tower, plan, bucket))

    def pruning(self, plan: ExportPlan, entry: RatioEntry) -> Traced:
        """See `trace_pruning`."""
        return self._find(pruning_key(plan, entry), partial(trace_pruning, plan, entry))

    def text(self, plan: ExportPlan) -> Traced:
        """See `trace_text`."""
        return self._find(text_key(plan), partial(trace_text, plan))

    def decoder(self, plan: ExportPlan) -> Traced:
        """See `trace_decoder`."""
        return self._find(decoder_key(plan), partial(trace_decoder, plan))

    @contextlib.contextmanager
    def traced_by_two(self, plan: ExportPlan) -> Iterator[Callable[[], int]]:
        """Begin to trace the graphs of an export that are not known in a copy of this process.

        Yields:
            What takes part in the work; then all are known. It gives how many were traced.
        """
        jobs: dict[tuple[object, ...], Callable[[], Traced]] = {
            tower_key(plan, bucket): partial(trace_tower, plan, bucket)
            for bucket in plan.spec.buckets
        }
        jobs[decoder_key(plan)] = partial(trace_decoder, plan)
        if plan.reads_clip:
            jobs[text_key(plan)] = partial(trace_text, plan)
        jobs |= {
            pruning_key(plan, entry): partial(trace_pruning, plan, entry) for entry in plan.entries
        }
        missing = [key for key in jobs if key not in self._known][:MOST_JOBS]
        with shared_work([jobs[key] for key in missing]) as finish:

            def learn() -> int:
                self._known |= dict(zip(missing, finish(), strict=True))
                return len(missing)

            yield learn

    def _find(self, key: tuple[object, ...], trace: Callable[[], Traced]) -> Traced:
        if key not in self._known:
            self._known[key] = trace()
        return self._known[key].copy() if self._keeps else self._known.pop(key)
