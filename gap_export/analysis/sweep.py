"""Every pruner, position mode and ratio on the same phrases: exported, asked, and gone on with.

    DIR/sweep.json         what is swept; a folder of another sweep is refused
    DIR/bundles/NAME/      the exports; all share one copy of the weights
    DIR/answers/*.jsonl    the answers of each, a line as soon as it is known

A finished export is used again, and so is every answer: the sweep may be killed at any time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, TypedDict

from gap_export.analysis.evaluation import EagerAnswerer, describe_plan, open_answerer
from gap_export.config.pruners import IVC, PRUNERS, is_pruner_file, resolve_pruner
from gap_export.config.records import POSITION_MODES, NamedConfig
from gap_export.errors import CheckpointError
from gap_export.interfaces.pruner import load_pruner
from gap_export.pipeline.fingerprint import describe_pruner
from gap_export.pipeline.graph_cache import GraphCache
from gap_export.pipeline.model import read_model
from gap_export.pipeline.plan import ExportPlan, plan_export
from gap_export.pipeline.request import ExportRequest
from gap_export.pipeline.run import export
from gap_runtime.bundle.bundle import Bundle
from gap_runtime.bundle.layout import PositionMode
from gap_runtime.bundle.manifest import MANIFEST_FILE
from gap_runtime.display import Display, Pace
from gap_runtime.errors import ConfigError, GapError, InputError, suggest
from gap_runtime.evaluation.answer import Answerer, BundleAnswerer, describe_bundle
from gap_runtime.evaluation.data import Data
from gap_runtime.evaluation.results import Answers, DataFacts, Header, Subject
from gap_runtime.evaluation.run import Spread, describe_data, evaluate
from gap_runtime.records import dump_record
from gap_runtime.records.plain import read_json
from gap_runtime.registry import list_plugins
from gap_runtime.report.page import write_page

ALL: Final = "all"
"""Stands for every pruner that the model can serve."""
UNPRUNED: Final = "unpruned"
_SCHEMA: Final = 1
_SETTINGS_FILE: Final = "sweep.json"
_DECISIVE: Final = ("box", "image", "prompt", "prune", "quantize", "vision")
"""Tables of a model's configuration that answers depend on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepRequest:
    """What to sweep. `named` and `target` are those of every export, but for its pruning.

    `pruners` may hold `all`; where there is none, the model's own is taken. `ratios` are shares
    removed, or `keep` counts that stay. `seeds` are for pruners that draw, each of which is swept
    once with every one. `eager`: ask PyTorch too.
    """

    named: NamedConfig
    target: str
    pruners: tuple[str, ...]
    positions: tuple[str, ...]
    ratios: tuple[float, ...]
    keep: tuple[int, ...]
    seeds: tuple[int, ...]
    data: Data
    backend: str
    eager: bool
    out: Path
    resume: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One export: a pruner and a position mode at all ratios, or no pruning.

    `pruner` is its name for people. `draw` is the name without the seed and the seed, where a
    pruner draws and is swept with several.
    """

    name: str
    pruner: str
    draw: tuple[str, int] | None
    positions: str
    plan: ExportPlan

    @property
    def ratios(self) -> tuple[float, ...]:
        """Of its bundle."""
        return self.plan.ratios


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPlan:
    """What will be exported and asked. `left_out` says why pruners of `all` cannot be served."""

    request: SweepRequest
    variants: tuple[Variant, ...]
    left_out: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Swept:
    """A variant's bundle and its answers; `eager` are PyTorch's."""

    variant: Variant
    bundle: Bundle
    exported: Answers
    eager: Answers | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """A finished sweep, unpruned first."""

    plan: SweepPlan
    swept: tuple[Swept, ...]


def plan_sweep(request: SweepRequest) -> SweepPlan:
    """Plan every export before any work.

    Raises:
        GapError: A pruner, a mode or a ratio cannot be used.
    """
    known = {str(mode): mode for mode in POSITION_MODES}
    for mode in request.positions:
        if mode not in known:
            raise ConfigError(f"--positions '{mode}' is unknown; {suggest(mode, known)}")
    if not request.named.config.family:
        request = replace(request, named=read_model(request.named).named)
    usual = request.named.config.prune.strategy
    ratios = tuple(dict.fromkeys(request.ratios))
    pruned = tuple(ratio for ratio in ratios if ratio)
    variants: list[Variant] = []
    if len(pruned) < len(ratios) or request.keep:
        # In raster order nothing of the pruner is left where nothing is removed.
        variants.append(
            _plan_variant(request, UNPRUNED, _find_plain_pruner(), "gap", ratios=(0.0,), keep=())
        )
    left_out: dict[str, GapError] = {}
    for pruner in _list_pruners(request.pruners or [usual]) if pruned or request.keep else ():
        try:
            variants += [
                _plan_variant(
                    request, None, pruner, known[mode], ratios=pruned, keep=request.keep, seed=seed
                )
                for seed in _list_seeds(request, pruner)
                for mode in dict.fromkeys(request.positions)
            ]
        except (ConfigError, CheckpointError) as error:
            # Of a family that cannot serve it, or without the part that it reads with.
            if ALL not in request.pruners:
                raise
            left_out[pruner] = error
    if left_out and all(variant.name == UNPRUNED for variant in variants):
        raise next(iter(left_out.values()))
    reasons = tuple(f"{pruner} is left out: {error}" for pruner, error in left_out.items())
    return SweepPlan(request=request, variants=tuple(variants), left_out=reasons)


def _list_pruners(wanted: Sequence[str]) -> list[str]:
    if ALL in wanted:
        return list_plugins(PRUNERS)
    return list(dict.fromkeys(resolve_pruner(name) for name in wanted))


def _list_seeds(request: SweepRequest, pruner: str) -> list[int]:
    """The seeds that a pruner is swept with: one where it draws nothing."""
    seeds = list(dict.fromkeys(request.seeds)) or [request.named.config.prune.seed]
    return seeds if getattr(load_pruner(pruner), "DRAWS", False) else seeds[:1]


def _find_plain_pruner() -> str:
    """A pruner that every model can serve: the first that looks at nothing."""
    for name in list_plugins(PRUNERS):
        pruner = load_pruner(name)
        if not pruner.NEEDS and not pruner.EXTRA:
            return name
    raise AssertionError("a pruner without needs is part of the distribution")


def _plan_variant(
    request: SweepRequest,
    name: str | None,
    pruner: str,
    positions: PositionMode,
    *,
    ratios: tuple[float, ...],
    keep: tuple[int, ...],
    seed: int | None = None,
) -> Variant:
    config = request.named.config
    prune = replace(config.prune, strategy=pruner, positions=positions, ratios=ratios, keep=keep)
    draw = None
    if seed is not None:
        prune = replace(prune, seed=seed)
        if len(_list_seeds(request, pruner)) > 1:
            draw = prune.name, seed
    if name is None:
        # A file of the user's that has changed is another variant.
        own = f"{Path(pruner).stem}-{describe_pruner(prune).rpartition('-')[2][:8]}"
        own += IVC if prune.keeps_coordinates else ""
        name = f"{own if is_pruner_file(pruner) else pruner}-{positions}"
        name += "" if draw is None else f"-seed{seed}"
    plan = plan_export(
        ExportRequest(
            named=replace(request.named, config=replace(config, prune=prune)),
            target=request.target,
            out=request.out / "bundles" / name,
            bring="link",
            reference=False,
        )
    )
    shown = UNPRUNED if name == UNPRUNED else prune.name
    shown += "" if draw is None else f" (seed {seed})"
    return Variant(name=name, pruner=shown, draw=draw, positions=positions, plan=plan)


def run_sweep(plan: SweepPlan, display: Display, *, spread: Spread | None = None) -> Sweep:
    """Export and ask everything that is not there yet.

    Args:
        plan: What to do.
        display: Shows how far it is.
        spread: Does the asking elsewhere.

    Raises:
        ConfigError: The folder is there and is not to be gone on with.
        InputError: It is another sweep's.
        GapError: An export or a backend failed; what is done stays.
    """
    request = plan.request
    _open_folder(plan)
    known, swept = GraphCache(), []
    for k, variant in enumerate(plan.variants, start=1):
        where = f"{variant.name} ({k} of {len(plan.variants)})"
        bundle = _bring_bundle(variant, known, display, where, _folders(plan))
        folder = bundle.folder.resolve()
        exported = _ask(
            plan,
            f"{where}, {request.backend}",
            describe_bundle(bundle, request.backend),
            variant,
            request.out / "answers" / f"{variant.name}.jsonl",
            partial(BundleAnswerer, folder, request.backend),
            display=display,
            spread=spread,
        )
        eager = None
        if request.eager:
            eager = _ask(
                plan,
                f"{where}, PyTorch",
                describe_plan(variant.plan),
                variant,
                request.out / "answers" / f"{variant.name}.pytorch.jsonl",
                # Workers share a machine's cores, and say nothing.
                partial(open_answerer, variant.plan.request, threads=1)
                if spread
                else partial(EagerAnswerer, variant.plan, display=display),
                display=display,
                spread=spread,
            )
        swept.append(Swept(variant=variant, bundle=bundle, exported=exported, eager=eager))
    return Sweep(plan=plan, swept=tuple(swept))


def _ask(
    plan: SweepPlan,
    what: str,
    subject: Subject,
    variant: Variant,
    path: Path,
    open_answerer: Callable[[], Answerer],
    *,
    display: Display,
    spread: Spread | None,
) -> Answers:
    """All answers of one side to one variant, those that are there already and the others."""
    data = plan.request.data
    header = Header(subject=subject, data=describe_data(data), box=variant.plan.spec.box)
    with display.progress(what) as show:
        return evaluate(
            data,
            header,
            open_answerer,
            ratios=variant.ratios,
            path=path,
            # The folder as a whole was asked about.
            resume=True,
            spread=spread,
            begin=lambda left: Pace(show, left, "answers"),
        )


def _bring_bundle(
    variant: Variant, known: GraphCache, display: Display, where: str, others: list[Path]
) -> Bundle:
    """The variant's bundle; a finished one is used again."""
    out = variant.plan.out
    with suppress(OSError):
        # Of a sweep that was killed.
        _name_aside(out).unlink(missing_ok=True)
    if not (out / MANIFEST_FILE).is_file():
        with display.step(f"{where}, exporting"):
            export(_choose_bring(variant.plan), known=known)
            share_files(out, [other for other in others if other != out])
    return Bundle.open(out)


def _name_aside(bundle: Path) -> Path:
    """Where a link beside a bundle is made first: the next sweep clears what a kill left."""
    return bundle.parent / f".{bundle.name}.link"


def _choose_bring(plan: ExportPlan) -> ExportPlan:
    """Hard links to the checkpoint's files where the system makes them, else copies."""
    plan.out.parent.mkdir(parents=True, exist_ok=True)
    trial = _name_aside(plan.out)
    files = {tensor.file for source in plan.sources.values() for tensor in source.inputs}
    try:
        for file in sorted(files):
            os.link(file, trial)
            trial.unlink()
    except OSError:
        # Where it was not made, or could not be removed a moment ago.
        with suppress(OSError):
            trial.unlink(missing_ok=True)
        return replace(plan, request=replace(plan.request, bring="copy"))
    return plan


def share_files(folder: Path, others: Sequence[Path]) -> None:
    """Put hard links into a bundle for files that another bundle has too, where that can be done.

    Args:
        folder: The bundle.
        others: Bundles; those that are not there are passed over.
    """
    here = Bundle.open(folder).manifest.files
    for other in others:
        if not (other / MANIFEST_FILE).is_file():
            continue
        for name, entry in Bundle.open(other).manifest.files.items():
            if here.get(name) != entry:
                continue
            if (folder / name).samefile(other / name):
                continue
            aside = _name_aside(folder)
            try:
                os.link(other / name, aside)
                aside.replace(folder / name)
            except OSError:
                aside.unlink(missing_ok=True)
                return


def _folders(plan: SweepPlan) -> list[Path]:
    return [variant.plan.out for variant in plan.variants]


class SweepFacts(TypedDict):
    """What makes answers of two sweeps comparable; pruners and modes may be added.

    `checkpoint` is a hash of its index, `config` those tables of the model file that answers
    depend on. `ratios` or `keep` is what was asked for.
    """

    gap_sweep: int
    model: str
    checkpoint: str
    config: dict[str, Any]
    target: str
    dtype: str
    ratios: list[float]
    keep: list[int]
    data: DataFacts
    backend: str


def describe_sweep(plan: SweepPlan) -> SweepFacts:
    """What makes answers of two runs comparable; pruners and modes may be added."""
    request, one = plan.request, plan.variants[0].plan
    whole = dump_record(request.named.config)
    # Places of files are not compared, what lies in them is: by the index below.
    config = {key: whole[key] for key in _DECISIVE}
    for key in ("strategy", "positions", "ratios", "keep"):
        del config["prune"][key]
    if request.seeds:
        config["prune"]["seed"] = list(request.seeds)
    return {
        "gap_sweep": _SCHEMA,
        "model": request.named.name,
        "checkpoint": one.checkpoint.index_sha256,
        "config": config,
        "target": request.target,
        "dtype": one.dtype,
        "ratios": sorted(set(request.ratios)),
        "keep": sorted(set(request.keep)),
        "data": dump_record(describe_data(request.data)),
        "backend": request.backend,
    }


def _open_folder(plan: SweepPlan) -> None:
    """Make the sweep's folder, or see that it is this sweep's."""
    out, resume = plan.request.out, plan.request.resume
    path, wanted = out / _SETTINGS_FILE, describe_sweep(plan)
    if not path.is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"{out}: exists and is no sweep; give another --out")
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{out}: cannot be written ({error.strerror})") from error
        write_page(path, json.dumps(wanted, indent=2, sort_keys=True) + "\n")
        return
    if not resume:
        raise ConfigError(f"{out}: exists; go on with it by --resume, or give another --out")
    found = read_json(path, InputError, advice="give another --out")
    if not isinstance(found, dict) or found.get("gap_sweep") != _SCHEMA:
        raise InputError(f"{path}: was written by another version; give another --out")
    for key, value in wanted.items():
        if found.get(key) != value:
            raise InputError(
                f"{out}: is a sweep of another {key}: {_shorten(found.get(key))}, now "
                f"{_shorten(value)}; give another --out"
            )


def _shorten(value: Any) -> str:
    return f"{json.dumps(value):.80}"
