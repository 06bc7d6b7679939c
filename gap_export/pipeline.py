"""An export from start to end: what is made, in which order, and where it is put.

Everything is written into a folder aside, which becomes the bundle by one rename when it is
whole; nothing else that an export does can be seen from outside.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import psutil

from gap_export.checkpoint import Checkpoint, open_checkpoint
from gap_export.config import DTYPES, NamedConfig, count_ratios, load_target, resolve_family
from gap_export.errors import CheckpointError, ExportError
from gap_export.family import Family, ModelSpec
from gap_export.features import Feature, Pruner
from gap_export.graph.decoder import DecoderStage, cache_names
from gap_export.graph.vision import PruneStage, TowerStage
from gap_export.onnx_rules import DIALECT, prove_graph
from gap_export.reference import read_samples, record_reference
from gap_export.tracing import FREE_ROWS, OPSET, Traced, join, trace
from gap_export.weights import (
    WeightPlan,
    bind_weights,
    bring_weights,
    plan_weights,
    wanted_shapes,
    write_placeholders,
)
from gap_runtime.bundle import Bundle, describe_file, hash_file
from gap_runtime.check import CheckReport, check_bundle
from gap_runtime.display import Display, format_bytes
from gap_runtime.errors import BackendMissingError, BundleError, CheckError, ConfigError
from gap_runtime.layout import TokenLayout
from gap_runtime.manifest import (
    DECODER,
    MANIFEST_FILE,
    SCHEMA,
    VISION,
    BundleLayout,
    CacheShape,
    FileEntry,
    Manifest,
    Prompt,
    Pruning,
    RatioEntry,
    Reference,
    Source,
    Stage,
)
from gap_runtime.prompt import PromptEncoder, load_tokenizer
from gap_runtime.registry import load_plugin
from gap_runtime.tensors import ITEM_BYTES, TensorSpec

_TOKENIZER: Final = "tokenizer.json"
_REFERENCE: Final = "reference.npz"
_SAMPLES: Final = "samples"
_DECODER_FILE: Final = "decoder.onnx"
_LEAST_SUFFIX: Final = 64
_PHRASE_ROOM: Final = 32
_REMAINS: Final = re.compile(r"\.(partial|replaced)-(\d+)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRequest:
    """What to export and how, besides the configuration."""

    named: NamedConfig
    target: str
    out: Path | None
    weights: str
    reference: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportPlan:
    """Everything that follows from the request and the checkpoint's index, before any work."""

    request: ExportRequest
    checkpoint: Checkpoint
    family_name: str
    family: Family
    pruner: Pruner
    spec: ModelSpec
    dtype: str
    layout: BundleLayout
    pairs: list[tuple[float, int]]
    prompt: Prompt
    out: Path

    @property
    def cache_bytes_per_slot(self) -> int:
        """Bytes of the KV cache per slot, all layers."""
        spec = self.spec
        return 2 * spec.layers * spec.cache_heads * spec.head_dim * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportResult:
    """A finished export. `report` is null where parity was not checked, `note` says why."""

    plan: ExportPlan
    manifest: Manifest
    report: CheckReport | None
    note: str


def plan_export(request: ExportRequest) -> ExportPlan:
    """Read configs and indices and settle every number, without tracing or writing.

    Raises:
        GapError: Anything about the request or the checkpoint that cannot work.
    """
    config = request.named.config
    _require_target(request.target)
    checkpoint = open_checkpoint(config.checkpoint, config.revision)
    family_name = resolve_family(checkpoint.folder, config.family)
    family: Family = load_plugin("gap_export.models", family_name, "family")
    pruner: Pruner = load_plugin("gap_export.pruners", config.prune.strategy, "pruner")
    lacking = sorted(need.value for need in pruner.NEEDS - family.FEATURES)
    if lacking:
        raise ConfigError(
            f"pruner '{config.prune.strategy}' needs {', '.join(lacking)}, which family "
            f"'{family_name}' does not give; choose another --pruner"
        )
    spec = family.read_spec(checkpoint)
    pairs = count_ratios(config.prune, spec.patches)
    prompt, prefix, suffix = _plan_prompt(request, checkpoint, spec)
    most_kept = max(kept for _, kept in pairs)
    widest = TokenLayout(
        prefix=prefix,
        patches=spec.patches,
        kept=most_kept,
        extra=0,
        suffix=suffix,
        answer=config.prompt.answer,
    )
    layout = BundleLayout(
        prefix=prefix,
        patches=spec.patches,
        grid=spec.grid,
        extra=0,
        suffix=suffix,
        answer=config.prompt.answer,
        capacity=widest.capacity,
    )
    counts = "-".join(str(kept) for _, kept in pairs)
    default_out = Path(f"{request.named.name}-{counts}of{spec.patches}")
    out = (request.out or default_out).expanduser()
    _require_replaceable(out)
    return ExportPlan(
        request=request,
        checkpoint=checkpoint,
        family_name=family_name,
        family=family,
        pruner=pruner,
        spec=spec,
        dtype=config.dtype or _stored_dtype(checkpoint),
        layout=layout,
        pairs=pairs,
        prompt=prompt,
        out=out,
    )


def export(plan: ExportPlan, display: Display) -> ExportResult:
    """Make the bundle.

    Raises:
        GapError: The export failed; nothing was left behind and nothing was overwritten.
    """
    _require_replaceable(plan.out)
    with _folder_aside(plan.out) as folder, _start_hashing(plan) as hashes:
        with display.step("tracing the vision tower"):
            tower = _trace_tower(plan)
        with display.step("tracing the decoder"):
            decoder = _trace_decoder(plan)
        with display.step(f"joining {len(plan.pairs)} pruning stage(s)"):
            visions = {kept: join(tower, _trace_pruning(plan, kept)) for _, kept in plan.pairs}
        with display.step("proving the graphs"):
            weights = _plan_weights(plan, [*visions.values(), decoder])
            stages = _write_graphs(plan, weights, folder, visions, decoder)
        with display.step(f"bringing {format_bytes(weights.size)} of weights"):
            bring_weights(weights, folder, plan.request.weights)
        reference = None
        if plan.request.reference:
            with display.step("asking PyTorch"):
                reference = _record(plan, folder)
        if plan.prompt.tokenizer is not None:
            shutil.copyfile(plan.checkpoint.folder / _TOKENIZER, folder / _TOKENIZER)
        with display.step("hashing"):
            files = _describe_files(weights, folder, hashes)
        manifest = _make_manifest(plan, weights, stages, reference, files)
        report, note = _check(Bundle(folder=folder, manifest=manifest), display)
        # Last, so that a folder that was left behind never looks like a bundle.
        manifest.write(folder)
        _move_into_place(folder, plan.out)
    return ExportResult(plan=plan, manifest=manifest, report=report, note=note)


def _require_target(name: str) -> None:
    """Refuse a target whose graphs this version does not make."""
    target = load_target(name)
    if (target.dialect, target.opset) != (DIALECT, OPSET):
        raise ConfigError(
            f"target '{name}' takes the {target.dialect} dialect of opset {target.opset}; this "
            f"version exports {DIALECT} of opset {OPSET}"
        )


def _plan_prompt(
    request: ExportRequest, checkpoint: Checkpoint, spec: ModelSpec
) -> tuple[Prompt, int, int]:
    """The prompt record and the numbers of tokens before and (at most) after the image."""
    config = request.named.config.prompt
    template = config.template or spec.template
    tokenizer = checkpoint.folder / _TOKENIZER
    if not tokenizer.is_file():
        if request.reference:
            raise CheckpointError(
                f"{checkpoint.folder}: no {_TOKENIZER} in it; add the model's tokenizer, or "
                "export the graphs alone with --no-reference"
            )
        prompt = Prompt(template=template, image_token="", tokenizer=None, stop_ids=spec.stop_ids)
        prefix = spec.prefix if config.prefix is None else config.prefix
        return prompt, prefix, config.suffix or _LEAST_SUFFIX
    image_token = _image_token(tokenizer, spec.image_token_id)
    prompt = Prompt(
        template=template.replace("<image>", image_token),
        image_token=image_token,
        tokenizer=_TOKENIZER,
        stop_ids=spec.stop_ids,
    )
    encoded = PromptEncoder(tokenizer, prompt).encode("x")
    suffix = config.suffix or max(_LEAST_SUFFIX, len(encoded.suffix) + _PHRASE_ROOM)
    if len(encoded.suffix) > suffix:
        raise ConfigError(
            f"{request.named.name}: the prompt has {len(encoded.suffix)} tokens after the image "
            f"for the shortest phrase, prompt.suffix is {suffix}; raise it with "
            f"--set prompt.suffix={len(encoded.suffix) + _PHRASE_ROOM}"
        )
    return prompt, len(encoded.prefix), suffix


def _image_token(tokenizer: Path, token_id: int) -> str:
    try:
        token = load_tokenizer(tokenizer).id_to_token(token_id)
    except BundleError as error:
        raise CheckpointError(str(error)) from error
    if token is None:
        raise CheckpointError(
            f"{tokenizer}: no token {token_id}, which config.json names as the image token"
        )
    return str(token)


def _stored_dtype(checkpoint: Checkpoint) -> str:
    """The dtype that most of the checkpoint's bytes have: no conversion is the default."""
    sizes: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.length
    floats = {name: size for name, size in sizes.items() if name in DTYPES}
    return max(floats, key=lambda name: floats[name]) if floats else "float32"


def _trace_tower(plan: ExportPlan) -> Traced:
    spec, needs = plan.spec, plan.pruner.NEEDS
    return trace(
        lambda: TowerStage(plan.family.build_tower(spec, needs), needs),
        dtype=plan.dtype,
        inputs=[
            TensorSpec(
                name="pixels",
                dtype="float32",
                shape=(1, 3, spec.image_side, spec.image_side),
                meaning="normalized picture",
            )
        ],
        outputs=_between(plan),
        finish=lambda stage: plan.family.fill_constants(stage.tower),  # type: ignore[arg-type]
    )


def _trace_pruning(plan: ExportPlan, kept: int) -> Traced:
    layout, spec = plan.layout.at(kept), plan.spec
    return trace(
        lambda: PruneStage(
            plan.pruner,
            plan.family.build_projector(spec),
            config=plan.request.named.config.prune,
            layout=layout,
            grid=spec.grid,
        ),
        dtype=plan.dtype,
        inputs=_between(plan),
        outputs=[
            TensorSpec(
                name="visual_tokens",
                dtype="float32",
                shape=(1, layout.visual, spec.width),
                meaning="tokens of the kept patches, in slot order",
            ),
            TensorSpec(
                name="kept_index",
                dtype="int64",
                shape=(1, kept),
                meaning="patch that each visual slot holds",
            ),
            TensorSpec(
                name="position_ids",
                dtype="int64",
                shape=(1, layout.prompt),
                meaning="position of every slot of the longest prompt",
            ),
        ],
        nested=len(plan.pruner.NEEDS),
    )


def _between(plan: ExportPlan) -> list[TensorSpec]:
    """What the tower hands to the pruning stage."""
    spec = plan.spec
    patches = TensorSpec(
        name="patches",
        dtype=plan.dtype,
        shape=(1, spec.patches, spec.vision_width),
        meaning="patch features before the projector",
    )
    needs: list[Feature] = sorted(plan.pruner.NEEDS, key=lambda feature: feature.value)
    extras = [
        TensorSpec(
            name=need.value, dtype="float32", shape=(1, spec.patches), meaning="score by patch"
        )
        for need in needs
    ]
    return [patches, *extras]


def _trace_decoder(plan: ExportPlan) -> Traced:
    spec = plan.spec
    cache_shape = (1, spec.cache_heads, plan.layout.capacity, spec.head_dim)
    names = cache_names(spec.layers)
    caches = [
        TensorSpec(
            name=name,
            dtype=plan.dtype,
            shape=cache_shape,
            meaning=f"{name.split('_')[1]}s so far, layer {int(name.rpartition('_')[2])}",
        )
        for name in names
    ]
    widest = max(kept for _, kept in plan.pairs)
    tables = plan.family.rotary_tables(spec, plan.layout.at(widest).positions)
    return trace(
        lambda: DecoderStage(plan.family.build_decoder(spec, tables)),
        dtype=plan.dtype,
        inputs=[
            TensorSpec(
                name="embeddings",
                dtype="float32",
                shape=(1, FREE_ROWS, spec.width),
                meaning="prompt rows, or one token",
            ),
            TensorSpec(
                name="position_ids",
                dtype="int64",
                shape=(1, FREE_ROWS),
                meaning="rotary position of each row",
            ),
            TensorSpec(
                name="write_slot", dtype="int64", shape=(1,), meaning="cache slot of row 0"
            ),
            TensorSpec(
                name="logits_row", dtype="int64", shape=(1,), meaning="row whose logits are wanted"
            ),
            *caches,
        ],
        outputs=[
            TensorSpec(
                name="logits",
                dtype="float32",
                shape=(1, spec.vocabulary),
                meaning="of the wanted row",
            ),
            *(
                TensorSpec(
                    name=f"next_{cache.name}",
                    dtype=cache.dtype,
                    shape=cache.shape,
                    meaning="the same memory, with the rows written",
                )
                for cache in caches
            ),
        ],
        nested=len(caches),
    )


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


def _write_graphs(
    plan: ExportPlan,
    weights: WeightPlan,
    folder: Path,
    visions: dict[int, Traced],
    decoder: Traced,
) -> list[Stage]:
    """Write and prove every graph beside placeholders of the weights.

    Placeholders, because the ONNX checker refuses hard links, and because a graph that fails
    should do so before gigabytes are copied.
    """
    write_placeholders(weights, folder)
    stages = []
    for ratio, kept in plan.pairs:
        name = f"vision-{kept}of{plan.spec.patches}"
        stage = _describe_stage(name, VISION, f"{name}.onnx", visions[kept], ratio, kept)
        _write_graph(visions[kept], weights, folder / stage.file, stage, free=frozenset())
        stages.append(stage)
    stage = _describe_stage(DECODER, DECODER, _DECODER_FILE, decoder, None, None)
    _write_graph(decoder, weights, folder / stage.file, stage, free=frozenset({FREE_ROWS}))
    return [*stages, stage]


def _describe_stage(
    name: str, role: str, file: str, traced: Traced, ratio: float | None, kept: int | None
) -> Stage:
    return Stage(
        name=name,
        role=role,
        file=file,
        ratio=ratio,
        kept=kept,
        inputs=traced.inputs,
        outputs=traced.outputs,
    )


def _write_graph(
    traced: Traced, weights: WeightPlan, path: Path, stage: Stage, *, free: frozenset[str]
) -> None:
    bind_weights(traced, weights, path.parent)
    traced.model.graph.name = stage.name
    traced.model.producer_name = "gap-export"
    traced.model.producer_version = metadata.version("gap-export")
    ir.save(traced.model, path)
    prove_graph(path, inputs=stage.inputs, outputs=stage.outputs, opset=OPSET, free=free)


def _record(plan: ExportPlan, folder: Path) -> Reference:
    """Ask PyTorch about the samples, in float32 whatever the bundle's dtype."""
    config = plan.request.named.config
    samples = read_samples(config.check.samples)
    dtype = "float32"
    _require_memory(plan, dtype)
    model = plan.family.load_eager(plan.checkpoint, plan.spec, dtype)
    records, arrays = record_reference(
        model,
        plan.spec,
        samples,
        plan.pairs,
        pruner=plan.pruner,
        config=config.prune,
        template=plan.prompt.template,
        most=plan.layout.answer,
        image_folder=_SAMPLES,
        box=plan.spec.box,
    )
    (folder / _SAMPLES).mkdir()
    for path in {sample.path for sample in samples}:
        shutil.copyfile(path, folder / _SAMPLES / path.name)
    np.savez(folder / _REFERENCE, **arrays)  # type: ignore[arg-type]
    return Reference(arrays=_REFERENCE, dtype=dtype, samples=tuple(records))


def _require_memory(plan: ExportPlan, dtype: str) -> None:
    """Refuse a reference that the machine would be killed for."""
    tensors = plan.checkpoint.tensors.values()
    needed = sum(t.length // ITEM_BYTES[t.dtype] for t in tensors) * ITEM_BYTES[dtype]
    available = psutil.virtual_memory().available
    if needed > available:
        raise ExportError(
            f"{plan.checkpoint.folder}: PyTorch's reference in {dtype} takes "
            f"{format_bytes(needed)}, {format_bytes(available)} of memory is free; export with "
            "--no-reference, or on a larger machine"
        )


def _check(bundle: Bundle, display: Display) -> tuple[CheckReport | None, str]:
    """Run the finished bundle against the reference where that can be done here."""
    if bundle.manifest.reference is None:
        return None, "no reference was recorded"
    if bundle.manifest.dtype == "bfloat16":
        return None, "bfloat16 does not run on this CPU; check on the target"
    try:
        with display.step("checking against PyTorch on onnxruntime"):
            report = check_bundle(bundle, "onnxruntime:cpu")
    except BackendMissingError as error:
        return None, str(error)
    if not report.passed:
        failed = next(row for row in report.rows if not row.passed)
        raise CheckError(
            f"{bundle.manifest.name}: the exported graphs differ from PyTorch: {failed.sample} "
            f"at ratio {failed.ratio:g}: {'; '.join(failed.reasons)}; nothing was written"
        )
    return report, ""


@contextlib.contextmanager
def _start_hashing(plan: ExportPlan) -> Iterator[dict[Path, Future[str]]]:
    """Hash the checkpoint's files while graphs are traced; hashing needs no interpreter lock."""
    files = {
        tensor.file for tensor in plan.checkpoint.tensors.values() if tensor.dtype == plan.dtype
    }
    pool = ThreadPoolExecutor()
    try:
        yield {file: pool.submit(hash_file, file) for file in sorted(files)}
    finally:
        # A failed export does not wait for gigabytes that nobody asks for any more.
        pool.shutdown(wait=False, cancel_futures=True)


def _describe_files(
    weights: WeightPlan, folder: Path, hashes: dict[Path, Future[str]]
) -> dict[str, FileEntry]:
    """Size and hash of every file of the bundle."""
    entries = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        source = weights.shards.get(name)
        entries[name] = (
            describe_file(path)
            if source is None
            else FileEntry(size=path.stat().st_size, sha256=hashes[source].result())
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
            sha256=plan.checkpoint.identity,
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


def _require_replaceable(out: Path) -> None:
    """Refuse to write over anything but an empty folder or a bundle and nothing else."""
    if out.resolve() == Path.cwd():
        raise ConfigError(f"{out}: is the folder that you are in; give --out a folder in it")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / MANIFEST_FILE).is_file():
        raise ConfigError(f"{out}: exists and is no bundle; choose another --out")
    try:
        # Read loosely: a bundle of another schema may be replaced too.
        data = json.loads((out / MANIFEST_FILE).read_text(encoding="utf-8"))
        known = {MANIFEST_FILE, *data["files"]}
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"{out}: its {MANIFEST_FILE} cannot be read; remove it or choose another --out"
        ) from error
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if path.is_file() and name not in known:
            raise ConfigError(
                f"{out}: holds '{name}', which is no part of the bundle and would be lost; "
                "move it away or choose another --out"
            )


@contextlib.contextmanager
def _folder_aside(out: Path) -> Iterator[Path]:
    """A hidden folder beside the bundle, removed whatever happens."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _clear_remains(out)
        folder = out.parent / f".{out.name}.partial-{os.getpid()}"
        folder.mkdir()
    except OSError as error:
        raise ConfigError(f"{out.parent}: cannot be written ({error.strerror})") from error
    try:
        yield folder
    except OSError as error:
        raise ExportError(f"{out}: {error.strerror or error}; the export was undone") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _clear_remains(out: Path) -> None:
    """Remove what killed exports left, and put back a bundle that one had just moved away."""
    for path in out.parent.glob(f".{glob.escape(out.name)}.*"):
        found = _REMAINS.search(path.name)
        if found is None:
            continue
        # In a container each run may get the ID of the one that was killed.
        process = int(found.group(2))
        if process != os.getpid() and psutil.pid_exists(process):
            continue
        if found.group(1) == "replaced" and not out.exists():
            path.rename(out)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _move_into_place(folder: Path, out: Path) -> None:
    """Make the folder the bundle; an older one gives way only now."""
    old = out.parent / f".{out.name}.replaced-{os.getpid()}"
    if out.exists():
        out.rename(old)
    try:
        folder.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def summarize(result: ExportResult) -> dict[str, Any]:
    """The export's result as plain data, for `--json`."""
    report = result.report
    return {
        "bundle": str(result.plan.out),
        "ratios": [
            {"ratio": entry.ratio, "kept": entry.kept, "patches": entry.patches}
            for entry in result.manifest.ratios
        ],
        "checked": report is not None and report.passed,
        "not_checked_because": result.note or None,
        "rows": 0 if report is None else len(report.rows),
        "dtype": result.manifest.dtype,
        "positions": result.manifest.pruning.positions,
        "pruner": result.manifest.pruning.strategy,
    }
