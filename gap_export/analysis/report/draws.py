"""Pruners that draw, over all seeds that they were swept with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gap_export.analysis.sweep import Sweep, Swept
from gap_runtime.evaluation.protocol import load_protocol
from gap_runtime.evaluation.score import judge_rows
from gap_runtime.evaluation.statistics import mean_interval
from gap_runtime.report.page import make_table


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """One pruner, mode and ratio over several seeds: the exported graphs, main protocol.

    `accuracy` is Acc@0.5, the mean over seeds; `low` and `high` are its 95 % interval, in which a
    phrase counts once, as the share of seeds that it is right with. `least` and `most` are the
    accuracies of the worst and the best seed.
    """

    pruner: str
    positions: str
    ratio: float
    kept: int
    seeds: tuple[int, ...]
    phrases: int
    accuracy: float
    low: float
    high: float
    least: float
    most: float


def pool_draws(sweep: Sweep, protocol: str) -> list[Draws]:
    """Figures of every pruner that was swept with several seeds."""
    groups: dict[tuple[str, str], list[tuple[int, Swept]]] = {}
    for swept in sweep.swept:
        if swept.variant.draw is not None:
            name, seed = swept.variant.draw
            groups.setdefault((name, swept.variant.positions), []).append((seed, swept))
    return [
        _pool(name, positions, ratio, members, protocol)
        for (name, positions), members in groups.items()
        for ratio in members[0][1].variant.ratios
    ]


def _pool(
    name: str,
    positions: str,
    ratio: float,
    members: Sequence[tuple[int, Swept]],
    protocol: str,
) -> Draws:
    by_phrase: dict[str, list[bool]] = {}
    accuracies = []
    for _, swept in members:
        answers = swept.exported
        rows = [row for row in answers.rows if row.ratio == ratio and row.problem is None]
        hits = judge_rows(rows, load_protocol(protocol), answers.header.box).hits[1].tolist()
        accuracies.append(float(np.mean(hits)) if hits else math.nan)
        for row, hit in zip(rows, hits, strict=True):
            by_phrase.setdefault(row.key, []).append(hit)
    mean, low, high = mean_interval([float(np.mean(each)) for each in by_phrase.values()])
    entries = members[0][1].variant.plan.entries
    return Draws(
        pruner=name,
        positions=positions,
        ratio=ratio,
        kept=max(entry.kept for entry in entries if entry.ratio == ratio),
        seeds=tuple(seed for seed, _ in members),
        phrases=len(by_phrase),
        accuracy=mean,
        low=low,
        high=high,
        least=min(accuracies),
        most=max(accuracies),
    )


def tabulate_draws(draws: Sequence[Draws], *, by_count: bool) -> str:
    """A row for each pruner, mode and ratio; nothing where nothing was drawn several times.

    Args:
        draws: Their figures.
        by_count: Whether counts that stay were asked for, not shares removed.
    """
    if not draws:
        return ""
    return make_table(
        "Acc@0.5 in % of pruners that draw, over all seeds, with the 95 % interval over phrases",
        [
            *("pruner, positions", "tokens kept" if by_count else "ratio", "seeds", "phrases"),
            *("mean", "worst", "best"),
        ],
        [
            [
                f"{each.pruner}, {each.positions}",
                str(each.kept) if by_count else f"{each.ratio:g}",
                ", ".join(map(str, each.seeds)),
                str(each.phrases),
                f"{100 * each.accuracy:.1f} ({100 * each.low:.1f} to {100 * each.high:.1f})",
                f"{100 * each.least:.1f}",
                f"{100 * each.most:.1f}",
            ]
            for each in draws
        ],
    )
