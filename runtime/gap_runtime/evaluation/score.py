"""Figures of a set of answers, by ratio and by what the data know of their phrases."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from gap_runtime.evaluation.expression import Expression
from gap_runtime.evaluation.protocol import DEGENERATE, UNPARSABLE, ScoringProtocol
from gap_runtime.evaluation.results import Row
from gap_runtime.evaluation.statistics import mean, wilson_interval
from gap_runtime.pictures.boxes import BoxFormat, PictureFrame

SIZES: Final = (("small", 0.0), ("medium", 0.03), ("large", 0.15))
"""Size classes of true boxes: the least share of the picture's area of each."""
_THRESHOLDS: Final = (0.25, 0.5, 0.75, 0.9)
_MEAN_OVER: Final = tuple(percent / 100 for percent in range(50, 100, 5))
"""Thresholds that the mean accuracy is over, as in COCO."""

PUBLISHED: Final = "published"
"""The labels as the data have them."""
REVIEWED: Final = "reviewed"
"""Without the labels that a review found wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartScore:
    """Accuracy of a part of the data that papers quote by itself; an interval of 95 %."""

    part: str
    phrases: int
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeScore:
    """Accuracy of one size class of true boxes; an interval of 95 %."""

    size: str
    phrases: int
    accuracy: float
    low: float
    high: float
    mean_iou: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Figures of one ratio under one protocol, with one set of labels.

    `frame` is the one that boxes were compared in. `labels` are `published`, or `reviewed` without
    the `left_out` phrases that a review found wrong. `accuracy` is Acc@0.5, `low` and `high` its
    95 % interval (Wilson), `mean_accuracy` the mean over 0.5 to 0.95. Where `measure` is `point`,
    `accuracy` is the share of points in the true box, and what needs an IoU is NaN. `unasked`
    phrases (a bad picture, a phrase too long) are in no other figure. `tokens` and `milliseconds`
    are means per phrase, `median_ms` is of the whole of a phrase, of several of a picture that of
    a later one. `calls` of the decoder, `drafted` tokens and those of them that were `accepted`
    are means too, 0 where nobody counted them.
    """

    protocol: str
    frame: str
    measure: str
    labels: str
    left_out: int
    ratio: float
    phrases: int
    unasked: int
    hits: int
    accuracy: float
    low: float
    high: float
    accuracy_25: float
    accuracy_75: float
    accuracy_90: float
    mean_accuracy: float
    mean_iou: float
    unparsable: int
    degenerate: int
    sizes: tuple[SizeScore, ...]
    parts: tuple[PartScore, ...]
    tokens: float
    calls: float
    drafted: float
    accepted: float
    milliseconds: dict[str, float]
    median_ms: float


@dataclass(frozen=True, slots=True)
class Judged:
    """IoU [n], status by phrase, and who counts at each threshold, bool [4, n]."""

    iou: np.ndarray
    status: list[str]
    hits: np.ndarray


def judge_rows(rows: Sequence[Row], protocol: ScoringProtocol, box: BoxFormat) -> Judged:
    """Judge answered rows."""
    judge = protocol.judge
    judged = [
        judge(row.answer or "", row.frame or PictureFrame.whole(row.size), row.box, box)
        for row in rows
        if row.size is not None and row.box is not None
    ]
    ious = np.array([each.iou for each in judged], np.float64)
    hits = np.stack([_count_over(ious, threshold, protocol) for threshold in _THRESHOLDS])
    return Judged(ious, [each.status for each in judged], hits)


def score_rows(
    rows: Iterable[Row],
    name: str,
    protocol: ScoringProtocol,
    box: BoxFormat,
    expressions: Iterable[Expression] = (),
) -> list[Score]:
    """Figures of every ratio, in ascending order of the ratio.

    Where the data were reviewed, a ratio has two: with all labels and without the wrong ones.

    Args:
        rows: Answers, of any ratios.
        name: Of the protocol.
        protocol: Judges the answers.
        box: How the answers write boxes.
        expressions: What was asked: says which labels are wrong, and which part a phrase is of.
    """
    known = {each.key: each for each in expressions}
    parts = {key: each.part for key, each in known.items() if each.part}
    by_ratio: dict[float, list[Row]] = {}
    for row in rows:
        by_ratio.setdefault(row.ratio, []).append(row)
    return [
        _score(ratio, chosen, name, protocol, box, labels=labels, left_out=left_out, parts=parts)
        for ratio in sorted(by_ratio)
        for labels, chosen, left_out in choose_labels(by_ratio[ratio], known)
    ]


def choose_labels(
    rows: list[Row], known: Mapping[str, Expression]
) -> Iterator[tuple[str, list[Row], int]]:
    """The sets of labels that there are: name, rows, and how many rows are left out."""
    yield PUBLISHED, rows, 0
    reviewed = {key: each.wrong for key, each in known.items() if each.wrong is not None}
    if reviewed:
        right = [row for row in rows if reviewed.get(row.key) is False]
        yield REVIEWED, right, len(rows) - len(right)


def name_frame(protocol: ScoringProtocol, box: BoxFormat) -> str:
    """The frame that a protocol compares boxes in."""
    return protocol.FRAME or box.frame


def _score(
    ratio: float,
    rows: list[Row],
    name: str,
    protocol: ScoringProtocol,
    box: BoxFormat,
    *,
    labels: str,
    left_out: int,
    parts: Mapping[str, str],
) -> Score:
    asked = [row for row in rows if row.problem is None]
    judged = judge_rows(asked, protocol, box)
    count, hits = len(asked), int(judged.hits[1].sum())
    low, high = wilson_interval(hits, count)
    times = [row.milliseconds or {} for row in asked]
    stages = list(dict.fromkeys(stage for each in times for stage in each))
    totals = [each.get("total", math.nan) for each in times]
    is_iou = protocol.MEASURE == "iou"
    return Score(
        protocol=name,
        frame=name_frame(protocol, box),
        measure=protocol.MEASURE,
        labels=labels,
        left_out=left_out,
        ratio=ratio,
        phrases=count,
        unasked=len(rows) - count,
        hits=hits,
        accuracy=mean(judged.hits[1]),
        low=low,
        high=high,
        accuracy_25=mean(judged.hits[0]) if is_iou else math.nan,
        accuracy_75=mean(judged.hits[2]) if is_iou else math.nan,
        accuracy_90=mean(judged.hits[3]) if is_iou else math.nan,
        mean_accuracy=_mean_over_thresholds(judged, protocol) if is_iou else math.nan,
        mean_iou=mean(judged.iou) if is_iou else math.nan,
        unparsable=judged.status.count(UNPARSABLE),
        degenerate=judged.status.count(DEGENERATE),
        sizes=tuple(_score_sizes(asked, judged, is_iou=is_iou)),
        parts=tuple(_score_parts(asked, judged, parts)),
        tokens=mean(np.array([len(row.token_ids) for row in asked])),
        calls=mean(np.array([row.calls for row in asked])),
        drafted=mean(np.array([row.drafted for row in asked])),
        accepted=mean(np.array([row.accepted for row in asked])),
        milliseconds={
            stage: mean(np.array([each.get(stage, 0.0) for each in times])) for stage in stages
        },
        median_ms=float(np.median(totals)) if totals else math.nan,
    )


def _count_over(iou: np.ndarray, threshold: float, protocol: ScoringProtocol) -> np.ndarray:
    """Who counts at a threshold, bool [n]."""
    over = np.greater if protocol.STRICT else np.greater_equal
    counted: np.ndarray = over(iou, threshold)
    return counted


def _mean_over_thresholds(judged: Judged, protocol: ScoringProtocol) -> float:
    hits = [_count_over(judged.iou, threshold, protocol) for threshold in _MEAN_OVER]
    return mean(np.stack(hits).ravel())


def _score_parts(rows: list[Row], judged: Judged, parts: Mapping[str, str]) -> Iterable[PartScore]:
    """The parts that the data have, by name."""
    for part in sorted(set(parts.values())):
        members = np.array([parts.get(row.key) == part for row in rows], bool)
        hits = judged.hits[1][members]
        if len(hits):
            low, high = wilson_interval(int(hits.sum()), len(hits))
            yield PartScore(part=part, phrases=len(hits), accuracy=mean(hits), low=low, high=high)


def _score_sizes(rows: list[Row], judged: Judged, *, is_iou: bool) -> Iterable[SizeScore]:
    """Size classes that have phrases."""
    shares = np.array([_share(row) for row in rows])
    classes = np.searchsorted([least for _, least in SIZES], shares, side="right") - 1
    for k, (size, _) in enumerate(SIZES):
        members = classes == k
        if members.any():
            hits = judged.hits[1][members]
            low, high = wilson_interval(int(hits.sum()), len(hits))
            yield SizeScore(
                size=size,
                phrases=len(hits),
                accuracy=mean(hits),
                low=low,
                high=high,
                mean_iou=mean(judged.iou[members]) if is_iou else math.nan,
            )


def _share(row: Row) -> float:
    """Share of the picture's area that the true box has."""
    assert row.box is not None
    assert row.size is not None
    x0, y0, x1, y1 = row.box
    return (x1 - x0) * (y1 - y0) / (row.size[0] * row.size[1])
