"""Where the time of a decode step or of a prefill goes: by operator, and outside onnxruntime.

    python -m benchmarks.profile BUNDLE [--rows 1] [--slots 336] [--runs 64] [--threads 1]
        [--folded step.txt] [--markdown]

The decoder runs as gap_runtime runs it, on the CPU, with onnxruntime's own profile. `--rows 1` is
a step behind `--slots` of the cache, more rows are a prefill. `between nodes` is onnxruntime's
time outside its kernels, `outside onnxruntime` all that Python does: the row of the embedding
table, the inputs, the most likely token. `--folded` writes stacks by module, a line each with its
microseconds, which flame graphs are drawn from (speedscope, flamegraph.pl).
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from unittest import mock

import numpy as np
import onnxruntime

from benchmarks.command import read_count, read_number, read_output, read_threads, run_benchmark
from benchmarks.runtime import HOME
from benchmarks.suite import Results, format_table
from gap_runtime.backends import open_backend
from gap_runtime.bundle.bundle import Bundle, embedding_rows
from gap_runtime.bundle.files import require_apart
from gap_runtime.bundle.manifest import DECODER
from gap_runtime.cli.options import ArgumentParser
from gap_runtime.errors import ConfigError

_WARM: Final = 3
_BETWEEN: Final = "between nodes"
_OUTSIDE: Final = "outside onnxruntime"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A node that ran once: its name, its operator, and microseconds."""

    name: str
    operator: str
    microseconds: int

    @property
    def module(self) -> str:
        """Path of the module that it comes from; empty where it is of none."""
        return self.name.rpartition("/")[0]


def record(
    folder: Path, *, rows: int, slots: int, runs: int
) -> tuple[list[dict[str, Any]], list[float]]:
    """Events of onnxruntime's profile, and microseconds of every run as Python sees it."""
    bundle = Bundle.open(folder)
    first = 0 if rows > 1 else slots
    capacity = bundle.manifest.layout.capacity
    if first + rows > capacity:
        raise ConfigError(f"{rows} rows behind {first} slots: the cache has {capacity}")
    backend, device = open_backend("onnxruntime:cpu")
    with tempfile.TemporaryDirectory() as aside:

        class Profiled(onnxruntime.SessionOptions):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.enable_profiling = True
                self.profile_file_prefix = str(Path(aside) / "profile")

        with mock.patch.object(onnxruntime, "SessionOptions", Profiled):
            decoder = backend.open_decoder(bundle, bundle.manifest.stage(DECODER), device)
        table = bundle.map_embedding()
        positions = np.arange(first, first + rows)[None]
        token_ids, times = [1] * rows, []
        for _ in range(_WARM + runs):
            began = time.perf_counter()
            embeddings = embedding_rows(table, token_ids)[None]
            token = int(decoder.run(embeddings, positions, first, np.array([rows - 1])).argmax())
            times.append((time.perf_counter() - began) * 1e6)
            token_ids = [*token_ids[1:], token]
        # The backend's session is its own; nothing else needs its profile.
        path = decoder._session.end_profiling()  # type: ignore[attr-defined]  # noqa: SLF001
        events: list[dict[str, Any]] = json.loads(Path(path).read_text(encoding="utf-8"))
    return events, times[_WARM:]


def read_kernels(events: list[dict[str, Any]], runs: int) -> tuple[list[Kernel], int]:
    """Kernels of the last runs, and microseconds of these runs by onnxruntime's own clock."""
    whole = [event for event in events if event["name"] == "model_run"][-runs:]
    kernels = []
    for event in events:
        name = event["name"].removesuffix("_kernel_time")
        is_kernel = event.get("cat") == "Node" and name != event["name"]
        if is_kernel and event["ts"] >= whole[0]["ts"]:
            operator = event["args"]["op_name"]
            kernels.append(Kernel(name=name, operator=operator, microseconds=event["dur"]))
    return kernels, sum(event["dur"] for event in whole)


def fold(kernels: Iterable[Kernel], between: float, outside: float) -> list[str]:
    """Stacks with their microseconds: modules from the decoder down to the operator."""
    stacks: Counter[str] = Counter()
    for each in kernels:
        # A layer and its number are one frame.
        modules = re.sub(r"\.(\d+)", r" \1", each.module).split(".") if each.module else []
        stacks[";".join(["run", "onnxruntime", *modules, each.operator])] += each.microseconds
    stacks[f"run;onnxruntime;{_BETWEEN}"] += round(between)
    stacks[f"run;{_OUTSIDE}"] += round(outside)
    return [f"{stack} {microseconds}" for stack, microseconds in sorted(stacks.items())]


def main() -> None:
    """Command line."""
    parser = ArgumentParser(description="where the time of the decoder goes, on the CPU")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rows", type=read_number, default=1, help="1: a step; more: a prefill")
    parser.add_argument("--slots", type=read_count, default=336, help="of the cache behind a step")
    parser.add_argument("--runs", type=read_number, default=64)
    parser.add_argument("--threads", type=read_threads, default=1)
    parser.add_argument("--folded", type=read_output, help="file for stacks of flame graphs")
    parser.add_argument("--out", type=read_output, default=HOME / "profile.json")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    os.environ["GAP_RUNTIME_THREADS"] = str(options.threads)
    for name, path in (("--out", options.out), ("--folded", options.folded)):
        if path is not None:
            require_apart(path, [options.bundle], name)
    load, runs = os.getloadavg()[0], options.runs
    events, times = record(options.bundle, rows=options.rows, slots=options.slots, runs=runs)
    kernels, inside = read_kernels(events, runs)
    total, spent, counts = sum(times), Counter[str](), Counter[str]()
    for each in kernels:
        spent[each.operator] += each.microseconds
        counts[each.operator] += 1
    between, outside = inside - sum(spent.values()), total - inside
    rows = [
        {"operator": name, "nodes": counts[name] / runs, "ms": part / runs / 1e3}
        for name, part in spent.most_common()
    ]
    rows += [
        {"operator": name, "nodes": None, "ms": part / runs / 1e3}
        for name, part in ((_BETWEEN, between), (_OUTSIDE, outside))
    ]
    settings = {"rows": options.rows, "slots": options.slots, "threads": options.threads}
    key = f"{options.bundle}/{options.rows}/{options.slots}/{options.threads}"
    Results(options.out).put(key, settings | {"load_average": load, "operators": rows})
    if options.folded is not None:
        text = "\n".join(fold(kernels, between, outside)) + "\n"
        options.folded.write_text(text, encoding="utf-8")
    table = [["", "nodes", "ms", "share"]]
    for row in rows:
        nodes = "" if row["nodes"] is None else f"{row['nodes']:g}"
        share = row["ms"] * runs * 1e3 / total
        table.append([row["operator"], nodes, f"{row['ms']:.3f}", f"{share:.2%}"])
    table.append(["a run", "", f"{total / runs / 1e3:.3f}", "100%"])
    print(format_table(table, markdown=options.markdown))
    print(f"\nload average before measuring: {load:.1f}")


if __name__ == "__main__":
    run_benchmark(main)
