"""The `gap-export` command. Results on stdout, everything for people on stderr."""

from __future__ import annotations

import signal
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gap_export.cli.options import (
    add_export_arguments,
    configure_logging,
    make_request,
    read_config,
)
from gap_runtime.cli.options import ArgumentParser, Command, print_json, run_command
from gap_runtime.registry import list_plugins, load_plugin

if TYPE_CHECKING:
    from gap_export.config import NamedConfig
    from gap_export.pipeline.estimate import Estimate
    from gap_export.pipeline.plan import ExportPlan
    from gap_export.pipeline.run import ExportResult
    from gap_runtime.display import Display

_COMMANDS = "gap_export.cli.commands"
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


def _main(arguments: Sequence[str]) -> int:
    if arguments and arguments[0] in list_plugins(_COMMANDS):
        return _run_command(arguments[0], arguments[1:])
    return _export(arguments)


def _run_command(name: str, arguments: Sequence[str]) -> int:
    command: Command = load_plugin(_COMMANDS, name, "command")
    options = command_parser(name, command).parse_args(arguments)
    configure_logging(verbose=getattr(options, "verbose", False))
    return command.run(options)


def command_parser(name: str, command: Command) -> ArgumentParser:
    """The parser of a command besides exporting."""
    parser = ArgumentParser(
        prog=f"gap-export {name}", allow_abbrev=False, description=command.SUMMARY, epilog=_EPILOG
    )
    command.add_arguments(parser)
    return parser


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
    parser.add_argument(
        "--force", action="store_true", help="export again what is there already, unchanged"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("-v", "--verbose", action="store_true", help="show the libraries' logs")
    parser.add_argument("--version", action="version", version=metadata.version("gap-export"))
    return parser


def _export(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    configure_logging(verbose=options.verbose)

    from gap_runtime.display import Display  # noqa: PLC0415 - rich only when a command runs

    display = Display()
    named = read_config(options.model, options)
    if not (options.dry_run or options.force) and _show_finished(display, named, options):
        return 0
    with display.step("loading libraries"):
        from gap_export.pipeline import run as pipeline  # noqa: PLC0415 - loads torch
        from gap_export.pipeline.plan import plan_export  # noqa: PLC0415
        from gap_export.pipeline.staging import require_replaceable  # noqa: PLC0415
    plan = plan_export(make_request(named, options, options.out))
    if options.dry_run:
        require_replaceable(plan.out)
        _dry_run(display, plan, as_json=options.json)
        return 0
    result = pipeline.export(plan, display)
    if options.json:
        print_json(pipeline.summarize(result))
    else:
        show_result(display, result)
        print(result.plan.out)
    return 0


def _show_finished(display: Display, named: NamedConfig, options: Namespace) -> bool:
    """Print the result of the same export, if it was made before; whether it was."""
    from gap_export.pipeline.fingerprint import find_finished  # noqa: PLC0415 - slow for --help

    found = find_finished(
        named,
        target=options.target,
        weights=options.weights,
        reference=options.reference,
        out=options.out,
    )
    if found is None:
        return False
    display.say(
        f"{found.folder}: exported before, with these settings and from these files; "
        "--force exports again"
    )
    if options.json:
        print_json(found.result)
    else:
        print(found.folder)
    return True


def _dry_run(display: Display, plan: ExportPlan, *, as_json: bool) -> None:
    """What would be made, and the memory and disk that it would take."""
    from gap_export.pipeline.estimate import estimate  # noqa: PLC0415 - loads torch
    from gap_runtime.records import dump_record  # noqa: PLC0415

    _show_plan(display, plan)
    with display.step("estimating memory"):
        found = estimate(plan)
    _show_estimate(display, plan, found)
    if as_json:
        print_json(_plan_facts(plan) | {"memory": dump_record(found)})
    else:
        print(plan.out)


def _show_estimate(display: Display, plan: ExportPlan, found: Estimate) -> None:
    """Memory by what it is for, and whether the target has it."""
    gib = 2**30
    rows = [
        ("weights, vision graph", found.vision_weights_bytes),
        ("weights, text graph", found.text_weights_bytes),
        ("weights, decoder", found.decoder_weights_bytes),
        ("KV cache", found.cache_bytes),
        ("activations, vision graph", found.vision_activations_bytes),
        ("activations, prefill", found.prefill_activations_bytes),
        ("token embeddings, mapped on the host", found.embedding_bytes),
        ("reserve: system, Python, CUDA, TensorRT", found.reserve_bytes),
        ("total, with the larger of the activations", found.total_bytes),
        ("bundle on disk", found.bundle_bytes),
    ]
    display.table(
        f"Estimate for target {plan.target.name}",
        ["what", "GiB"],
        [[name, size / gib] for name, size in rows if size],
    )
    if found.memory_bytes is None:
        return
    verdict = "fits" if found.fits else "does not fit"
    display.say(
        f"{verdict}: needs {found.total_bytes / gib:.1f} GiB to run, the smallest machine of "
        f"target {plan.target.name} has {found.memory_bytes / gib:.1f} GiB; building takes more"
    )


def show_result(display: Display, result: ExportResult) -> None:
    """The tables at the end of an export."""
    from gap_runtime.display import format_bytes  # noqa: PLC0415

    _show_plan(display, result.plan)
    rows = [[name, format_bytes(e.size)] for name, e in sorted(result.manifest.files.items())]
    display.table("Files", ["file", "size"], rows)
    if result.report is None:
        display.say(f"graphs proved; parity with PyTorch not checked: {result.note}")
        return
    checked = result.report.rows
    errors = [row.relative_logit_error or 0.0 for row in checked]
    equal = sum(row.same_tokens for row in checked)
    kept = sum(not row.missed for row in checked)
    said = (
        f"{equal} of {len(checked)} answers equal PyTorch's"
        if result.manifest.quantization is None
        else f"{equal} of {len(checked)} answers equal PyTorch's, {kept} keep its box"
    )
    display.say(
        f"graphs proved; {said} on onnxruntime, largest relative logit error {max(errors):.1e}"
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
    prune = plan.prune
    display.table(
        f"{plan.name}: {prune.strategy}, positions {prune.positions}, {plan.dtype}",
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
        "config": dump_record(plan.config),
    }
