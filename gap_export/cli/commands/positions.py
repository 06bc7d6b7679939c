"""`gap-export positions`: show the position IDs of every mode side by side."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

from gap_export.cli.options import add_survey_arguments, survey
from gap_runtime.cli.options import add_counts, print_json

SUMMARY: Final = "show the position IDs of every mode side by side"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_survey_arguments(parser)
    add_counts(parser, ratio="as for gap-export", keep="as for gap-export")
    parser.add_argument("--extra-token", metavar="RULE", help="as for gap-export")
    parser.add_argument("--image", type=Path, metavar="FILE", help="prune this picture in PyTorch")
    parser.add_argument("--phrase", default="the red mug", help="default: the red mug")


def json_types() -> dict[str, Any]:
    """By what decides it, the type of what `--json` prints."""
    from gap_export.analysis.positions import PositionTable  # noqa: PLC0415 - torch

    return {"--json": list[PositionTable]}


def run(options: argparse.Namespace) -> int:
    """Do it; the exit code."""
    from gap_runtime.display import Display  # noqa: PLC0415

    display = Display()
    plan = survey(options, display)
    from gap_export.analysis.positions import (  # noqa: PLC0415
        name_axes,
        shorten,
        tabulate_positions,
    )
    from gap_runtime.display import print_table  # noqa: PLC0415
    from gap_runtime.records import dump_record  # noqa: PLC0415

    tables = tabulate_positions(plan, options.phrase, options.image, display)
    if options.json:
        print_json(dump_record(tables))
        return 0
    for each in tables:
        bucket = f" ({each.bucket})" if each.bucket else ""
        extra = f" and {each.extra} made of the rest" if each.extra else ""
        print_table(
            f"ratio {each.ratio:g}{bucket}: {each.kept} of {each.patches} visual tokens{extra}, "
            f"{each.example}",
            ["", *(mode.mode for mode in each.modes)],
            [
                ["text before: IDs", *(shorten(mode.prefix_ids) for mode in each.modes)],
                ["visual slots: tokens", *(shorten(mode.visual_slots) for mode in each.modes)],
                *(
                    [
                        f"visual slots: IDs{axis}",
                        *(shorten(mode.visual_ids[k]) for mode in each.modes),
                    ]
                    for k, axis in enumerate(name_axes(each))
                ),
                ["text after: IDs", *(shorten(mode.suffix_ids) for mode in each.modes)],
                ["first answer token: ID", *(str(mode.first_answer_id) for mode in each.modes)],
            ],
        )
    return 0
