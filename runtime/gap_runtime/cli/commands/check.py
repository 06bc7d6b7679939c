"""`gap-runtime check`: compare with PyTorch's recorded answers."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gap_runtime.cli.options import (
    add_backend,
    add_bundle,
    add_chosen_counts,
    open_bundle,
    print_json,
)
from gap_runtime.errors import CheckError

if TYPE_CHECKING:
    from gap_runtime.display import Display

SUMMARY: Final = "compare with PyTorch's recorded answers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_bundle(parser)
    add_chosen_counts(parser)
    add_backend(parser)
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write the report as one page with pictures"
    )


def json_types() -> dict[str, Any]:
    """By what decides it, the type of what `--json` prints."""
    from gap_runtime.grounding.check import CheckReport  # noqa: PLC0415 - numpy at first need

    return {"--json": CheckReport}


def run(options: argparse.Namespace) -> int:
    """Do it; the exit code."""
    from gap_runtime.display import Display  # noqa: PLC0415
    from gap_runtime.grounding.boxless import describe_boxless  # noqa: PLC0415
    from gap_runtime.grounding.check import Compared, check_bundle, count_rows  # noqa: PLC0415
    from gap_runtime.records import dump_record  # noqa: PLC0415
    from gap_runtime.report.check_page import make_check_page  # noqa: PLC0415
    from gap_runtime.report.occasion import note_occasion  # noqa: PLC0415
    from gap_runtime.report.page import require_writable, write_page  # noqa: PLC0415

    if options.html is not None:
        require_writable(options.html)
    display = Display()
    begin = partial(display.count, "checking files", "bytes")
    bundle = open_bundle(options, verify_all=True, begin=begin)
    ratios = bundle.choose_ratios(options.ratios, options.keep)
    compared: list[Compared] = []
    rows = count_rows(bundle, ratios)
    with display.count("comparing with PyTorch's answers", "answers", rows) as pace:

        def note(found: Compared) -> None:
            compared.append(found)
            pace(1)

        report = check_bundle(bundle, options.backend, ratios=ratios, on_compared=note)
    if options.html is not None:
        page = make_check_page(bundle, report, compared, note_occasion(bundle))
        write_page(options.html, page)
        display.say(f"report: {options.html}")
    if options.json:
        print_json(dump_record(report))
    else:
        _show(display, report)
        _show_drafts(display, report)
        print("passed" if report.passed else "failed")
    if boxless := describe_boxless(report.pytorch_boxes):
        display.say(boxless)
    if not report.passed:
        failed = [row for row in report.rows if not row.passed]
        message = (
            f"{len(failed)} of {len(report.rows)} rows differ from PyTorch; first: "
            f"{failed[0].sample} at ratio {failed[0].ratio:g}: {'; '.join(failed[0].reasons)}"
        )
        print(f"error: {message}", file=sys.stderr)
        return CheckError.exit_code
    return 0


def _show_drafts(display: Display, report: Any) -> None:
    """How many answers are others with drafts, and how near the two tokens were."""
    if report.draft_differences:
        parted = [row for row in report.rows if row.draft_divergence is not None]
        display.say(
            f"{len(parted)} of {len(report.rows)} answers are others with drafts, the first token "
            "that differs led by "
            + ", ".join(
                f"{row.draft_margin:.1e} ({row.sample} at {row.ratio:g}, token "
                f"{row.draft_divergence})"
                for row in parted
            )
            + " of the largest logit"
        )


def _show(display: Display, report: Any) -> None:
    """The rows of a check as a table."""
    display.table(
        f"{report.precision} on {report.backend} against PyTorch",
        ["ratio", "sample", "kept", "positions", "logits", "tokens", "IoU", "result"],
        [
            [
                row.ratio,
                row.sample,
                "equal" if row.kept_equal else f"Jaccard {row.kept_jaccard:.3f}",
                "equal" if row.positions_equal else "differ",
                f"{row.max_logit_error:.1e}",
                "same" if row.same_tokens else f"part at {row.first_divergence}",
                "no box" if row.iou is None else f"{row.iou:.3f}",
                "passed" if row.passed else "; ".join(row.reasons),
            ]
            for row in report.rows
        ],
    )
