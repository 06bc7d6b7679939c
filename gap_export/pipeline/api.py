"""What `import gap_export` gives: from a model's name to a bundle in one call."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Unpack

from gap_export.pipeline.fingerprint import find_finished
from gap_export.pipeline.garbage import rare_collections
from gap_export.pipeline.request import ExportOptions, ExportRequest, make_request
from gap_export.pipeline.result import ExportResult
from gap_runtime.display import Display


def export(
    model: str | Path,
    *,
    force: bool = False,
    quiet: bool = True,
    **options: Unpack[ExportOptions],
) -> ExportResult:
    """Export a model, as the command `gap-export MODEL` does. What is not given is the model's.

    Args:
        model: Name in export_configs/, `.toml` file, checkpoint folder or hub id.
        force: Export again what was exported before, unchanged.
        quiet: Say nothing, nor let the libraries; otherwise steps are shown on stderr.
        **options: Those that follow.
        ratios: Shares of visual tokens to REMOVE, in [0, 1); one or several. Each becomes a
            vision graph, all share one decoder and the weights.
        keep: Counts of visual tokens that stay, instead of ratios; those of the whole picture,
            the ends of rows among them where it is cut into tiles.
        pruner: What chooses the tokens that stay.
        positions: `gap`, or for comparison `compact`, `permuted`, `permuted-compact` or, where a
            token has three position IDs, `compact-grid`.
        extra_token: Place of the token that some pruners make of what they remove:
            `last-visual`, `append`, `centroid` or `drop`.
        dtype: `float32`, `float16` or `bfloat16`.
        quantize: `int8` or `int4`, for the decoder's weights.
        kv_cache: `int8`, for the decoder's KV cache, on targets whose attention can read it.
        settings: Any keys of the model file with dots, as `{"prompt.answer": 32}`.
        checkpoint: Folder or hub id to use instead of the model file's.
        target: Kind of machine.
        out: The bundle's folder; `MODEL-KEPTofTOKENS` in the present one by default.
        bring: How weights get into the bundle: `copy`, or hard links by `link`.
        reference: Whether PyTorch's answers are recorded and compared with the graphs'.

    Returns:
        The finished export. `.folder` is its place, `.bundle` opens it, `.report` is the
        comparison with PyTorch.

    Raises:
        GapError: The export cannot be made, or its graphs differ from PyTorch; nothing was left
            behind and nothing was overwritten.
    """
    request = make_request(model, **options)
    return export_request(request, Display(quiet=quiet), force=force)


@rare_collections()
def export_request(
    request: ExportRequest, display: Display, *, force: bool = False, may_fork: bool = False
) -> ExportResult:
    """Export, or find the same export made before.

    Args:
        request: What to export.
        display: Shows the steps.
        force: Export again what is there already, unchanged.
        may_fork: Whether a copy of this process may take part, as a program's own threads forbid.

    Raises:
        GapError: As for `export`.
    """
    found = None if force else find_finished(request)
    if found is not None:
        return found
    with display.step("loading libraries"):
        from gap_export.pipeline import run  # noqa: PLC0415 - loads torch
        from gap_export.pipeline.plan import plan_export  # noqa: PLC0415
        from gap_export.reference.quiet import quiet_libraries  # noqa: PLC0415
    with quiet_libraries() if display.is_quiet else nullcontext():
        return run.export(plan_export(request), display, may_fork=may_fork)
