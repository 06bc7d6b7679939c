"""`gap-export evaluate`: the evaluation of `gap-runtime evaluate`, answered by PyTorch."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any, Final

from gap_export.cli.options import add_survey_arguments, survey
from gap_runtime.cli.evaluation import (
    add_evaluation_arguments,
    finish,
    read_request,
    run_evaluation,
)

SUMMARY: Final = "measure how well PyTorch grounds the phrases of a data set"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_survey_arguments(parser)
    parser.add_argument(
        "--positions",
        metavar="MODE",
        help="gap (default), compact, permuted, permuted-compact or compact-grid",
    )
    parser.add_argument("--extra-token", metavar="RULE", help="as for gap-export")
    add_evaluation_arguments(parser)


def json_types() -> dict[str, Any]:
    """By what decides it, the type of what `--json` prints."""
    from gap_runtime.evaluation.api import EvaluationFacts  # noqa: PLC0415 - numpy at first need

    return {"--json": EvaluationFacts}


def run(options: argparse.Namespace) -> int:
    """Do it; the exit code."""
    from gap_runtime.display import Display  # noqa: PLC0415

    display = Display()
    with display.step("reading the data"):
        data, other = read_request(options)
    plan = survey(options, display)
    from gap_export.analysis.evaluation import (  # noqa: PLC0415
        EagerAnswerer,
        describe_plan,
        open_answerer,
    )
    from gap_runtime.evaluation.results import Header  # noqa: PLC0415
    from gap_runtime.evaluation.run import describe_data  # noqa: PLC0415

    answers = run_evaluation(
        options,
        display,
        data,
        header=Header(subject=describe_plan(plan), data=describe_data(data), box=plan.spec.box),
        ratios=plan.ratios,
        # Workers share a machine's cores, and say nothing.
        open_answerer=partial(open_answerer, plan.request, threads=1)
        if options.ray
        else partial(EagerAnswerer, plan, display=display),
    )
    return finish(options, display, data, answers, other)
