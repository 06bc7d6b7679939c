"""What the commands of `gap-export` share: options, configurations, plans."""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from typing import TYPE_CHECKING, Any

from gap_runtime.cli.options import add_counts, add_old_name, require_outputs_apart

if TYPE_CHECKING:
    from gap_export.config.records import NamedConfig
    from gap_export.pipeline.plan import ExportPlan
    from gap_export.pipeline.request import ExportRequest
    from gap_runtime.display import Display


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that decide an export, for this command and for optimum-cli's."""
    add_counts(
        parser,
        ratio="share of visual tokens to REMOVE, in [0, 1); several with commas (0.25,0.5) or "
        "given again: graphs that share all weights (default: the model file's, 0.5)",
        keep="visual tokens that stay, instead of a share to remove: exactly so many",
    )
    parser.add_argument("--pruner", metavar="NAME", help="what chooses the tokens that stay")
    parser.add_argument(
        "--positions",
        metavar="MODE",
        help="gap (default); for comparison compact, permuted, permuted-compact, or compact-grid "
        "where a token has three position IDs",
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
    parser.add_argument(
        "--kv-cache",
        metavar="NAME",
        help="int8: keep the KV cache in 8 bits, with scales from the sample pictures (targets "
        "cpu and cuda)",
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
        "--bring",
        default="copy",
        metavar="HOW",
        help="how weights get into the bundle: copy (default) or link, hard links",
    )
    add_old_name(parser, "--weights", "--bring", {"clone": "copy", "link": "link"})
    parser.add_argument(
        "--no-reference",
        action="store_false",
        dest="reference",
        help="do not record PyTorch's answers; `gap-runtime check` will not work",
    )


def read_config(options: argparse.Namespace) -> NamedConfig:
    """The model's configuration with the parsed options over it, those that the command has."""
    from gap_export.config.load import load_config, name_settings, parse_override  # noqa: PLC0415

    given = vars(options)
    overrides: dict[str, Any] = dict(parse_override(text) for text in options.overrides)
    overrides |= name_settings(given)
    return load_config(options.model, overrides, checkpoint=given.get("checkpoint"))


def read_request(options: argparse.Namespace) -> ExportRequest:
    """The request that the parsed options of an export stand for."""
    from gap_export.pipeline.request import ExportRequest  # noqa: PLC0415

    return ExportRequest(
        named=read_config(options),
        target=options.target,
        out=options.out,
        bring=options.bring,
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
    """The plan of an export that is not made; no option may have a file written into its model."""
    from gap_export.pipeline.request import ExportRequest  # noqa: PLC0415

    request = ExportRequest(named=read_config(options), bring="link", reference=False)
    with display.step("loading libraries"):
        from gap_export.pipeline.plan import plan_export  # noqa: PLC0415 - loads torch
    plan = plan_export(request)
    require_outputs_apart(options, [plan.checkpoint.folder])
    return plan


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
