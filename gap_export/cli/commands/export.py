"""`gap-export export`, and `gap-export MODEL` for short: make a bundle."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

from gap_export.cli.options import add_export_arguments, read_request
from gap_runtime.cli.options import print_json
from gap_runtime.cli.sharing import Pushed, add_push_arguments, push_bundle

if TYPE_CHECKING:
    from gap_export.pipeline.estimate import DryRun, Estimate
    from gap_export.pipeline.plan import ExportPlan
    from gap_export.pipeline.request import ExportRequest
    from gap_export.pipeline.result import ExportResult
    from gap_runtime.bundle.hub import HubName
    from gap_runtime.display import Display

SUMMARY: Final = "export a model to a bundle"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
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
    parser.add_argument(
        "--push",
        metavar="ORG/NAME",
        help="then share the bundle on the hub, with a card; ORG/NAME@BRANCH for a branch",
    )
    add_push_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("-v", "--verbose", action="store_true", help="show the libraries' logs")


def json_types() -> dict[str, Any]:
    """By what decides it, the type of what `--json` prints."""
    from gap_export.pipeline import estimate  # noqa: PLC0415 - loads torch
    from gap_export.pipeline.result import ExportSummary  # noqa: PLC0415

    class SharedExport(ExportSummary):
        """The bundle, and where it is on the hub now."""

        pushed: Pushed

    return {
        "--json": ExportSummary,
        "--json --push ORG/NAME": SharedExport,
        "--json --dry-run": estimate.DryRun,
    }


def run(options: argparse.Namespace) -> int:
    """Do it; the exit code."""
    from gap_runtime.display import Display  # noqa: PLC0415 - rich only when a command runs

    display = Display()
    request = read_request(options)
    name = None if options.push is None else _parse_name(options.push)
    if options.dry_run:
        return _dry_run(display, request, as_json=options.json)
    if name is not None:
        return _export_and_push(options, display, request, name)
    return make_bundle(request, display, force=options.force, as_json=options.json)


def _parse_name(text: str) -> HubName:
    """Where `--push` leads, also in a dry run."""
    from gap_runtime.bundle.hub import parse_name  # noqa: PLC0415

    return parse_name(text)


def _export_and_push(
    options: argparse.Namespace, display: Display, request: ExportRequest, name: HubName
) -> int:
    """Export, push and say both; what a push would be refused for is found before the work."""
    from gap_runtime.bundle.bundle import Bundle  # noqa: PLC0415
    from gap_runtime.bundle.license import UNKNOWN, find_license  # noqa: PLC0415
    from gap_runtime.bundle.manifest import Source  # noqa: PLC0415
    from gap_runtime.bundle.push import require_login  # noqa: PLC0415

    require_login(name)
    config = request.named.config
    source = Source(checkpoint=config.checkpoint, revision=config.revision, index_sha256="")
    license = find_license(source, options.license)  # noqa: A001 - the field's word
    license.require_shareable(accepted=options.accept_license)
    result = _make(request, display, force=options.force, as_json=options.json)
    if license.name == UNKNOWN:
        license = find_license(result.manifest.source, options.license)  # noqa: A001
    pushed = push_bundle(
        options, display, Bundle.open(result.folder), name, license, report=result.report
    )
    if options.json:
        print_json({**result.summarize(), "pushed": pushed})
    else:
        print(result.folder)
    return 0


def make_bundle(
    request: ExportRequest, display: Display, *, force: bool = False, as_json: bool = False
) -> int:
    """Export and say what was made; the exit code."""
    result = _make(request, display, force=force, as_json=as_json)
    if as_json:
        print_json(result.summarize())
    else:
        print(result.folder)
    return 0


def _make(request: ExportRequest, display: Display, *, force: bool, as_json: bool) -> ExportResult:
    """Export and say on stderr what was made."""
    from gap_export.pipeline.api import export_request  # noqa: PLC0415

    result = export_request(request, display, force=force, may_fork=True)
    if result.plan is None:
        display.say(
            f"{result.folder}: exported before, with these settings and from these files; "
            "--force exports again"
        )
    elif not as_json:
        _show_plan(display, result.plan)
        _show_result(display, result)
    return result


def _dry_run(display: Display, request: ExportRequest, *, as_json: bool) -> int:
    """What would be made, and the memory and disk that it would take; the exit code."""
    with display.step("loading libraries"):
        from gap_export.checkpoint.shapes import ShapeSource  # noqa: PLC0415
        from gap_export.pipeline.plan import plan_export  # noqa: PLC0415 - loads torch
        from gap_export.pipeline.precision import require_answers  # noqa: PLC0415
    require_answers(request)
    with TemporaryDirectory(prefix="gap-export-shapes-") as home:
        source, config = ShapeSource(Path(home)), request.named.config
        if source.is_packaged(config.checkpoint, config.revision):
            display.say(
                f"note: {config.checkpoint} is not on this machine; its shapes are known, its "
                "tokenizer is not, so the prompt is counted as the family has it"
            )
            request = replace(request, reference=False)
        return _show_dry_run(display, plan_export(request, source), as_json=as_json)


def _show_dry_run(display: Display, plan: ExportPlan, *, as_json: bool) -> int:
    """Show a plan and what it takes; the exit code."""
    from gap_export.pipeline.estimate import estimate  # noqa: PLC0415
    from gap_export.pipeline.staging import require_replaceable  # noqa: PLC0415

    replaced = require_replaceable(plan.out)
    if replaced is not None:
        display.say(f"note: {plan.out} holds a bundle, which would be replaced: {replaced}")
    for note in plan.spec.notes:
        display.say(f"note: {note}")
    _show_plan(display, plan)
    with display.step("estimating memory"):
        found = estimate(plan)
    _show_estimate(display, plan, found)
    if as_json:
        print_json(_plan_facts(plan, found))
    else:
        print(plan.out)
    return 0


def _show_estimate(display: Display, plan: ExportPlan, found: Estimate) -> None:
    """Memory by what it is for, and whether the target has it."""
    from gap_runtime.display import format_bytes  # noqa: PLC0415

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
    if found.cache_saved_bytes:
        whole = found.cache_bytes + found.cache_saved_bytes
        display.say(
            f"KV cache in {plan.cache_dtype}: {format_bytes(found.cache_bytes)} instead of "
            f"{format_bytes(whole)} in {plan.dtype}, {format_bytes(found.cache_saved_bytes)} saved"
        )
    if found.memory_bytes is None:
        return
    verdict = "tight" if found.is_tight else "fits" if found.fits else "does not fit"
    display.say(
        f"{verdict}: needs {found.total_bytes / gib:.1f} GiB to run, the smallest machine of "
        f"target {plan.target.name} has {found.memory_bytes / gib:.1f} GiB; building takes more"
    )


def _show_result(display: Display, result: ExportResult) -> None:
    """The files, and how the check went."""
    from gap_runtime.display import format_bytes  # noqa: PLC0415

    rows = [[name, format_bytes(e.size)] for name, e in sorted(result.manifest.files.items())]
    display.table("Files", ["file", "size"], rows)
    said = f"graphs proved; {result.describe_check()}"
    if result.report is not None:
        errors = [row.relative_logit_error or 0.0 for row in result.report.rows]
        said += f" on onnxruntime, largest relative logit error {max(errors):.1e}"
    display.say(said)
    if boxless := result.describe_boxless():
        display.say(boxless)


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
        f"{plan.name}: {prune.name}, positions {prune.positions}, {plan.dtype}",
        ["ratio removed", "visual tokens kept", "longest prompt", "KV cache"],
        rows,
    )
    display.say(
        f"prompt: {layout.prefix} text + visual + up to {layout.suffix} text; answer up to "
        f"{layout.answer}; the graph's cache has {layout.capacity} slots"
    )
    most = max(layout.at(entry).positions for entry in plan.entries)
    if most > plan.spec.decoder.max_positions:
        display.say(
            f"note: the longest prompt and answer reach position {most - 1}; the model was made "
            f"for {plan.spec.decoder.max_positions} positions"
        )


def _plan_facts(plan: ExportPlan, found: Estimate) -> DryRun:
    """The plan as plain data, for `--dry-run --json`."""
    from gap_runtime.records import dump_record  # noqa: PLC0415

    return {
        "bundle": str(plan.out),
        "ratios": dump_record(plan.entries),
        "layout": dump_record(plan.layout),
        "dtype": plan.dtype,
        "checkpoint": plan.checkpoint.hub_id or str(plan.checkpoint.folder),
        "weights_bytes": plan.weights_bytes,
        "cache_dtype": plan.cache_dtype,
        "cache_bytes": plan.layout.capacity * plan.cache_bytes_per_slot,
        "prompt": plan.prompt.template,
        "notes": list(plan.spec.notes),
        "config": dump_record(plan.config),
        "memory": dump_record(found),
    }
