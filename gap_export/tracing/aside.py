"""Graphs traced by two processes, one of which is a copy of the other made for it.

Tracing is Python on one core. Where a command has a second core, a copy of its process takes
graphs from the same list, and sends them back as bytes:

    graphs 0 1 2 3 4   the process:  0  2  4
                       its copy:     1  3

Each takes the next graph that nobody has. What the copy cannot do, for whatever reason, the
process does itself, so its errors are those of tracing in one process.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Final, TypeAlias

import onnx
import onnx_ir as ir

from gap_export.tracing.graph import Traced
from gap_export.tracing.process_copy import ProcessCopy

Job: TypeAlias = Callable[[], Traced]
MOST_JOBS: Final = 255
"""As many as a byte can name."""
PATIENCE_SECONDS: Final = 300.0
"""How long the copy's last graph may take once the process has done its own."""


def can_work_aside() -> bool:
    """Whether a copy of this process can be made, and has a core of its own to run on.

    Locks that other threads hold would be held for ever in a copy.
    """
    has_cores = hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) > 1
    return has_cores and threading.active_count() == 1


@contextlib.contextmanager
def shared_work(jobs: Sequence[Job]) -> Iterator[Callable[[], list[Traced]]]:
    """Begin to trace graphs in a copy of this process.

    Args:
        jobs: Each traces a graph; at most 255.

    Yields:
        What takes part in the work, and gives all graphs in the order of the jobs.
    """
    assert len(jobs) <= MOST_JOBS, len(jobs)
    turns = _lay_out_turns(len(jobs))

    def pack_all() -> list[dict[int, bytes]]:
        return [{number: _pack(each) for number, each in _take_turns(turns, jobs).items()}]

    with ProcessCopy(pack_all, needs=[turns]) as copy:

        def finish() -> list[Traced]:
            done = _take_turns(turns, jobs)
            sent: dict[int, bytes] = next(copy.receive(PATIENCE_SECONDS), {})
            done |= {number: _unpack(each) for number, each in sent.items()}
            return [done[k] if k in done else job() for k, job in enumerate(jobs)]

        try:
            yield finish
        finally:
            os.close(turns)


def _lay_out_turns(count: int) -> int:
    """What to read turns from, as bytes; without a writer it ends behind the last."""
    turns, begin = os.pipe()
    os.write(begin, bytes(range(count)))
    os.close(begin)
    return turns


def _take_turns(turns: int, jobs: Sequence[Job]) -> dict[int, Traced]:
    """Do the next job that nobody has taken, until none is left."""
    done = {}
    while turn := os.read(turns, 1):
        done[turn[0]] = jobs[turn[0]]()
    return done


def _pack(traced: Traced) -> bytes:
    """A graph, which is used up, as bytes; initializers without values go as inputs in ONNX."""
    graph = traced.model.graph
    order = list(graph.initializers)
    empty = [value for value in graph.initializers.values() if value.const_value is None]
    for value in empty:
        del graph.initializers[value.name]  # type: ignore[arg-type]
        graph.inputs.append(value)
    written = ir.to_proto(traced.model).SerializeToString()
    about = replace(traced, model=None)  # type: ignore[arg-type]
    return pickle.dumps((about, written, order, len(empty)))


def _unpack(data: bytes) -> Traced:
    """The graph that `_pack` wrote."""
    about, written, order, count = pickle.loads(data)  # noqa: S301 - from `_pack`
    model = ir.from_proto(onnx.ModelProto.FromString(written))
    graph = model.graph
    known = {value.name: value for value in graph.initializers.values()}
    known |= {value.name: value for value in graph.inputs[len(graph.inputs) - count :]}
    # One by one: what is taken out as a slice would still be called an input.
    for _ in range(count):
        graph.inputs.pop()
    graph.initializers.clear()
    graph.initializers.update({name: known[name] for name in order})
    traced: Traced = replace(about, model=model)
    return traced
