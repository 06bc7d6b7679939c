"""Milliseconds of each stage at each ratio of a bundle: medians after a warm-up."""

from __future__ import annotations

import os
import statistics
from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image

from gap_runtime.bundle import Bundle
from gap_runtime.grounder import DEFAULT_BACKEND, Grounder
from gap_runtime.manifest import RatioEntry

_TOKENS: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRow:
    """Medians at one ratio. `prompt` counts the slots of the padded prefill."""

    ratio: float
    kept: int
    patches: int
    prompt: int
    preprocess_ms: float
    vision_ms: float
    prefill_ms: float
    token_ms: float
    tokens_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchReport:
    """Rows by ratio and what they were measured on."""

    bundle: str
    backend: str
    runs: int
    cores: int
    load_average: float
    rows: tuple[BenchRow, ...]


def bench_bundle(
    bundle: Bundle, backend: str = DEFAULT_BACKEND, *, runs: int = 7, warmup: int = 2
) -> BenchReport:
    """Time every ratio of a bundle, the ratios taking turns so that drift hits all alike.

    Args:
        bundle: An opened bundle with a tokenizer.
        backend: As in Grounder.
        runs: Timed runs per ratio.
        warmup: Untimed runs per ratio before them.
    """
    grounder = Grounder(bundle, backend)
    side = bundle.manifest.preprocess.side
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    entries = bundle.manifest.ratios
    times: dict[float, list[dict[str, float]]] = {entry.ratio: [] for entry in entries}
    most = min(_TOKENS, bundle.manifest.layout.answer)
    for run in range(warmup + runs):
        for entry in entries:
            values = grounder.run_stages(picture, "the red circle", entry, most=most)
            if run >= warmup:
                times[entry.ratio].append(values.milliseconds)
    rows = tuple(_make_row(bundle, entry, times[entry.ratio], most) for entry in entries)
    return BenchReport(
        bundle=str(bundle.folder),
        backend=backend,
        runs=runs,
        cores=os.cpu_count() or 1,
        load_average=os.getloadavg()[0],
        rows=rows,
    )


def _make_row(
    bundle: Bundle, entry: RatioEntry, times: list[dict[str, float]], most: int
) -> BenchRow:
    def median(stage: str) -> float:
        return statistics.median(sample[stage] for sample in times)

    # The first answer token comes with the prefill.
    token_ms = median("decode") / max(most - 1, 1)
    return BenchRow(
        ratio=entry.ratio,
        kept=entry.kept,
        patches=entry.patches,
        prompt=bundle.manifest.layout.at(entry.kept).prompt,
        preprocess_ms=median("preprocess"),
        vision_ms=median("vision"),
        prefill_ms=median("prefill"),
        token_ms=token_ms,
        tokens_per_second=1e3 / token_ms if token_ms else 0.0,
    )
