"""The `gap-export` command. Results on stdout, everything for people on stderr."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import warnings
from collections.abc import Sequence
from dataclasses import replace
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
        "--extra-token",
        metavar="RULE",
        help="place of the token that prumerge and trim make of what they remove: last-visual "
        "(default), append, centroid or drop",
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
        "prune.extra_token": options.extra_token,
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
    commands = {"positions": _positions, "calibrate": _calibrate}
    if arguments and arguments[0] in commands:
        return commands[arguments[0]](arguments[1:])
    return _export(arguments)


def _export(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    _configure_logging(verbose=options.verbose)

    from gap_runtime.display import Display  # noqa: PLC0415 - rich only when a command runs

    display = Display()
    named = read_config(options.model, options)
    with display.step("loading libraries"):
        from gap_export import pipeline  # noqa: PLC0415 - loads torch
        from gap_export.placement import require_replaceable  # noqa: PLC0415
        from gap_export.plan import plan_export  # noqa: PLC0415
    plan = plan_export(make_request(named, options, options.out))
    if options.dry_run:
        require_replaceable(plan.out)
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


def _survey_parser(name: str, summary: str) -> ArgumentParser:
    """The options that the commands share which look at a model and export nothing."""
    parser = ArgumentParser(
        prog=f"gap-export {name}", allow_abbrev=False, description=summary, epilog=_EPILOG
    )
    parser.add_argument("model", metavar="MODEL", help="as for gap-export")
    parser.add_argument("--pruner", metavar="NAME", help="what chooses the tokens that stay")
    parser.add_argument("--checkpoint", metavar="DIR", help="as for gap-export")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="any key of the model file",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("-v", "--verbose", action="store_true", help="show the libraries' logs")
    return parser


def _survey(options: argparse.Namespace, display: Display) -> ExportPlan:
    """The plan of an export that is not made."""
    _configure_logging(verbose=options.verbose)
    for name in ("ratio", "positions", "extra_token", "dtype"):
        if name not in options:
            setattr(options, name, None)
    named = read_config(options.model, options)
    with display.step("loading libraries"):
        from gap_export.plan import ExportRequest, plan_export  # noqa: PLC0415 - loads torch
    return plan_export(
        ExportRequest(named=named, target="cpu", out=None, weights="link", reference=False)
    )


def _positions(arguments: Sequence[str]) -> int:
    parser = _survey_parser("positions", "show the position IDs of every mode side by side")
    parser.add_argument("--ratio", type=float, action="append", metavar="R", help="as gap-export")
    parser.add_argument("--extra-token", metavar="RULE", help="as for gap-export")
    parser.add_argument("--image", type=Path, metavar="FILE", help="prune this picture in PyTorch")
    parser.add_argument("--phrase", default="the red mug", help="default: the red mug")
    options = parser.parse_args(arguments)

    from gap_runtime.display import Display  # noqa: PLC0415

    display = Display()
    plan = _survey(options, display)
    from gap_export.mapping import map_modes, shorten  # noqa: PLC0415
    from gap_runtime.display import print_table  # noqa: PLC0415
    from gap_runtime.records import dump_record  # noqa: PLC0415

    mappings = map_modes(plan, options.phrase, options.image)
    if options.json:
        print_json(dump_record(mappings))
        return 0
    for each in mappings:
        bucket = f" ({each.bucket})" if each.bucket else ""
        extra = f" and {each.extra} made of the rest" if each.extra else ""
        print_table(
            f"ratio {each.ratio:g}{bucket}: {each.kept} of {each.patches} visual tokens{extra}, "
            f"{each.example}",
            ["", *(mode.mode for mode in each.modes)],
            [
                [name, *(shorten(getattr(mode, field)) for mode in each.modes)]
                for name, field in (
                    ("text before: IDs", "prefix_ids"),
                    ("visual slots: tokens", "visual_slots"),
                    ("visual slots: IDs", "visual_ids"),
                    ("text after: IDs", "suffix_ids"),
                )
            ]
            + [["first answer token: ID", *(str(mode.first_answer_id) for mode in each.modes)]],
        )
    return 0


def _calibrate(arguments: Sequence[str]) -> int:
    parser = _survey_parser("calibrate", "propose a fixed count for a pruner's adaptive rule")
    parser.add_argument(
        "--images",
        type=Path,
        required=True,
        metavar="DIR",
        help="your pictures; with phrases where it holds samples.json, a list of {image, phrase}",
    )
    parser.add_argument("--phrase", help="for pruners that read one")
    options = parser.parse_args(arguments)

    from gap_runtime.display import Display  # noqa: PLC0415

    display = Display()
    plan = _survey(options, display)
    from gap_export.calibration import calibrate  # noqa: PLC0415
    from gap_runtime.display import print_table  # noqa: PLC0415
    from gap_runtime.records import dump_record  # noqa: PLC0415

    with display.step("running the adaptive rule"):
        found = calibrate(plan, options.images, options.phrase)
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
                f"--ratio {each.ratio_of_mean} (mean) or {each.ratio_of_ninth_decile}",
            ]
            for each in found.buckets
        ],
    )
    return 0


def _configure_logging(*, verbose: bool) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR)
    if not verbose:
        # Libraries' advice to who writes a config, which whoever exports one cannot follow.
        warnings.simplefilter("ignore", FutureWarning)
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
    rows = []
    for entry in plan.entries:
        pruned = layout.at(entry)
        full = layout.at(replace(entry, kept=entry.patches, extra=0))
        extra = f" + {entry.extra}" if entry.extra else ""
        rows.append(
            [
                f"{entry.ratio:g}" + (f" ({entry.bucket})" if entry.bucket else ""),
                f"{entry.kept}{extra} of {entry.patches}",
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
    most = max(layout.at(entry).positions for entry in plan.entries)
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
        "ratios": dump_record(plan.entries),
        "layout": dump_record(plan.layout),
        "dtype": plan.dtype,
        "checkpoint": str(plan.checkpoint.folder),
        "weights_bytes": plan.weights_bytes,
        "cache_bytes": plan.layout.capacity * plan.cache_bytes_per_slot,
        "config": dump_record(plan.request.named.config),
    }
