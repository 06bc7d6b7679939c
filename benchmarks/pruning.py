"""What pruning costs in the vision graph and what it saves behind it, on the CPU.

    python -m benchmarks.pruning [--pruners cls_attention ...] [--ratios 0 0.5 0.75 0.9]
        [--checkpoint llava-185m] [--threads 1] [--markdown]

A random checkpoint (benchmarks.checkpoints) is exported once for each pruner with all ratios, in
float32. Times are medians of runs in which the ratios take turns. `choice` is the share of the
vision graph's time that goes into choosing, sorting and gathering tokens and into position IDs,
by onnxruntime's own profile; the projector, which every token needs, is not in it. `gain` is how
many times faster the prefill is than unpruned, `of ideal` that against the ratio of tokens.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime

from benchmarks.checkpoints import RUN
from benchmarks.command import (
    read_home,
    read_number,
    read_output,
    read_ratio,
    read_threads,
    run_benchmark,
    run_export,
)
from benchmarks.profile import read_kernels
from benchmarks.runtime import HOME, make_checkpoint
from benchmarks.suite import Results, format_table
from gap_runtime.backends import open_backend
from gap_runtime.bundle.bundle import Bundle
from gap_runtime.bundle.manifest import DECODER, VISION
from gap_runtime.cli.options import ArgumentParser

_TEXT: Final = 48
"""Tokens of text in a prompt."""
_TOKENS: Final = 16
_PROJECTOR: Final = "multi_modal_projector"


def export(checkpoint: Path, pruner: str, ratios: list[float], out: Path) -> None:
    """A bundle with all ratios, in float32."""
    command = [str(checkpoint)]
    for ratio in ratios:
        command += ["--ratio", str(ratio)]
    command += ["--pruner", pruner, "--no-reference", "--dtype", "float32"]
    command += ["--bring", "link", "--set", "prune.phrase=embeddings", "--out", str(out)]
    run_export(command)


def measure(folder: Path, runs: int) -> list[dict[str, Any]]:
    """A row for each ratio of a bundle."""
    bundle = Bundle.open(folder)
    backend, device = open_backend("onnxruntime:cpu")
    rng = np.random.default_rng(0)
    manifest = bundle.manifest
    entries = manifest.ratios
    stages = [manifest.stage(VISION, entry) for entry in entries]
    inputs = {
        spec.name: rng.standard_normal([int(n) for n in spec.shape], np.float32)
        for stage in stages
        for spec in stage.inputs
    }
    sessions = [backend.open_stage(bundle, stage, device) for stage in stages]

    given = [{spec.name: inputs[spec.name] for spec in stage.inputs} for stage in stages]

    def look(k: int) -> Callable[[], object]:
        return lambda: sessions[k].run(given[k])

    vision = take_turns([look(k) for k in range(len(entries))], runs)
    sessions.clear()
    decoder = backend.open_decoder(bundle, manifest.stage(DECODER), device)
    width = manifest.stage(DECODER).inputs[0].shape[-1]
    prompts = [_TEXT + entry.kept for entry in entries]
    rows = rng.standard_normal((1, max(prompts), int(width)), np.float32) * 0.02

    def read(count: int) -> Callable[[], object]:
        positions = np.arange(count)[None]
        return lambda: decoder.run(rows[:, :count], positions, 0, np.array([count - 1]))

    def step(count: int) -> Callable[[], object]:
        position = np.array([[count]])
        return lambda: [
            decoder.run(rows[:, :1], position, count, np.array([0])) for _ in range(_TOKENS)
        ]

    prefill = take_turns([read(count) for count in prompts], runs)
    decode = take_turns([step(count) for count in prompts], runs)
    cache = manifest.cache
    slot_bytes = 2 * cache.layers * cache.heads * cache.head_dim * 4
    found = []
    for k, (entry, count) in enumerate(zip(entries, prompts, strict=True)):
        gain, ideal = prefill[0] / prefill[k], prompts[0] / count
        found.append(
            {
                "ratio": entry.ratio,
                "kept": entry.kept,
                "prompt": count,
                "vision_ms": vision[k],
                "choice_share": share_of_choice(bundle.folder / stages[k].file, given[k]),
                "prefill_ms": prefill[k],
                "gain": gain,
                "of_ideal": gain / ideal,
                "token_ms": decode[k] / _TOKENS,
                "cache_mb": slot_bytes * count / 1e6,
            }
        )
    return found


def take_turns(calls: list[Callable[[], object]], runs: int) -> list[float]:
    """Median milliseconds of each call, after one that is not counted."""
    times: list[list[float]] = [[] for _ in calls]
    for run in range(runs + 1):
        for call, samples in zip(calls, times, strict=True):
            began = time.perf_counter()
            call()
            if run:
                samples.append((time.perf_counter() - began) * 1e3)
    return [statistics.median(samples) for samples in times]


def share_of_choice(path: Path, inputs: dict[str, np.ndarray], runs: int = 3) -> float:
    """Part of a vision graph's kernel time that is in the pruning stage but not its projector."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = int(os.environ["GAP_RUNTIME_THREADS"])
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        for _ in range(runs):
            session.run(None, inputs)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    kernels, _ = read_kernels(events, runs)
    # The projector's products keep their names through fusion, or begin as they do.
    chosen = sum(
        each.microseconds
        for each in kernels
        if each.name.startswith("prune.") and _PROJECTOR not in each.name
    )
    return chosen / sum(each.microseconds for each in kernels)


def print_table(rows: dict[str, dict[str, Any]], *, markdown: bool) -> None:
    """A line for each pruner and ratio."""
    names = ["pruner", "removed", "tokens", "vision, ms", "choice", "prefill, ms", "gain"]
    names += ["of ideal", "token, ms", "KV cache, MB"]
    table = [
        [
            row["pruner"],
            f"{each['ratio']:g}",
            f"{each['prompt']}",
            f"{each['vision_ms']:,.0f}",
            f"{each['choice_share']:.2%}",
            f"{each['prefill_ms']:,.0f}",
            f"{each['gain']:.2f}x",
            f"{each['of_ideal']:.2f}",
            f"{each['token_ms']:.1f}",
            f"{each['cache_mb']:.1f}",
        ]
        for row in rows.values()
        for each in row["rows"]
    ]
    print(format_table([names, *table], markdown=markdown))


def main() -> None:
    """Command line."""
    parser = ArgumentParser(description="what pruning costs and saves, on the CPU")
    parser.add_argument("--checkpoint", default="llava-185m", choices=list(RUN))
    parser.add_argument("--pruners", nargs="+", default=["cls_attention", "divprune", "visionzip"])
    parser.add_argument("--ratios", nargs="+", type=read_ratio, default=[0, 0.5, 0.75, 0.9])
    parser.add_argument("--threads", type=read_threads, default=1)
    parser.add_argument("--runs", type=read_number, default=7)
    parser.add_argument("--home", type=read_home, default=HOME)
    parser.add_argument("--out", type=read_output, default=HOME / "pruning.json")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    if options.ratios[0]:
        parser.error("--ratios: the first is what the others are compared with, expected 0")
    os.environ["GAP_RUNTIME_THREADS"] = str(options.threads)
    results = Results(options.out)
    checkpoint = make_checkpoint(options.checkpoint, options.home)
    for pruner in options.pruners:
        with tempfile.TemporaryDirectory(dir=options.home) as folder:
            out = Path(folder) / "bundle"
            export(checkpoint, pruner, options.ratios, out)
            load = os.getloadavg()[0]
            row = {"pruner": pruner, "threads": options.threads, "load_average": load}
            row["rows"] = measure(out, options.runs)
        results.put(f"{options.checkpoint}/{pruner}", row)
        print(f"{pruner}: done", flush=True)
    print(f"\n{options.checkpoint}, fp32, threads: {options.threads}\n")
    print_table(results.rows, markdown=options.markdown)
    loads = [row["load_average"] for row in results.rows.values()]
    print(f"\nload average while measuring: {min(loads):.1f} to {max(loads):.1f}")


if __name__ == "__main__":
    run_benchmark(main)
