"""Two sets of answers, phrase by phrase."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from gap_runtime.errors import InputError
from gap_runtime.evaluation.expression import Expression
from gap_runtime.evaluation.protocol import ScoringProtocol
from gap_runtime.evaluation.results import Answers, Row
from gap_runtime.evaluation.score import choose_labels, judge_rows
from gap_runtime.evaluation.statistics import Z_95, mcnemar_p, mean

SIGNIFICANT: Final = 0.05
"""Below this p, a difference is called significant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two sets of answers to the same phrases.

    `only_this` and `only_other` are the phrases that just one of them got right, `p` is
    McNemar's exact two-sided test on them, `differing` counts answers that are not the same text.
    `labels` as in Score.
    """

    protocol: str
    labels: str
    ratio: float
    other_ratio: float
    other: str
    phrases: int
    accuracy: float
    other_accuracy: float
    only_this: int
    only_other: int
    p: float
    differing: int

    def describe(self) -> str:
        """What the figures say, in words."""
        if not self.phrases:
            return "no phrase to compare"
        if not self.differing:
            return f"the same answers to all {self.phrases:,} phrases: no difference"
        apart = self.only_this - self.only_other
        points = abs(100 * apart / self.phrases)
        right = f"{self.only_this:,} right here only, {self.only_other:,} right there only"
        if not apart:
            return f"as many right ({right}): no difference"
        what = f"{points:.1f} points {'better' if apart > 0 else 'worse'} ({right})"
        if self.p < SIGNIFICANT:
            return f"{what}: significant, p = {self.p:.2g}"
        return f"{what}: not significant, p = {self.p:.2g}; it may be chance, ask more phrases"

    def find_loss(self) -> tuple[float, float, float]:
        """Points of accuracy lost against the other, and the ends of the 95 % interval.

        The interval is that of paired answers, by the normal distribution.

        References:
            A. Agresti, Categorical Data Analysis, 2013, section 11.1.
        """
        lost, count = self.only_other - self.only_this, self.phrases
        if not count:
            return math.nan, math.nan, math.nan
        spread = math.sqrt(max(self.only_this + self.only_other - lost * lost / count, 0.0))
        low, high = lost - Z_95 * spread, lost + Z_95 * spread
        return 100 * lost / count, 100 * low / count, 100 * high / count


def compare_rows(
    this: Answers,
    other: Answers,
    label: str,
    name: str,
    protocol: ScoringProtocol,
    expressions: Iterable[Expression] = (),
) -> list[Comparison]:
    """Compare every ratio of one file with the same of another, or with its only one.

    Where the data were reviewed, with all labels and without the wrong ones.

    Args:
        this: Answers.
        other: Answers to the same phrases; phrases that one of them lacks are left out.
        label: What the other is called.
        name: Of the protocol.
        protocol: Judges both, each by its own box format.
        expressions: What was asked: says which labels are wrong.

    Raises:
        InputError: The phrases are not the same, or no ratio fits.
    """
    known = {each.key: each for each in expressions}
    found = []
    for ratio, other_ratio in _pair_ratios(this, other, label):
        mine, theirs = _match(this, other, ratio, other_ratio, label)
        twins = {row.key: row for row in theirs}
        for labels, chosen, _ in choose_labels(mine, known):
            others = [twins[row.key] for row in chosen]
            judged, against = (
                judge_rows(rows, protocol, answers.header.box).hits[1]
                for rows, answers in ((chosen, this), (others, other))
            )
            only_this = int((judged & ~against).sum())
            only_other = int((against & ~judged).sum())
            found.append(
                Comparison(
                    protocol=name,
                    labels=labels,
                    ratio=ratio,
                    other_ratio=other_ratio,
                    other=label,
                    phrases=len(chosen),
                    accuracy=mean(judged),
                    other_accuracy=mean(against),
                    only_this=only_this,
                    only_other=only_other,
                    p=mcnemar_p(only_this, only_other),
                    differing=sum(
                        a.answer != b.answer for a, b in zip(chosen, others, strict=True)
                    ),
                )
            )
    return found


def _pair_ratios(this: Answers, other: Answers, label: str) -> list[tuple[float, float]]:
    own = sorted({row.ratio for row in this.rows})
    others = sorted({row.ratio for row in other.rows})
    if len(others) == 1:
        return [(ratio, others[0]) for ratio in own]
    shared = [(ratio, ratio) for ratio in own if ratio in others]
    if not shared:
        have = ", ".join(f"{ratio:g}" for ratio in others)
        raise InputError(f"{label}: has none of these ratios; have {have or 'none'}")
    return shared


def _match(
    this: Answers, other: Answers, ratio: float, other_ratio: float, label: str
) -> tuple[list[Row], list[Row]]:
    """The rows that both have, in one order."""
    theirs = {r.key: r for r in other.rows if r.ratio == other_ratio and r.problem is None}
    own = [r for r in this.rows if r.ratio == ratio and r.problem is None and r.key in theirs]
    for row in own:
        twin = theirs[row.key]
        if (row.phrase, row.box, row.size) != (twin.phrase, twin.box, twin.size):
            raise InputError(
                f"{label}: '{row.key:.60}' is another phrase or box there ({twin.phrase!r:.60}); "
                "compare answers to the same data"
            )
    if not own:
        raise InputError(f"{label}: has no phrase in common; compare answers to the same data")
    return own, [theirs[row.key] for row in own]
