"""Milliseconds of each stage at each ratio and bucket of a bundle, after a warm-up."""

from __future__ import annotations

import os
import statistics
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image

from gap_runtime.backends import DEFAULT_BACKEND
from gap_runtime.bundle.bundle import Bundle
from gap_runtime.bundle.hashes import Begin, begin_silently
from gap_runtime.bundle.manifest import RatioEntry
from gap_runtime.grounding.fastest import choose_backend
from gap_runtime.grounding.grounder import Grounder, StageValues
from gap_runtime.machines.gauges import DevicePeak, Meter, Power
from gap_runtime.machines.memory import read_peak_mib
from gap_runtime.pictures.load import fitting_size
from gap_runtime.pictures.preprocess import Bucket

_TOKENS: Final = 16
_FIRST: Final = "the red circle"
_FURTHER: Final = "a green ring"
"""Without a word of the first: what two phrases begin with alike is not computed again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRow:
    """Medians at one ratio of a bucket. `prompt` counts the slots of the longest prompt.

    A request is a picture with its first phrase, to the end of the answer, with drafts unless they
    are off: `request_p50_ms` and `request_p95_ms` are percentiles of it.

    `prefill_ms` is that of the first phrase of a picture, `further_ms` that of another one, for
    which the picture is known. `token_ms` is a step of one token. An answer of `tokens` took
    `answer_ms` behind its prefill, by `calls` of the decoder, the prefill among them, which held
    `drafted` tokens, of which `accepted` turned out right.
    """

    ratio: float
    bucket: str
    kept: int
    patches: int
    prompt: int
    preprocess_ms: float
    vision_ms: float
    prefill_ms: float
    further_ms: float
    token_ms: float
    tokens_per_second: float
    answer_ms: float
    tokens: int
    calls: int
    drafted: int
    accepted: int
    request_p50_ms: float
    request_p95_ms: float


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class BenchReport:
    """Rows by ratio and what they were measured on.

    `peak_memory_mib` is the most that this process had resident since it began, None where the
    system does not say; what lies on a GPU is not in it. That is in `device_memory`, and what was
    drawn in the timed runs in `power`. Both are empty where the system says nothing.
    """

    bundle: str
    backend: str
    warmup: int
    runs: int
    peak_memory_mib: float | None
    device_memory: tuple[DevicePeak, ...]
    power: tuple[Power, ...]
    cores: int
    load_average: float | None
    """Of the minute before the end; None where the system counts none (Windows)."""
    rows: tuple[BenchRow, ...]

    def __repr__(self) -> str:
        """A request at each ratio, on one line."""
        said = ", ".join(f"{row.request_p50_ms:.1f} ms at {row.ratio:g}" for row in self.rows)
        return f"BenchReport({self.backend}: {said})"


def bench_bundle(
    bundle: Bundle,
    backend: str = DEFAULT_BACKEND,
    *,
    runs: int = 7,
    warmup: int = 2,
    ratios: Collection[float] | None = None,
    draft: bool = True,
    begin: Begin = begin_silently,
) -> BenchReport:
    """Time every ratio of a bundle, the ratios taking turns so that drift hits all alike.

    Args:
        bundle: An opened bundle with a tokenizer.
        backend: As in Grounder.
        runs: Timed runs per ratio and bucket.
        warmup: Untimed runs before them.
        ratios: Those of the bundle's that are timed; all by default.
        draft: As in Grounder.
        begin: Shows how far it is; is told the number of runs, and of each one.
    """
    backend = choose_backend(bundle, backend)
    pictures = {bucket.name: _noise(bundle, bucket) for bucket in bundle.manifest.buckets}
    entries = [each for each in bundle.manifest.ratios if ratios is None or each.ratio in ratios]
    runs_of: list[list[_Run]] = [[] for _ in entries]
    most = min(_TOKENS, bundle.manifest.layout.answer)
    with (
        Grounder(bundle, backend, draft=draft, keep_pictures=0) as grounder,
        begin((warmup + runs) * len(entries)) as note,
        Meter() as meter,
    ):
        for run in range(warmup + runs):
            if run == warmup:
                meter.begin()
            for entry, samples in zip(entries, runs_of, strict=True):
                view = grounder.look(pictures[entry.bucket])
                sample = _Run(
                    first=grounder.run_stages(view, _FIRST, entry),
                    further=grounder.run_stages(view, _FURTHER, entry, most=1),
                    steps=grounder.run_stages(view, _FIRST, entry, most=most, draft=False),
                )
                if run >= warmup:
                    samples.append(sample)
                note(1)
    rows = tuple(
        _make_row(bundle, entry, samples, most)
        for entry, samples in zip(entries, runs_of, strict=True)
    )
    return BenchReport(
        bundle=str(bundle.folder),
        backend=backend,
        warmup=warmup,
        runs=runs,
        peak_memory_mib=read_peak_mib(),
        device_memory=meter.memory,
        power=meter.power,
        cores=os.cpu_count() or 1,
        load_average=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        rows=rows,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """A first phrase with its answer, a further one, and so many steps without drafts."""

    first: StageValues
    further: StageValues
    steps: StageValues


def request_ms(report: BenchReport) -> float:
    """Milliseconds of a request, picture to answer, as the sum over all rows of a report."""
    return sum(
        row.preprocess_ms + row.vision_ms + row.prefill_ms + (_TOKENS - 1) * row.token_ms
        for row in report.rows
    )


def _noise(bundle: Bundle, bucket: Bucket) -> Image.Image:
    """A picture that fits a bucket."""
    width, height = fitting_size(bucket, bundle.manifest.preprocess)
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def _make_row(bundle: Bundle, entry: RatioEntry, runs: list[_Run], most: int) -> BenchRow:
    def median(values: Iterable[StageValues], stage: str) -> float:
        return statistics.median(each.milliseconds[stage] for each in values)

    firsts = [run.first for run in runs]
    requests = [each.milliseconds["total"] for each in firsts]
    # The first answer token comes with the prefill.
    token_ms = median((run.steps for run in runs), "decode") / max(most - 1, 1)
    answer = firsts[-1].decoded
    return BenchRow(
        ratio=entry.ratio,
        bucket=entry.bucket,
        kept=entry.kept,
        patches=entry.patches,
        prompt=bundle.manifest.layout.at(entry).prompt,
        preprocess_ms=median(firsts, "preprocess"),
        vision_ms=median(firsts, "vision"),
        prefill_ms=median(firsts, "prefill"),
        further_ms=median((run.further for run in runs), "prefill"),
        token_ms=token_ms,
        tokens_per_second=1e3 / token_ms if token_ms else 0.0,
        answer_ms=median(firsts, "decode"),
        tokens=len(answer.token_ids),
        calls=answer.calls,
        drafted=answer.drafted,
        accepted=answer.accepted,
        request_p50_ms=float(np.percentile(requests, 50)),
        request_p95_ms=float(np.percentile(requests, 95)),
    )
