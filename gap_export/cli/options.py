"""What the commands of `gap-export` share: options, configurations, plans."""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gap_export.config import NamedConfig
    from gap_export.pipeline.plan import ExportPlan, ExportRequest
    from gap_runtime.display import Display


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that decide an export, for this command and for optimum-cli's."""
    parser.add_argument(
        "--ratio",
        type=float,
        action="append",
        metavar="R",
        help="share of visual tokens to REMOVE, in [0, 1); give it again for more graphs that "
        "share all weights (default: the model file's, 0.5)",
    )
    parser.add_argument("--pruner", metavar="NAME", help="what chooses the tokens that stay")
    parser.add_argument(
        "--positions",
        metavar="MODE",
        help="gap (default), compact, permuted or permuted-compact; the last three are ablations",
    )
    parser.add_argument(
        "--extra-token",
        metavar="RULE",
        help="place of the token that prumerge and trim make of what they remove: last-visual "
        "(default), append, centroid or drop",
    )
    parser.add_argument(
        "--dtype", metavar="NAME", help="float32, float16 or bfloat16 (default: as stored)"
    )
    parser.add_argument(
        "--quantize",
        metavar="NAME",
        help="int8 or int4: store the decoder's weights so (--set quantize.vision=true: the "
        "vision tower's too)",
    )
    parser.add_argument("--target", default="cpu", metavar="NAME", help="machine (default: cpu)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="any key of the model file, for example prompt.answer=32",
    )
    parser.add_argument(
        "--weights",
        choices=("clone", "link"),
        default="clone",
        help="how weights get into the bundle: copied (default) or hard-linked",
    )
    parser.add_argument(
        "--no-reference",
        action="store_false",
        dest="reference",
        help="do not record PyTorch's answers; `gap-runtime check` will not work",
    )


def read_config(model: str, options: argparse.Namespace) -> NamedConfig:
    """The model's configuration with the parsed options over it."""
    from gap_export.config import load_config, parse_override  # noqa: PLC0415

    overrides: dict[str, Any] = dict(parse_override(text) for text in options.overrides)
    flags = {
        "prune.ratios": options.ratio,
        "prune.strategy": options.pruner,
        "prune.positions": options.positions,
        "prune.extra_token": options.extra_token,
        "dtype": options.dtype,
        "quantize.weights": options.quantize,
    }
    overrides |= {key: value for key, value in flags.items() if value is not None}
    return load_config(model, overrides, checkpoint=getattr(options, "checkpoint", None))


def make_request(
    named: NamedConfig, options: argparse.Namespace, out: Path | None
) -> ExportRequest:
    """The request that parsed options stand for."""
    from gap_export.pipeline.plan import ExportRequest  # noqa: PLC0415 - loads torch

    return ExportRequest(
        named=named,
        target=options.target,
        out=out,
        weights=options.weights,
        reference=options.reference,
    )


def add_survey_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of commands that look at a model and export nothing."""
    parser.add_argument("model", metavar="MODEL", help="as for gap-export")
    parser.add_argument("--pruner", metavar="NAME", help="what chooses the tokens that stay")
    add_model_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say more of the model, and how much libraries say."""
    parser.add_argument("--checkpoint", metavar="DIR", help="as for gap-export")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="any key of the model file",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show the libraries' logs")


def survey(options: argparse.Namespace, display: Display) -> ExportPlan:
    """The plan of an export that is not made."""
    for name in ("ratio", "positions", "extra_token", "dtype", "quantize"):
        if name not in options:
            setattr(options, name, None)
    named = read_config(options.model, options)
    with display.step("loading libraries"):
        from gap_export.pipeline.plan import ExportRequest, plan_export  # noqa: PLC0415 - loads torch
    return plan_export(
        ExportRequest(named=named, target="cpu", out=None, weights="link", reference=False)
    )


def configure_logging(*, verbose: bool) -> None:
    """Quiet libraries, or all that they say."""
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR)
    if not verbose:
        # Libraries' advice to who writes a config, which whoever exports one cannot follow.
        warnings.simplefilter("ignore", FutureWarning)
        # Read by the libraries when they are imported, which happens later.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
