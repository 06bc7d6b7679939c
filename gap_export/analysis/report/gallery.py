"""Pictures for the report: which answers are shown, and how they are drawn."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from PIL import Image

from gap_export.analysis.report.tables import MAIN_MODE
from gap_export.analysis.sweep import UNPRUNED, Sweep, Swept
from gap_runtime.errors import InputError
from gap_runtime.evaluation.results import Answers, Row
from gap_runtime.grounding.grounder import Grounder
from gap_runtime.pictures.boxes import Box, iou
from gap_runtime.pictures.drawing import draw_pair, shade_patches
from gap_runtime.pictures.load import find_bucket

_LOST: Final = 0.5
"""How much IoU pruning must cost for an answer to be shown as lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """An answer that is to be shown; `eager` is PyTorch's to the same question."""

    swept: Swept
    row: Row
    eager: Row | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A drawn answer; `overlap` is its IoU with the true box, `eager_overlap` that of PyTorch."""

    choice: Choice
    picture: Image.Image
    kept: int
    overlap: float
    eager_overlap: float | None


def choose_worst(sweep: Sweep, count: int) -> tuple[str, list[Choice]]:
    """The worst disagreements, and in what they disagree.

    PyTorch against the exported graphs where any answers differ; else the phrases whose box was
    lost by pruning, least pruning first. No phrase is shown twice.
    """
    differing = [
        (iou_of(each.row.found, each.eager.found), each)
        for swept in sweep.swept
        for each in _list_choices(swept)
        if each.eager is not None and each.eager.answer != each.row.answer
    ]
    if differing:
        differing.sort(key=lambda pair: (pair[0], pair[1].row.key))
        return "PyTorch and the exported graphs differ", _take(differing, count)
    before = next((s for s in sweep.swept if s.variant.name == UNPRUNED), None)
    if before is None:
        return "the smallest overlap with the true box", _take(_rank_by_overlap(sweep), count)
    overlaps = {row.key: _true_overlap(row) for row in _answered(before.exported)}
    lost = [
        (each.row.ratio - overlaps[each.row.key] / 1000, each)
        for swept in sweep.swept
        if swept.variant.positions == MAIN_MODE and swept is not before
        for each in _list_choices(swept)
        if overlaps.get(each.row.key, 0.0) - _true_overlap(each.row) >= _LOST
    ]
    lost.sort(key=lambda pair: pair[0])
    return "found without pruning, lost with GAP at the smallest ratios", _take(lost, count)


def choose_random(sweep: Sweep, count: int, seed: int) -> list[Choice]:
    """Some answers of any pruner, mode and ratio; the same ones for the same seed."""
    choices = [each for swept in sweep.swept for each in _list_choices(swept)]
    drawn = random.Random(seed)  # noqa: S311 - no secret
    return drawn.sample(choices, min(count, len(choices)))


def draw_choices(sweep: Sweep, choices: Iterable[Choice]) -> Iterator[Shown]:
    """Draw answers, in their order; those whose picture has gone meanwhile are left out.

    The vision graph is run again, for files of answers do not hold which patches were kept.
    """
    expressions = {each.key: each for each in sweep.plan.request.data.expressions}
    grounders: dict[str, Grounder] = {}
    for choice in choices:
        swept, row = choice.swept, choice.row
        name = swept.variant.name
        if name not in grounders:
            grounders[name] = Grounder(swept.bundle, sweep.plan.request.backend)
        manifest = swept.bundle.manifest
        try:
            picture = expressions[row.key].picture.load()
            bucket = find_bucket(picture.size, manifest.preprocess, manifest.buckets)
            entry = swept.bundle.choose_ratio(row.ratio, bucket.name)
            vision = grounders[name].run_vision(picture, row.phrase, entry)
        except InputError:
            continue
        kept = tuple(int(patch) for patch in vision.kept_index[0])
        canvas, scale = shade_patches(picture, manifest.preprocess, manifest.buckets, kept)
        draw_pair(
            canvas,
            scale,
            reference=choice.eager.found if choice.eager else (),
            found=row.found,
            true=(row.box,) if row.box else (),
        )
        yield Shown(
            choice=choice,
            picture=canvas,
            kept=len(kept),
            overlap=_true_overlap(row),
            eager_overlap=None if choice.eager is None else _true_overlap(choice.eager),
        )


def _list_choices(swept: Swept) -> Iterator[Choice]:
    eager = {(row.key, row.ratio): row for row in _answered(swept.eager)}
    for row in _answered(swept.exported):
        yield Choice(swept=swept, row=row, eager=eager.get((row.key, row.ratio)))


def _answered(answers: Answers | None) -> list[Row]:
    return [row for row in answers.rows if row.problem is None] if answers else []


def _rank_by_overlap(sweep: Sweep) -> list[tuple[float, Choice]]:
    ranked = [(_true_overlap(c.row), c) for swept in sweep.swept for c in _list_choices(swept)]
    return sorted(ranked, key=lambda pair: pair[0])


def _take(ranked: list[tuple[float, Choice]], count: int) -> list[Choice]:
    """The first ones, no phrase twice."""
    taken: dict[str, Choice] = {}
    for _, choice in ranked:
        if len(taken) == count:
            break
        taken.setdefault(choice.row.key, choice)
    return list(taken.values())


def iou_of(found: tuple[Box, ...], other: tuple[Box, ...]) -> float:
    """IoU of two answers of one box each; 0 where one has another number of boxes."""
    if len(found) != 1 or len(other) != 1:
        return 0.0
    return iou(found[0], other[0])


def _true_overlap(row: Row) -> float:
    return iou_of(row.found, (row.box,)) if row.box else 0.0
