"""An export from start to end: what is made, and in which order.

Everything is written into a folder aside, which becomes the bundle by one rename when it is
whole; nothing else that an export does can be seen from outside.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Final

import numpy as np

from gap_export.checkpoint.tokenizer import read_tokenizer, write_tokenizer
from gap_export.checkpoint.tokenizer_files import TOKENIZER_FILE
from gap_export.errors import ExportError
from gap_export.interfaces.family import InputStatistics
from gap_export.pipeline.asking import load_reference, measure_reference
from gap_export.pipeline.fingerprint import IDENTITY_FILE, ExportRecord, identify
from gap_export.pipeline.garbage import rare_collections
from gap_export.pipeline.graph_cache import GraphCache, has_room_for_two
from gap_export.pipeline.nonfinite import find_bad_tensor
from gap_export.pipeline.plan import ExportPlan
from gap_export.pipeline.precision import require_answers
from gap_export.pipeline.preflight import require_memory, require_readable, require_room
from gap_export.pipeline.prompt import TEXT_TOKENIZER_FILE
from gap_export.pipeline.result import ExportResult
from gap_export.pipeline.stages import Graphs, quantize_graphs, write_graphs
from gap_export.pipeline.staging import folder_aside, move_into_place, require_replaceable
from gap_export.quantization.awq import smooth_model
from gap_export.quantization.cache import CacheRange, quantize_cache
from gap_export.quantization.joined import find_sources
from gap_export.quantization.values import quantize_sources
from gap_export.reference.memory import REFERENCE_DTYPE
from gap_export.reference.record import record_answers
from gap_export.tracing.join import join
from gap_export.weights.bind import used_parameters
from gap_export.weights.plan import WeightPlan
from gap_export.weights.read import SourceReader
from gap_export.weights.write import bring_weights
from gap_runtime.bundle.bundle import Bundle
from gap_runtime.bundle.hashes import describe_file
from gap_runtime.bundle.manifest import (
    MANIFEST_FILE,
    SCHEMA,
    CacheShape,
    FileEntry,
    Manifest,
    Pruning,
    Reference,
    Source,
    Stage,
)
from gap_runtime.bundle.validation import read_manifest
from gap_runtime.display import Display, format_bytes
from gap_runtime.errors import BackendMissingError, BundleError, CheckError, EngineError
from gap_runtime.grounding.check import CheckReport, check_bundle, count_rows
from gap_runtime.pictures.load import load_picture

_REFERENCE: Final = "reference.npz"
_COPIES: Final = ".copies"


@rare_collections()
def export(
    plan: ExportPlan,
    display: Display | None = None,
    *,
    known: GraphCache | None = None,
    may_fork: bool = False,
) -> ExportResult:
    """Make the bundle.

    Args:
        plan: What to make.
        display: Shows the steps; nothing is shown without one.
        known: Graphs of earlier exports, which are not traced again.
        may_fork: Whether a copy of this process may trace some of a large model's graphs.

    Raises:
        GapError: The export failed; nothing was left behind and nothing was overwritten.
    """
    display = display or Display(quiet=True)
    _find_obstacles(plan, display)
    need = measure_reference(plan)
    wanted = plan.request.reference
    kept = need.settle("export with --no-reference, or on") if wanted else None
    # Before anything is read, so that what changes meanwhile is noticed next time.
    record = _start_record(plan)
    ready = {name: plan.sources[name] for name in sorted(plan.weights.ready)}
    known = known or GraphCache(keeps=False)
    with ExitStack() as stack:
        # Before the folder's lock and the readers' threads, which a copy must not have.
        two = may_fork and has_room_for_two(plan)
        finish = stack.enter_context(known.traced_by_two(plan)) if two else None
        folder = stack.enter_context(folder_aside(plan.out))
        require_room(plan, folder)
        copies = _plan_copies(plan.weights, folder, plan.request.bring)
        reader = stack.enter_context(SourceReader(ready, copies, may_fork=two))
        graphs = _trace(plan, display, known, finish)
        if plan.schemes:
            graphs = quantize_graphs(plan, graphs)
        reference, statistics, cached = None, dict[str, InputStatistics](), CacheRange()
        if plan.request.reference:
            with _asking(display, None if kept is None else need.describe(kept)) as show:
                reference, statistics = _record(plan, folder, kept, show, cached)
        if plan.config.kv_cache is not None:
            decoder = quantize_cache(graphs.decoder, cached.scales())
            graphs = replace(graphs, decoder=decoder)
        with display.step("laying out the weights"):
            weights = _lay_out(plan, graphs, statistics)
        with display.step("proving the graphs"):
            stages = write_graphs(plan, weights, folder, graphs)
        with display.count(
            f"bringing {format_bytes(weights.size)} of weights", "bytes", weights.size
        ) as pace:
            hashes = bring_weights(
                weights,
                folder,
                plan.request.bring,
                copy_of=reader.copy_of,
                on_bytes=pace,
            )
            if (folder / _COPIES).exists():
                # What stayed would become part of the bundle.
                reader.wait()
                shutil.rmtree(folder / _COPIES)
            reader.require_finite(weights)
        _write_tokenizers(plan, folder)
        hashes |= _hash_shards(reader, weights, display)
        entries = _describe_files(folder, hashes)
        manifest = _make_manifest(plan, weights, stages, reference, entries)
        report, note = _check(Bundle(folder=folder, manifest=manifest), display)
        if record is not None:
            record = replace(record, report=report, note=note)
            files = manifest.files | {IDENTITY_FILE: record.write(folder)}
            manifest = replace(manifest, files=files)
        # Last, so that a folder that was left behind never looks like a bundle.
        manifest.write(folder)
        _require_readable(folder)
        move_into_place(folder, plan.out)
    return ExportResult(folder=plan.out, manifest=manifest, report=report, note=note, plan=plan)


def _find_obstacles(plan: ExportPlan, display: Display) -> None:
    """Say what is to be known before the work, and what makes it useless."""
    replaced = require_replaceable(plan.out)
    if replaced is not None:
        display.say(f"note: {plan.out} holds a bundle, which is replaced: {replaced}")
    for note in plan.spec.notes:
        display.say(f"note: {note}")
    require_answers(plan.request)
    require_readable(plan)
    require_memory(plan)


def _require_readable(folder: Path) -> None:
    """Never publish a manifest that the runtime would refuse.

    Raises:
        ExportError: With what it would say.
    """
    try:
        read_manifest(folder)
    except BundleError as error:
        where = f"{folder / MANIFEST_FILE}: "
        found = str(error).removeprefix(where).removesuffix("; export again")
        raise ExportError(
            f"the bundle would not be read again: {found}; nothing was written; change the "
            "setting that it comes from"
        ) from error


def _start_record(plan: ExportPlan) -> ExportRecord | None:
    """What is known before the export; None where the same export could not be recognised."""
    found = plan.family.find_parts(plan.checkpoint, text=plan.reads_clip)
    named = plan.request.named.config.parts
    parts = {role: place for role, place in found.items() if role not in named}
    identity = identify(plan.request, parts)
    return None if identity is None else ExportRecord(identity=identity, parts=parts)


def _plan_copies(weights: WeightPlan, folder: Path, bring: str) -> dict[Path, Path]:
    """Where the files that will be copied are copied to while graphs are traced."""
    if bring == "link":
        return {}
    (folder / _COPIES).mkdir()
    return {source: folder / _COPIES / name for name, source in weights.shards.items()}


def _trace(
    plan: ExportPlan, display: Display, known: GraphCache, finish: Callable[[], object] | None
) -> Graphs:
    if finish is not None:
        with display.step("tracing on two cores"):
            finish()
    with display.step("tracing the vision tower"):
        towers = {bucket.name: known.tower(plan, bucket) for bucket in plan.spec.buckets}
        text = known.text(plan) if plan.reads_clip else None
    with display.step("tracing the decoder"):
        decoder = known.decoder(plan)
    with display.step(f"joining {len(plan.entries)} pruning stage(s)"):
        # The last of a bucket takes the tower itself.
        last = {entry.bucket: entry for entry in plan.entries}
        visions = [
            join(
                towers[entry.bucket]
                if entry is last[entry.bucket]
                else towers[entry.bucket].copy(),
                known.pruning(plan, entry),
            )
            for entry in plan.entries
        ]
    return Graphs(visions=tuple(visions), decoder=decoder, text=text)


def _lay_out(
    plan: ExportPlan, graphs: Graphs, statistics: dict[str, InputStatistics]
) -> WeightPlan:
    """The planned files in the graphs' order, quantized values rounded by what PyTorch saw."""
    sources, smoothings = dict(plan.sources), {}
    if plan.quantization is not None and plan.quantization.method == "awq":
        smoothed = smooth_model(
            plan.sources,
            plan.schemes,
            plan.family.DECODER.smoothing_groups(plan.spec.decoder),
            statistics,
            dtype=plan.dtype,
        )
        sources |= smoothed.sources
        smoothings = smoothed.smoothings
    sources |= quantize_sources(sources, plan.schemes, smoothings, dtype=plan.dtype)
    names = (*used_parameters(graphs.all), plan.family.DECODER.EMBEDDING)
    return plan.weights.lay_out(find_sources(names, sources))


@contextmanager
def _asking(display: Display, layers: str | None) -> Iterator[Callable[[float, str], None]]:
    """Show that PyTorch is asked; `layers` says why weights are read layer by layer, if so."""
    if layers is not None:
        display.say(layers)
    how = "" if layers is None else ", layer by layer"
    with display.progress(f"asking PyTorch{how}") as show:
        yield show


def _record(
    plan: ExportPlan,
    folder: Path,
    kept: int | None,
    show: Callable[[float, str], None],
    cached: CacheRange,
) -> tuple[Reference, dict[str, InputStatistics]]:
    """Ask PyTorch about the samples, in float32 whatever the bundle's dtype.

    What the decoder's linear layers saw meanwhile comes along; `cached` sees keys and values where
    their scales are wanted.
    """
    see_cache = None if plan.config.kv_cache is None else cached.see
    reference = load_reference(plan, kept, see_cache)
    with reference.model.observe() as summarize:
        records, arrays = record_answers(reference, plan.samples, plan.entries, folder, show)
        statistics = summarize()
    np.savez(folder / _REFERENCE, **arrays)  # type: ignore[arg-type]
    recorded = Reference(arrays=_REFERENCE, dtype=REFERENCE_DTYPE, samples=tuple(records))
    return recorded, statistics


def _hash_shards(reader: SourceReader, weights: WeightPlan, display: Display) -> dict[str, str]:
    """The hashes of the checkpoint's own files, by their names in the bundle."""
    hashes, size = {}, sum(source.stat().st_size for source in weights.shards.values())
    with display.count("hashing", "bytes", size) as pace:
        for name, source in weights.shards.items():
            hashes[name] = reader.hash(source)
            pace(source.stat().st_size)
    return hashes


def _write_tokenizers(plan: ExportPlan, folder: Path) -> None:
    """The language model's tokenizer, and CLIP's where phrases go through its text tower."""
    if plan.tokenizer is not None:
        write_tokenizer(plan.spec.tokenizer, plan.tokenizer, folder / TOKENIZER_FILE)
    if plan.reads_clip:
        assert plan.spec.text is not None
        tokenizer = read_tokenizer(plan.spec.text.tokenizer)
        assert tokenizer is not None
        tokenizer.save(str(folder / TEXT_TOKENIZER_FILE))


def _check(bundle: Bundle, display: Display) -> tuple[CheckReport | None, str]:
    """Run the finished bundle against the reference where that can be done here."""
    if bundle.manifest.reference is None:
        return None, "no reference was recorded"
    if bundle.manifest.dtype == "bfloat16":
        return None, "the onnxruntime backend does not run bfloat16"
    try:
        rows = count_rows(bundle)
        with display.count("checking against PyTorch on onnxruntime", "answers", rows) as pace:
            report = check_bundle(bundle, "onnxruntime:cpu", on_row=lambda _: pace(1))
    except BackendMissingError as error:
        return None, str(error)
    except EngineError:
        _require_finite(bundle)
        raise
    if not report.passed:
        _require_finite(bundle)
        failed = next(
            (row for row in report.rows if not (row.passed or row.missed)),
            next(row for row in report.rows if not row.passed),
        )
        raise CheckError(
            f"{bundle.manifest.name}: the exported graphs differ from PyTorch: {failed.sample} "
            f"at ratio {failed.ratio:g}: {'; '.join(failed.reasons)}; nothing was "
            "written; --no-reference exports the graphs unchecked"
        )
    return report, ""


def _require_finite(bundle: Bundle) -> None:
    """Say so where a failed check comes from an overflow, and in which tensor."""
    assert bundle.manifest.reference is not None
    if bundle.manifest.dtype == "float32":
        return
    for sample in bundle.manifest.reference.samples:
        if sample.ratio is None:
            continue
        picture = load_picture(bundle.folder / sample.image)
        entry = bundle.choose_ratio(sample.ratio, sample.bucket)
        found = find_bad_tensor(bundle, picture, sample.phrase, entry)
        if found is not None:
            raise CheckError(
                f"{bundle.manifest.name}: {found} is not finite in {bundle.manifest.dtype}; "
                "nothing was written; export with --dtype bfloat16 or float32"
            )


def _describe_files(folder: Path, hashes: dict[str, str]) -> dict[str, FileEntry]:
    """Size and hash of every file of the bundle; the hashes of some are known."""
    entries = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        entries[name] = (
            FileEntry(size=path.stat().st_size, blake3=hashes[name])
            if name in hashes
            else describe_file(path)
        )
    return entries


def _make_manifest(
    plan: ExportPlan,
    weights: WeightPlan,
    stages: list[Stage],
    reference: Reference | None,
    files: dict[str, FileEntry],
) -> Manifest:
    spec, prune = plan.spec, plan.prune
    packages = ("gap-export", "torch", "transformers", "onnx", "onnx-ir", "onnxscript")
    return Manifest(
        schema=SCHEMA,
        name=plan.out.name,
        family=plan.family_name,
        dtype=plan.dtype,
        quantization=plan.quantization,
        target=plan.target,
        source=Source(
            checkpoint=plan.checkpoint.hub_id or plan.name,
            revision=plan.checkpoint.revision,
            index_sha256=plan.checkpoint.index_sha256,
        ),
        versions={name: metadata.version(name) for name in packages},
        layout=plan.layout,
        pruning=Pruning(
            strategy=prune.name,
            positions=prune.positions,
            seed=prune.seed,
            extra_token=prune.extra_token if plan.pruner.EXTRA else None,
        ),
        buckets=spec.buckets,
        ratios=plan.entries,
        stages=tuple(stages),
        cache=CacheShape(
            layers=spec.decoder.layers,
            heads=spec.decoder.cache_heads,
            head_dim=spec.decoder.head_dim,
            dtype=plan.cache_dtype,
        ),
        embedding=weights.placed[plan.family.DECODER.EMBEDDING],
        preprocess=spec.preprocess,
        prompt=plan.prompt,
        phrase=plan.phrase,
        box=spec.box,
        reference=reference,
        files=files,
    )
