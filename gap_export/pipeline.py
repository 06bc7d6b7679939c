"""An export from start to end: what is made, and in which order.

Everything is written into a folder aside, which becomes the bundle by one rename when it is
whole; nothing else that an export does can be seen from outside.
"""

from __future__ import annotations

import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from threading import Event
from typing import Any, Final, Self

import numpy as np

from gap_export.config import OPSET
from gap_export.errors import ExportError
from gap_export.placement import folder_aside, move_into_place, require_replaceable
from gap_export.plan import REFERENCE_DTYPE, TOKENIZER_FILE, ExportPlan
from gap_export.reference import record_reference
from gap_export.stages import trace_decoder, trace_pruning, trace_tower, write_graphs
from gap_export.tracing import Traced, join
from gap_export.weights import WeightPlan, bring_weights, plan_weights, wanted_shapes
from gap_runtime.bundle import Bundle, describe_file, hash_file
from gap_runtime.check import CheckReport, check_bundle
from gap_runtime.display import Display, format_bytes
from gap_runtime.errors import BackendMissingError, CheckError
from gap_runtime.manifest import (
    SCHEMA,
    CacheShape,
    FileEntry,
    Manifest,
    Pruning,
    RatioEntry,
    Reference,
    Source,
    Stage,
)
from gap_runtime.records import dump_record

_REFERENCE: Final = "reference.npz"
_SAMPLES: Final = "samples"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportResult:
    """A finished export. `report` is null where parity was not checked, `note` says why."""

    plan: ExportPlan
    manifest: Manifest
    report: CheckReport | None
    note: str


def export(plan: ExportPlan, display: Display) -> ExportResult:
    """Make the bundle.

    Raises:
        GapError: The export failed; nothing was left behind and nothing was overwritten.
    """
    require_replaceable(plan.out)
    tensors = plan.checkpoint.tensors.values()
    sources = {tensor.file for tensor in tensors if tensor.dtype == plan.dtype}
    with folder_aside(plan.out) as folder, _SourceHashes(sources) as hashes:
        with display.step("tracing the vision tower"):
            tower = trace_tower(plan)
        with display.step("tracing the decoder"):
            decoder = trace_decoder(plan)
        with display.step(f"joining {len(plan.pairs)} pruning stage(s)"):
            visions = {kept: join(tower, trace_pruning(plan, kept)) for _, kept in plan.pairs}
        with display.step("proving the graphs"):
            weights = _plan_weights(plan, [*visions.values(), decoder])
            stages = write_graphs(plan, weights, folder, visions, decoder)
        with display.step(f"bringing {format_bytes(weights.size)} of weights"):
            bring_weights(weights, folder, plan.request.weights)
        reference = None
        if plan.request.reference:
            with display.step("asking PyTorch"):
                reference = _record(plan, folder)
        if plan.prompt.tokenizer is not None:
            shutil.copyfile(plan.checkpoint.folder / TOKENIZER_FILE, folder / TOKENIZER_FILE)
        with display.step("hashing"):
            files = _describe_files(weights, folder, hashes)
        manifest = _make_manifest(plan, weights, stages, reference, files)
        report, note = _check(Bundle(folder=folder, manifest=manifest), display)
        # Last, so that a folder that was left behind never looks like a bundle.
        manifest.write(folder)
        move_into_place(folder, plan.out)
    return ExportResult(plan=plan, manifest=manifest, report=report, note=note)


def _plan_weights(plan: ExportPlan, graphs: list[Traced]) -> WeightPlan:
    spec, family = plan.spec, plan.family
    wanted = wanted_shapes(graphs)
    wanted[family.EMBEDDING] = (spec.vocabulary, spec.width)
    return plan_weights(
        plan.checkpoint,
        wanted,
        dtype=plan.dtype,
        canonical_name=family.canonical_name,
        substitute=lambda name: family.substitute(name, spec),
    )


def _record(plan: ExportPlan, folder: Path) -> Reference:
    """Ask PyTorch about the samples, in float32 whatever the bundle's dtype."""
    model = plan.family.load_eager(plan.checkpoint, plan.spec, REFERENCE_DTYPE)
    records, arrays = record_reference(
        model,
        plan.spec,
        plan.samples,
        plan.pairs,
        pruner=plan.pruner,
        config=plan.request.named.config.prune,
        template=plan.prompt.template,
        most=plan.layout.answer,
        image_folder=_SAMPLES,
        box=plan.spec.box,
    )
    (folder / _SAMPLES).mkdir()
    for path in {sample.path for sample in plan.samples}:
        shutil.copyfile(path, folder / _SAMPLES / path.name)
    np.savez(folder / _REFERENCE, **arrays)  # type: ignore[arg-type]
    return Reference(arrays=_REFERENCE, dtype=REFERENCE_DTYPE, samples=tuple(records))


def _check(bundle: Bundle, display: Display) -> tuple[CheckReport | None, str]:
    """Run the finished bundle against the reference where that can be done here."""
    if bundle.manifest.reference is None:
        return None, "no reference was recorded"
    if bundle.manifest.dtype == "bfloat16":
        return None, "the onnxruntime backend does not run bfloat16"
    try:
        with display.step("checking against PyTorch on onnxruntime"):
            report = check_bundle(bundle, "onnxruntime:cpu")
    except BackendMissingError as error:
        return None, str(error)
    if not report.passed:
        failed = next(row for row in report.rows if not row.passed)
        raise CheckError(
            f"{bundle.manifest.name}: the exported graphs differ from PyTorch: {failed.sample} "
            f"at ratio {failed.ratio:g}: {'; '.join(failed.reasons)}; nothing was "
            "written; --no-reference exports the graphs unchecked"
        )
    return report, ""


class _SourceHashes:
    """SHA-256 of the checkpoint's files, computed while graphs are traced.

    Hashing needs no interpreter lock, so it costs the tracing nothing.
    """

    def __init__(self, files: set[Path]) -> None:
        self._stop = Event()
        self._pool = ThreadPoolExecutor()
        self._before = {file: _fingerprint(file) for file in files}
        self._found: dict[Path, Future[str]] = {
            file: self._pool.submit(hash_file, file, self._stop) for file in sorted(files)
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # A failed export does not wait for gigabytes that nobody asks for any more.
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def result(self, file: Path) -> str:
        """The hash of a file that has not changed since the export began."""
        sha256 = self._found[file].result()
        if _fingerprint(file) != self._before[file]:
            raise ExportError(f"{file}: changed during the export; export again")
        return sha256


def _fingerprint(file: Path) -> tuple[int, int]:
    """Size and time of the last change, in nanoseconds."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def _describe_files(
    weights: WeightPlan, folder: Path, hashes: _SourceHashes
) -> dict[str, FileEntry]:
    """Size and hash of every file of the bundle."""
    entries = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        source = weights.shards.get(name)
        entries[name] = (
            describe_file(path)
            if source is None
            else FileEntry(size=path.stat().st_size, sha256=hashes.result(source))
        )
    return entries


def _make_manifest(
    plan: ExportPlan,
    weights: WeightPlan,
    stages: list[Stage],
    reference: Reference | None,
    files: dict[str, FileEntry],
) -> Manifest:
    spec, prune = plan.spec, plan.request.named.config.prune
    packages = ("gap-export", "torch", "transformers", "onnx", "onnx-ir", "onnxscript")
    return Manifest(
        schema=SCHEMA,
        name=plan.out.name,
        family=plan.family_name,
        dtype=plan.dtype,
        target=plan.request.target,
        opset=OPSET,
        source=Source(
            checkpoint=plan.checkpoint.hub_id or plan.request.named.name,
            revision=plan.checkpoint.revision,
            index_sha256=plan.checkpoint.index_sha256,
        ),
        versions={name: metadata.version(name) for name in packages},
        layout=plan.layout,
        pruning=Pruning(strategy=prune.strategy, positions=prune.positions, seed=prune.seed),
        ratios=tuple(
            RatioEntry(ratio=ratio, kept=kept, patches=spec.patches) for ratio, kept in plan.pairs
        ),
        stages=tuple(stages),
        cache=CacheShape(
            layers=spec.layers,
            heads=spec.cache_heads,
            head_dim=spec.head_dim,
            dtype=plan.dtype,
        ),
        embedding=weights.placed[plan.family.EMBEDDING],
        preprocess=spec.preprocess,
        prompt=plan.prompt,
        box=spec.box,
        reference=reference,
        files=files,
    )


def summarize(result: ExportResult) -> dict[str, Any]:
    """The export's result as plain data, for `--json`."""
    report = result.report
    return {
        "bundle": str(result.plan.out),
        "ratios": dump_record(result.manifest.ratios),
        "checked": report is not None and report.passed,
        "not_checked_because": result.note or None,
        "rows": 0 if report is None else len(report.rows),
        "dtype": result.manifest.dtype,
        "positions": result.manifest.pruning.positions,
        "pruner": result.manifest.pruning.strategy,
    }
