"""`gap-runtime evaluate`: measure how well a bundle grounds phrases of a data set."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any, Final

from gap_runtime.cli.evaluation import (
    add_evaluation_arguments,
    finish,
    read_request,
    run_evaluation,
)
from gap_runtime.cli.options import (
    add_backend,
    add_bundle,
    add_draft,
    add_kept_pictures,
    open_bundle,
)

SUMMARY: Final = "measure how well it grounds the phrases of a data set"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_bundle(parser)
    add_evaluation_arguments(parser)
    add_backend(parser)
    add_draft(parser)
    # Phrases come by picture, so that only a picture under several names comes again.
    add_kept_pictures(parser, default=0)


def json_types() -> dict[str, Any]:
    """By what decides it, the type of what `--json` prints."""
    from gap_runtime.evaluation.api import EvaluationFacts  # noqa: PLC0415 - numpy at first need

    return {"--json": EvaluationFacts}


def run(options: argparse.Namespace) -> int:
    """Do it; the exit code."""
    from gap_runtime.backends import open_backend  # noqa: PLC0415
    from gap_runtime.display import Display  # noqa: PLC0415 - libraries only when a command runs
    from gap_runtime.evaluation.answer import BundleAnswerer, describe_bundle  # noqa: PLC0415
    from gap_runtime.evaluation.results import Header  # noqa: PLC0415
    from gap_runtime.evaluation.run import describe_data  # noqa: PLC0415
    from gap_runtime.grounding.fastest import choose_backend  # noqa: PLC0415

    display = Display()
    bundle = open_bundle(options)
    options.backend = choose_backend(bundle, options.backend)
    open_backend(options.backend)
    ratios = bundle.choose_ratios(options.ratios, options.keep)
    with display.step("reading the data"):
        data, other = read_request(options)
    header = Header(
        subject=describe_bundle(bundle, options.backend),
        data=describe_data(data),
        box=bundle.manifest.box,
    )
    answers = run_evaluation(
        options,
        display,
        data,
        header=header,
        ratios=ratios,
        open_answerer=partial(
            BundleAnswerer,
            bundle.folder.resolve(),
            options.backend,
            draft=options.draft,
            keep_pictures=options.keep_pictures,
        ),
    )
    return finish(options, display, data, answers, other)
