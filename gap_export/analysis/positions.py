"""Position IDs laid out for a person: what `gap-export positions` shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gap_export.config.records import GRID_MODE, POSITION_MODES
from gap_export.graph.coordinates import choose
from gap_export.interfaces.family import geometry_of
from gap_export.interfaces.features import VisionFeatures
from gap_export.pipeline.asking import open_reference
from gap_export.pipeline.plan import ExportPlan
from gap_export.reference.choice import EXTRA_INDEX, Chosen, place_tokens
from gap_runtime.bundle.manifest import RatioEntry
from gap_runtime.display import Display
from gap_runtime.pictures.load import find_bucket, load_picture


@dataclass(frozen=True, slots=True, kw_only=True)
class ModePositions:
    """One mode's slots and position IDs.

    `visual_slots` are visual tokens by slot, -1 for an extra token. The IDs are those of the
    text before the picture, of the visual slots on each axis, of the text after, and of the first
    token of the answer; text has the same on every axis.
    """

    mode: str
    visual_slots: tuple[int, ...]
    prefix_ids: tuple[int, ...]
    visual_ids: tuple[tuple[int, ...], ...]
    suffix_ids: tuple[int, ...]
    first_answer_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionTable:
    """All modes at one ratio. `example` says where the kept tokens are from."""

    ratio: float
    bucket: str
    patches: int
    kept: int
    extra: int
    example: str
    modes: tuple[ModePositions, ...]


def tabulate_positions(
    plan: ExportPlan, phrase: str, image: Path | None, display: Display | None = None
) -> list[PositionTable]:
    """Every mode at every ratio.

    Args:
        plan: Of an export, which is not made.
        phrase: To count the text after the picture.
        image: A picture that PyTorch prunes; without one the kept tokens are an example, unless
            the pruner keeps the same ones of every picture.
        display: Says so where weights are read layer by layer.

    Raises:
        GapError: The picture or the phrase cannot be used, or its layers do not fit in memory.
    """
    if plan.tokenizer is None:
        suffix = plan.layout.suffix
    else:
        suffix = len(plan.encoder.encode(phrase).suffix)
    tables = []
    for entry, chosen, example in _choices(plan, phrase, image, display):
        modes = tuple(
            _map(plan, entry, chosen, suffix, mode)
            for mode in POSITION_MODES
            if mode != GRID_MODE or plan.spec.decoder.axes > 1
        )
        tables.append(
            PositionTable(
                ratio=entry.ratio,
                bucket=entry.bucket,
                patches=entry.patches,
                kept=entry.kept,
                extra=entry.extra,
                example=example,
                modes=modes,
            )
        )
    return tables


def _map(
    plan: ExportPlan, entry: RatioEntry, chosen: Chosen, suffix: int, mode: str
) -> ModePositions:
    prefix = plan.layout.prefix
    slots, ids = place_tokens(
        prefix,
        entry.patches,
        suffix,
        chosen.order,
        mode,
        extra_place=chosen.extra_place,
        grid=plan.spec.position_grid(plan.bucket(entry)),
    )
    visual = prefix + len(slots)
    return ModePositions(
        mode=mode,
        visual_slots=tuple(slots),
        prefix_ids=tuple(ids[0][:prefix]),
        visual_ids=tuple(tuple(axis[prefix:visual]) for axis in ids),
        suffix_ids=tuple(ids[0][visual:]),
        first_answer_id=ids[0][-1] + 1,
    )


def _choices(
    plan: ExportPlan, phrase: str, image: Path | None, display: Display | None
) -> list[tuple[RatioEntry, Chosen, str]]:
    """What is kept at each ratio, and what that is an example of."""
    if image is not None:
        picture = load_picture(image)
        bucket = find_bucket(picture.size, plan.spec.preprocess, plan.spec.buckets)
        reference = open_reference(plan, display)
        question = reference.ask(picture, phrase, bucket)
        return [
            (entry, reference.choose(question, entry), f"kept of {image.name}")
            for entry in plan.entries
            if entry.bucket == bucket.name
        ]
    if not plan.pruner.NEEDS:
        return [
            (entry, _constant_choice(plan, entry), "kept of every picture")
            for entry in plan.entries
        ]
    example = "an example, evenly spread; --image shows what is kept of a picture"
    return [(entry, _even_choice(plan, entry), example) for entry in plan.entries]


def _constant_choice(plan: ExportPlan, entry: RatioEntry) -> Chosen:
    """What a pruner keeps that looks at nothing."""
    bucket = plan.bucket(entry)
    geometry = geometry_of(bucket)
    features = VisionFeatures(
        patches_BNC=torch.empty(1, geometry.tokens, 0), geometry=geometry, values={}, text_sign=1
    )
    kept = entry.kept - len(bucket.fixed)
    stay = plan.coordinates.get(bucket.name, ())
    order = choose(plan.pruner, features, kept, plan.prune, stay).order
    assert isinstance(order, tuple)
    removable = bucket.removable
    own = [removable[index] for index in order] + list(bucket.fixed)
    return Chosen(order=own, tokens={}, extra_place=None, scores=None)


def _even_choice(plan: ExportPlan, entry: RatioEntry) -> Chosen:
    """Tokens in even steps, the last first, so that raster and own order differ."""
    bucket = plan.bucket(entry)
    removable = bucket.removable
    kept = entry.kept - len(bucket.fixed)
    even = [removable[(2 * j + 1) * len(removable) // (2 * kept)] for j in range(kept)]
    index = None
    if entry.extra:
        middle = entry.patches // 2 + 0.5
        rules = {"append": float(entry.patches), "last-visual": entry.patches - 0.5}
        index = rules.get(plan.prune.extra_token, middle)
    return Chosen(
        order=[*reversed(even), *bucket.fixed], tokens={}, extra_place=index, scores=None
    )


def name_axes(table: PositionTable) -> list[str]:
    """What to call the axes of visual IDs; nothing where there is one."""
    axes = len(table.modes[0].visual_ids)
    return [""] if axes == 1 else [" by time", " by row", " by column"]


def shorten(numbers: Sequence[int], most: int = 9) -> str:
    """Numbers for a table: runs as `0..34`, long lists with their middle left out."""
    numbers = list(numbers)
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        return f"{numbers[0]}..{numbers[-1]}"
    shown = ["extra" if number == EXTRA_INDEX else str(number) for number in numbers]
    if len(shown) > most:
        shown = [*shown[: most - 3], "..", *shown[-3:]]
    return " ".join(shown)
