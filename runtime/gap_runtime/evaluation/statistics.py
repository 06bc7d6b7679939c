"""Means, intervals and tests of shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

Z_95: Final = 1.959963984540054
"""Of the normal distribution, for 95 %."""


def mean(values: np.ndarray) -> float:
    """The mean; not a number where there is nothing."""
    return float(values.mean()) if len(values) else math.nan


def wilson_interval(hits: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share.

    References:
        E. B. Wilson, Probable inference, the law of succession, and statistical inference, 1927.
    """
    if not count:
        return 0.0, 1.0
    share, square = hits / count, Z_95 * Z_95
    middle = share + square / (2 * count)
    spread = Z_95 * math.sqrt(share * (1 - share) / count + square / (4 * count * count))
    scale = 1 + square / count
    return max((middle - spread) / scale, 0.0), min((middle + spread) / scale, 1.0)


def mean_interval(shares: Sequence[float]) -> tuple[float, float, float]:
    """A mean of shares, one for each phrase, and its 95 % interval by the normal distribution."""
    count = len(shares)
    if not count:
        return math.nan, 0.0, 1.0
    mean = sum(shares) / count
    variance = sum((share - mean) ** 2 for share in shares) / max(count - 1, 1)
    spread = Z_95 * math.sqrt(variance / count)
    return mean, max(mean - spread, 0.0), min(mean + spread, 1.0)


def mcnemar_p(only_this: int, only_other: int) -> float:
    """The exact two-sided p of McNemar's test: a fair coin for every phrase that one got right.

    References:
        Q. McNemar, Note on the sampling error of the difference between correlated proportions,
        1947.
    """
    count, least = only_this + only_other, min(only_this, only_other)
    term = total = 1
    for k in range(least):
        term = term * (count - k) // (k + 1)
        total += term
    # Whole numbers of any length divide to the nearest float.
    return min(1.0, 2 * total / (1 << count))
