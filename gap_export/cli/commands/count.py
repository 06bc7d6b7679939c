"""`gap-export count`: propose a fixed count for a pruner's adaptive rule."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

from gap_export.cli.options import add_survey_arguments, survey
from gap_runtime.cli.options import print_json

SUMMARY: Final = "propose a fixed count for a pruner's adaptive rule"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_survey_arguments(parser)
    parser.add_argument(
        "--images",
        type=Path,
        required=True,
        metavar="DIR",
        help="your pictures; with phrases where it holds samples.json, a list of {image, phrase}",
    )
    parser.add_argument("--phrase", help="for pruners that read one")


def json_types() -> dict[str, Any]:
    """By what decides it, the type of what `--json` prints."""
    from gap_export.analysis.counts import Counts  # noqa: PLC0415 - torch at first need

    return {"--json": Counts}


def run(options: argparse.Namespace) -> int:
    """Do it; the exit code."""
    from gap_runtime.display import Display  # noqa: PLC0415

    display = Display()
    plan = survey(options, display)
    from gap_export.analysis.counts import count_tokens  # noqa: PLC0415
    from gap_runtime.display import Pace, print_table  # noqa: PLC0415
    from gap_runtime.records import dump_record  # noqa: PLC0415

    with display.progress("running the adaptive rule") as show:
        found = count_tokens(
            plan,
            options.images,
            options.phrase,
            display,
            begin=lambda total: Pace(show, total, "pictures"),
        )
    for line in found.skipped:
        display.say(f"left out: {line}")
    if options.json:
        print_json(dump_record(found))
        return 0
    print_table(
        f"{found.pruner} on {options.images}: visual tokens that its own rule keeps",
        ["bucket", "pictures", "of", "least", "mean", "9 of 10 at most", "most", "export with"],
        [
            [
                each.bucket or "all",
                each.pictures,
                each.patches,
                each.least,
                each.mean,
                each.ninth_decile,
                each.most,
                f"--keep {round(each.mean)} (mean) or {round(each.ninth_decile)}",
            ]
            for each in found.buckets
        ],
    )
    return 0
