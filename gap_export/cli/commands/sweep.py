"""`gap-export sweep`: measure every pruner, position mode and ratio, and write the report."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gap_export.cli.options import add_model_arguments, read_config
from gap_runtime.cli.evaluation import (
    add_data_arguments,
    choose_protocols,
    open_cluster,
    read_data,
)
from gap_runtime.cli.options import add_backend, add_counts, print_json
from gap_runtime.errors import ConfigError

if TYPE_CHECKING:
    from gap_export.analysis.sweep import SweepRequest
    from gap_runtime.evaluation.data import Data

SUMMARY: Final = "measure every pruner, position mode and ratio, and write a report"
_RATIOS: Final = (0.0, 0.25, 0.5, 0.75, 0.9)
_MODES: Final = ("gap", "compact", "permuted")
_PICTURES: Final = 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", metavar="MODEL", help="as for gap-export")
    add_data_arguments(parser)
    add_counts(
        parser,
        ratio="shares of visual tokens removed; 0 is without pruning, done once "
        "(default: 0,0.25,0.5,0.75,0.9)",
        keep="or counts of visual tokens that stay; without pruning is done as well",
        nargs="+",
    )
    parser.add_argument(
        "--pruners",
        nargs="+",
        metavar="NAME",
        help="what chooses the tokens that stay; `all` for every one that the model can serve "
        "(default: the model's)",
    )
    parser.add_argument(
        "--positions",
        nargs="+",
        dest="modes",
        metavar="MODE",
        default=list(_MODES),
        help="gap, compact, permuted, permuted-compact or compact-grid (default: the first three)",
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        metavar="N",
        help="draw anew with each, for pruners that draw (default: the model's one seed)",
    )
    parser.add_argument(
        "--pytorch", action="store_true", help="ask PyTorch too, and count the differing answers"
    )
    parser.add_argument(
        "--gallery",
        type=int,
        metavar="N",
        default=_PICTURES,
        help="pictures of the worst disagreements in the report, and as many random ones "
        "(default: 6; 0: none, then the report holds nothing of the data's pictures)",
    )
    parser.add_argument(
        "--within",
        type=float,
        metavar="POINTS",
        help="recommend the largest ratio of each pruner that loses at most so many points of "
        "accuracy against no pruning",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the sweep (default: MODEL-sweep)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the sweep in the folder of --out"
    )
    add_backend(parser)
    parser.add_argument("--extra-token", metavar="RULE", help="as for gap-export")
    parser.add_argument("--dtype", metavar="NAME", help="as for gap-export")
    parser.add_argument("--target", default="cpu", metavar="NAME", help="machine (default: cpu)")
    add_model_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")


def json_types() -> dict[str, Any]:
    """By what decides it, the type of what `--json` prints."""
    from gap_export.analysis.report.page import Figures  # noqa: PLC0415 - loads torch

    return {"--json": Figures}


def run(options: argparse.Namespace) -> int:
    """Do it; the exit code."""
    from gap_runtime.backends import open_backend  # noqa: PLC0415
    from gap_runtime.display import Display  # noqa: PLC0415 - libraries when a command runs

    display = Display()
    if options.gallery < 0:
        raise ConfigError(f"--gallery {options.gallery}: at least 0 is needed")
    _require_unpruned(options)
    with display.step("reading the data"):
        data = read_data(options)
    open_backend(options.backend)
    with display.step("loading libraries"):
        request = _make_request(options, data)
        from gap_export.analysis.report.page import require_libraries, write_report  # noqa: PLC0415
        from gap_export.analysis.sweep import plan_sweep, run_sweep  # noqa: PLC0415
    # Before hours of work.
    require_libraries()
    plan = plan_sweep(request)
    for note in (*data.notes, *plan.left_out):
        display.say(f"note: {note}")
    sweep = run_sweep(plan, display, spread=open_cluster(options))
    with display.step("writing the report"):
        report = write_report(
            sweep, choose_protocols(options), pictures=options.gallery, within=options.within
        )
    for each in report.advice:
        display.say(each.words)
    if options.json:
        print_json(report.figures)
    else:
        print(report.path)
    return 0


def _require_unpruned(options: argparse.Namespace) -> None:
    """Refuse a recommendation that would have nothing to compare with."""
    if options.within is None:
        return
    if not 0 <= options.within <= 100:  # NaN is neither
        raise ConfigError(f"--within {options.within:g}: expected points of accuracy, 0 to 100")
    if options.ratios and 0 not in options.ratios and not options.keep:
        raise ConfigError("--within: compares with no pruning; add 0 to --ratio")


def _make_request(options: argparse.Namespace, data: Data) -> SweepRequest:
    """The sweep that parsed options stand for."""
    named = read_config(options)
    from gap_export.analysis.sweep import SweepRequest  # noqa: PLC0415 - loads torch

    return SweepRequest(
        named=named,
        target=options.target,
        pruners=tuple(options.pruners or ()),
        positions=tuple(options.modes),
        ratios=() if options.keep else tuple(options.ratios or _RATIOS),
        keep=tuple(options.keep or ()),
        seeds=tuple(options.seeds or ()),
        data=data,
        backend=options.backend,
        eager=options.pytorch,
        out=options.out or Path(f"{named.name}-sweep"),
        resume=options.resume,
    )
