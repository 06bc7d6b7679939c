"""The `gap-export` command. Results on stdout, everything for people on stderr."""

from __future__ import annotations

import argparse
import logging
import os
import signal
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gap_runtime.cli import ArgumentParser, print_json, run_command

if TYPE_CHECKING:
    from gap_export.config import NamedConfig
    from gap_export.pipeline import ExportResult
    from gap_export.plan import ExportPlan, ExportRequest
    from gap_runtime.display import Display

_EPILOG = (
    "exit codes: 0 done, 2 wrong setting or input, 3 export failed, 4 bad bundle, 5 backend "
    "failed, 6 differs from PyTorch. "
    "Example: gap-export refshapes --ratio 0.25 --ratio 0.5"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `gap-export`."""
    # A polite kill tidies up like Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return run_command(_main, arguments)


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
        "--dtype", metavar="NAME", help="float32, float16 or bfloat16 (default: as stored)"
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
        "dtype": options.dtype,
    }
    overrides |= {key: value for key, value in flags.items() if value is not None}
    return load_config(model, overrides, checkpoint=getattr(options, "checkpoint", None))


def make_request(
    named: NamedConfig, options: argparse.Namespace, out: Path | None
) -> ExportRequest:
    """The request that parsed options stand for."""
    from gap_export.plan import ExportRequest  # noqa: PLC0415 - loads torch

    return ExportRequest(
        named=named,
        target=options.target,
        out=out,
        weights=options.weights,
        reference=options.reference,
    )


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="gap-export",
        allow_abbrev=False,
        description="export a grounding vision-language model to ONNX, its visual tokens pruned "
        "and their positions kept",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="name in export_configs/, .toml file, checkpoint folder or hub id",
    )
    add_export_arguments(parser)
    parser.add_argument(
        "--checkpoint", metavar="DIR", help="folder or hub id to use instead of the model file's"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="bundle folder (default: MODEL-KEPTofPATCHES)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show what would be made; write nothing"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("-v", "--verbose", action="store_true", help="show the libraries' logs")
    parser.add_argument("--version", action="version", version=metadata.version("gap-export"))
    return parser


def _main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    _configure_logging(verbose=options.verbose)

    from gap_runtime.display import Display  # noqa: PLC0415 - rich only when a command runs

    display = Display()
    named = read_config(options.model, options)
    with display.step("loading libraries"):
        from gap_export import pipeline  # noqa: PLC0415 - loads torch
        from gap_export.plan import plan_export  # noqa: PLC0415
    plan = plan_export(make_request(named, options, options.out))
    if options.dry_run:
        _show_plan(display, plan)
        print_json(_plan_facts(plan)) if options.json else print(plan.out)
        return 0
    result = pipeline.export(plan, display)
    if options.json:
        print_json(pipeline.summarize(result))
    else:
        show_result(display, result)
        print(result.plan.out)
    return 0


def _configure_logging(*, verbose: bool) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR)
    if not verbose:
        # Read by the libraries when they are imported, which happens later.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")


def show_result(display: Display, result: ExportResult) -> None:
    """The tables at the end of an export."""
    from gap_runtime.display import format_bytes  # noqa: PLC0415

    _show_plan(display, result.plan)
    rows = [[name, format_bytes(e.size)] for name, e in sorted(result.manifest.files.items())]
    display.table("Files", ["file", "size"], rows)
    if result.report is None:
        display.say(f"graphs proved; parity with PyTorch not checked: {result.note}")
        return
    errors = [row.relative_logit_error or 0.0 for row in result.report.rows]
    display.say(
        f"graphs proved; {len(result.report.rows)} answers equal PyTorch's on onnxruntime, "
        f"largest relative logit error {max(errors):.1e}"
    )


def _show_plan(display: Display, plan: ExportPlan) -> None:
    """One row per ratio: tokens, sequence and cache before and after pruning."""
    from gap_runtime.display import format_bytes  # noqa: PLC0415

    layout = plan.layout
    full = layout.at(layout.patches)
    rows = []
    for ratio, kept in plan.pairs:
        pruned = layout.at(kept)
        rows.append(
            [
                f"{ratio:g}",
                f"{kept} of {layout.patches}",
                f"{full.prompt} -> {pruned.prompt}",
                " -> ".join(
                    format_bytes(each.capacity * plan.cache_bytes_per_slot)
                    for each in (full, pruned)
                ),
            ]
        )
    prune = plan.request.named.config.prune
    display.table(
        f"{plan.request.named.name}: {prune.strategy}, positions {prune.positions}, {plan.dtype}",
        ["ratio removed", "visual tokens kept", "longest prompt", "KV cache"],
        rows,
    )
    display.say(
        f"prompt: {layout.prefix} text + visual + up to {layout.suffix} text; answer up to "
        f"{layout.answer}; the graph's cache has {layout.capacity} slots"
    )
    most = full.positions
    if most > plan.spec.max_positions:
        display.say(
            f"note: the longest prompt and answer reach position {most - 1}; the model was made "
            f"for {plan.spec.max_positions} positions"
        )


def _plan_facts(plan: ExportPlan) -> dict[str, Any]:
    """The plan as plain data, for `--dry-run --json`."""
    from gap_runtime.records import dump_record  # noqa: PLC0415

    return {
        "bundle": str(plan.out),
        "ratios": [
            {"ratio": ratio, "kept": kept, "patches": plan.layout.patches}
            for ratio, kept in plan.pairs
        ],
        "layout": dump_record(plan.layout),
        "dtype": plan.dtype,
        "checkpoint": str(plan.checkpoint.folder),
        "weights_bytes": sum(tensor.length for tensor in plan.checkpoint.tensors.values()),
        "cache_bytes": plan.layout.capacity * plan.cache_bytes_per_slot,
        "config": dump_record(plan.request.named.config),
    }
