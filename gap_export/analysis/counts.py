"""A fixed count in place of an adaptive rule: what `gap-export count` proposes.

Graphs are static, so a method that keeps another number of tokens of every picture needs one
number. The published rule is run on the user's own pictures; its counts are what to choose from.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from gap_export.config.pruners import IVC, PRUNERS
from gap_export.interfaces.features import AdaptivePruner
from gap_export.interfaces.pruner import load_pruner
from gap_export.pipeline.asking import open_reference
from gap_export.pipeline.plan import ExportPlan
from gap_export.reference.samples import SAMPLES_FILE, Sample, read_samples
from gap_runtime.bundle.layout import find_ratio
from gap_runtime.display import Display
from gap_runtime.errors import ConfigError, InputError
from gap_runtime.pictures.load import load_picture
from gap_runtime.registry import list_plugins


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketCounts:
    """What the rule kept of the pictures of one bucket, and the ratios that keep as many."""

    bucket: str
    patches: int
    pictures: int
    least: int
    mean: float
    ninth_decile: float
    most: int
    ratio_of_mean: float
    ratio_of_ninth_decile: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureCount:
    """What the rule kept of one picture."""

    picture: str
    bucket: str
    kept: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What was counted, by bucket and by picture.

    `skipped` says which pictures could not be used, and why.
    """

    pruner: str
    buckets: tuple[BucketCounts, ...]
    pictures: tuple[PictureCount, ...]
    skipped: tuple[str, ...]


def count_tokens(
    plan: ExportPlan,
    folder: Path,
    phrase: str | None,
    display: Display | None = None,
    begin: Callable[[int], Callable[[int], None]] = lambda _: lambda _: None,
) -> Counts:
    """Run a pruner's adaptive rule on the pictures of a folder.

    Args:
        plan: Of an export, which is not made.
        folder: Pictures, or pictures and phrases in `samples.json`.
        phrase: For pruners that read one, where the folder names none.
        display: Says so where weights are read layer by layer.
        begin: Told how many pictures there are; what it gives is told how many more are done.

    Raises:
        ConfigError: The pruner has no adaptive rule, or needs a phrase.
        InputError: No picture of the folder can be used.
    """
    strategy = plan.prune.name
    if plan.prune.keeps_coordinates:
        raise ConfigError(
            f"pruner '{strategy}': the published rules know nothing of {IVC}; count without it"
        )
    if not hasattr(plan.pruner, "count_adaptively"):
        raise ConfigError(
            f"pruner '{strategy}' has no adaptive rule ({', '.join(_list_adaptive())} have one); "
            "choose a --ratio or --keep yourself"
        )
    pruner: AdaptivePruner = plan.pruner  # type: ignore[assignment]
    samples = list(_read_folder(folder, phrase))
    if plan.phrase is not None and not all(sample.phrase for sample in samples):
        raise ConfigError(f"pruner '{strategy}' reads the phrase; give one with --phrase")
    reference = open_reference(plan, display)
    counts: dict[str, list[int]] = {}
    pictures = []
    skipped = []
    advance = begin(len(samples))
    for sample in samples:
        try:
            picture = load_picture(sample.path)
            bucket = reference.find_bucket(picture)
        except InputError as error:
            skipped.append(str(error))
            advance(1)
            continue
        vision = reference.ask(picture, sample.phrase or "x", bucket).vision
        found = max(1, pruner.count_adaptively(vision)) + len(bucket.fixed)
        counts.setdefault(bucket.name, []).append(found)
        advance(1)
        pictures.append(PictureCount(picture=str(sample.path), bucket=bucket.name, kept=found))
    if not counts:
        raise InputError(f"{folder}: none of {len(samples)} pictures can be used; {skipped[0]}")
    buckets = {bucket.name: bucket.patches for bucket in plan.spec.buckets}
    return Counts(
        pruner=strategy,
        buckets=tuple(_summarize(name, buckets[name], found) for name, found in counts.items()),
        pictures=tuple(pictures),
        skipped=tuple(skipped),
    )


def _list_adaptive() -> list[str]:
    """The pruners whose method chooses the count."""
    return [
        name for name in list_plugins(PRUNERS) if hasattr(load_pruner(name), "count_adaptively")
    ]


def _read_folder(folder: Path, phrase: str | None) -> Iterable[Sample]:
    """The samples of a folder, or every picture in it."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if (folder / SAMPLES_FILE).is_file():
        return read_samples(str(folder))
    known = Image.registered_extensions()
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in known)
    if not paths:
        raise InputError(f"{folder}: no pictures in it")
    return [Sample(name=path.stem, path=path, phrase=phrase or "") for path in paths]


def _summarize(name: str, patches: int, counts: list[int]) -> BucketCounts:
    mean = statistics.fmean(counts)
    decile = (
        statistics.quantiles(counts, n=10, method="inclusive")[-1]
        if len(counts) > 1
        else float(counts[0])
    )
    return BucketCounts(
        bucket=name,
        patches=patches,
        pictures=len(counts),
        least=min(counts),
        mean=mean,
        ninth_decile=decile,
        most=max(counts),
        ratio_of_mean=find_ratio(patches, round(mean)),
        ratio_of_ninth_decile=find_ratio(patches, min(round(decile), patches)),
    )
