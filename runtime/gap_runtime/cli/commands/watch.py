"""`gap-runtime watch`: ground phrases in a video, a camera or a folder of pictures."""

from __future__ import annotations

import argparse
import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gap_runtime.cli.options import (
    add_backend,
    add_bundle,
    add_count,
    add_draft,
    add_least_score,
    open_bundle,
    print_json,
    print_line,
    read_share,
)
from gap_runtime.cli.requests import STDIN as STDOUT

if TYPE_CHECKING:
    from collections.abc import Callable

    from gap_runtime.grounding.video.watch import WatchedFrame, WatchReport

SUMMARY: Final = "ground phrases in a video, a camera or a folder, frame after frame"
_INTERRUPTED: Final = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    from gap_runtime.grounding.video.change import DEFAULT_CHANGE  # noqa: PLC0415

    add_bundle(parser)
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a video, a folder of pictures, camera:0 or /dev/video0, or an address as "
        "rtsp://camera.local/stream",
    )
    parser.add_argument(
        "--phrase",
        action="append",
        required=True,
        metavar="TEXT",
        help="what to look for in every frame; give it again for more",
    )
    parser.add_argument(
        "--every", type=int, default=1, metavar="N", help="take one of N frames (default 1)"
    )
    parser.add_argument(
        "--change",
        type=read_share,
        default=DEFAULT_CHANGE,
        metavar="S",
        help="ask again where some place in the picture differs by more than S of the brightest "
        "value from the frame that was asked about last; 0 asks always (default "
        f"{DEFAULT_CHANGE})",
    )
    parser.add_argument(
        "--seconds", type=float, metavar="N", help="end when the source is N seconds on"
    )
    parser.add_argument(
        "--out", type=Path, metavar="OUT.mp4", help="write a video with the boxes (.mp4 .mov .mkv)"
    )
    parser.add_argument(
        "--jsonl",
        metavar="FILE",
        help="write a JSON line for every frame and phrase; - prints them as they come",
    )
    add_least_score(parser)
    add_count(parser)
    add_backend(parser)
    add_draft(parser)


def json_types() -> dict[str, Any]:
    """By what decides it, the type of what `--json` prints."""
    from gap_runtime.grounding.video.watch import (  # noqa: PLC0415 - libraries at first need
        FrameFacts,
        WatchSummary,
    )

    return {"--json": WatchSummary, "--jsonl, a line": FrameFacts}


def run(options: argparse.Namespace) -> int:
    """Do it; the exit code."""
    from gap_runtime.display import Display  # noqa: PLC0415 - libraries only when a command runs
    from gap_runtime.grounding.video.watch import watch  # noqa: PLC0415
    from gap_runtime.records import dump_record  # noqa: PLC0415

    display = Display()
    bundle = open_bundle(options)
    to_file = options.jsonl not in {None, STDOUT}
    reports: list[WatchReport] = []
    try:
        with (
            _stop_politely() as stop,
            display.progress(f"watching {options.source}") as show,
        ):

            def tell(frame: WatchedFrame, report: WatchReport) -> None:
                reports[:] = [report]
                show(*_describe_progress(report))
                if options.jsonl == STDOUT:
                    for line in frame.dump():
                        print(json.dumps(line, sort_keys=True), flush=True)
                elif not options.json and not to_file and not frame.is_unchanged:
                    _print_boxes(frame)

            reports[:] = [
                watch(
                    bundle,
                    options.source,
                    options.phrase,
                    options.backend,
                    ratio=options.ratio,
                    keep=options.keep,
                    draft=options.draft,
                    every=options.every,
                    change=options.change,
                    least_score=options.least_score,
                    seconds=options.seconds,
                    out=options.out,
                    jsonl=options.jsonl if to_file else None,
                    on_frame=tell,
                    stop=stop,
                )
            ]
    finally:
        # Also where the source broke off; the error comes behind it.
        for report in reports:
            display.say(_summarize(report))
            if options.json:
                print_json({**dump_record(report), "rate": report.rate})
    (report,) = reports
    # A live source ends in no other way.
    return _INTERRUPTED if report.is_stopped and not report.is_live else 0


@contextmanager
def _stop_politely() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set; the second one is an interrupt as ever."""
    stop = threading.Event()
    interrupt: Callable[..., Any] = signal.default_int_handler

    def end(number: int, _: object) -> None:
        stop.set()
        signal.signal(number, interrupt)

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {each: signal.signal(each, end) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _print_boxes(frame: WatchedFrame) -> None:
    for each in frame.found:
        for box in each.boxes:
            numbers = " ".join(f"{value:.1f}" for value in box)
            print_line(f"{frame.seconds:.3f}: {each.phrase}: {numbers}")


def _describe_progress(report: WatchReport) -> tuple[float | None, str]:
    """The share that is done, None where the end is not known, and the rate."""
    from gap_runtime.display import format_rate, format_seconds  # noqa: PLC0415

    parts = [format_seconds(report.seconds)]
    if report.rate:
        parts.append(format_rate(report.rate))
    if report.dropped:
        parts.append(f"{report.dropped} dropped")
    if report.broken:
        parts.append(f"{report.broken} broken")
    share = min(report.seconds / report.duration, 1.0) if report.duration else None
    return share, ", ".join(parts)


def _summarize(report: WatchReport) -> str:
    from gap_runtime.display import format_rate  # noqa: PLC0415

    rate = f", {format_rate(report.rate)}" if report.rate else ""
    return (
        f"{report.frames} frames of {report.seconds:.1f} s{rate}: {report.asked} asked, "
        f"{report.unchanged} unchanged; {report.dropped} dropped, {report.broken} broken"
        + ("; stopped" if report.is_stopped else "")
    )
