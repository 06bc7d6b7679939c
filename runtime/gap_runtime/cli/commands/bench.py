"""`gap-runtime bench`: time every stage at every ratio."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from gap_runtime.cli.options import (
    add_backend,
    add_bundle,
    add_chosen_counts,
    add_draft,
    open_bundle,
    print_json,
    print_line,
)
from gap_runtime.errors import ConfigError

if TYPE_CHECKING:
    from gap_runtime.display import Display

SUMMARY: Final = "time every stage at every ratio"
_MOST_RUNS: Final = 1_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_bundle(parser)
    add_chosen_counts(parser)
    parser.add_argument("--runs", type=int, default=7, help="timed runs per ratio (default 7)")
    parser.add_argument(
        "--warmup", type=int, default=2, help="untimed runs before them (default 2)"
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="time a request on every backend that is there; --backend auto takes the fastest",
    )
    add_backend(parser)
    add_draft(parser)


def json_types() -> dict[str, Any]:
    """By what decides it, the type of what `--json` prints."""
    from gap_runtime.grounding.bench import BenchReport  # noqa: PLC0415 - numpy at first need
    from gap_runtime.grounding.fastest import Timed  # noqa: PLC0415

    return {"--json": BenchReport, "--json --all": tuple[Timed, ...]}


def run(options: argparse.Namespace) -> int:
    """Do it; the exit code."""
    from gap_runtime.display import Display  # noqa: PLC0415
    from gap_runtime.grounding.bench import bench_bundle  # noqa: PLC0415
    from gap_runtime.records import dump_record  # noqa: PLC0415

    for name, count, least in (("runs", options.runs, 1), ("warmup", options.warmup, 0)):
        if count < least:
            raise ConfigError(f"--{name} {count}: at least {least} is needed")
        if count > _MOST_RUNS:
            raise ConfigError(f"--{name} {count}: at most {_MOST_RUNS:,} are made")
    display = Display()
    if options.all:
        return _time_all(options, display)
    bundle = open_bundle(options)
    report = bench_bundle(
        bundle,
        options.backend,
        runs=options.runs,
        warmup=options.warmup,
        ratios=bundle.choose_ratios(options.ratios, options.keep),
        draft=options.draft,
        begin=partial(display.count, "timing", "runs"),
    )
    if options.json:
        print_json(dump_record(report))
        return 0
    for row in report.rows:
        bucket = f"{row.bucket}, " if row.bucket else ""
        print(
            f"ratio {row.ratio:g} ({bucket}{row.kept} of {row.patches}): "
            f"vision {row.vision_ms:.1f} ms, prefill of {row.prompt} {row.prefill_ms:.1f} ms, "
            f"of a further phrase {row.further_ms:.1f} ms, "
            f"token {row.token_ms:.2f} ms ({row.tokens_per_second:.0f}/s), "
            f"answer of {row.tokens} tokens {row.answer_ms:.1f} ms by {row.calls} calls "
            f"({row.accepted} of {row.drafted} drafted tokens right); "
            f"request p50 {row.request_p50_ms:.1f} ms, p95 {row.request_p95_ms:.1f} ms"
        )
    if report.peak_memory_mib is not None:
        print(f"peak memory {report.peak_memory_mib:.0f} MiB")
    for held in report.device_memory:
        print_line(f"peak memory of {held.name} ({held.source}) {held.peak_mib:.0f} MiB")
    for power in report.power:
        print_line(f"power of {power.name} ({power.source}) {power.watts:.2f} W")
    return 0


def _time_all(options: argparse.Namespace, display: Display) -> int:
    """A line for every backend, the fastest first."""
    from gap_runtime.grounding.bench import bench_bundle, request_ms  # noqa: PLC0415
    from gap_runtime.grounding.fastest import time_backends  # noqa: PLC0415
    from gap_runtime.records import dump_record  # noqa: PLC0415

    bundle = open_bundle(options)
    ratios = bundle.choose_ratios(options.ratios, options.keep)

    def measure(backend: str) -> float:
        begin = partial(display.count, f"timing {backend}", "runs")
        return request_ms(
            bench_bundle(bundle, backend, runs=options.runs, ratios=ratios, begin=begin)
        )

    timed = time_backends(bundle, measure)
    if options.json:
        print_json(dump_record(timed))
        return 0
    for each in timed:
        if each.milliseconds is None:
            print_line(f"{each.backend}: {each.problem}")
        else:
            print(f"{each.backend}: {each.milliseconds:.1f} ms")
    display.say(f"--backend auto takes {timed[0].backend} for this bundle from now on")
    return 0
