"""What each visual slot holds and every position ID, by plain formulas."""

import math
from fractions import Fraction

EXTRA = "extra"


def place(s, N, t, order, mode, extra_rule=None, weights=None):  # noqa: N803
    """What each visual slot holds, all position IDs of the prompt, and the first new one.

    Args:
        s: Tokens before the picture.
        N: Visual tokens before pruning.
        t: Tokens after the picture.
        order: Kept tokens in the pruner's own order.
        mode: gap, compact, permuted or permuted-compact.
        extra_rule: None (no extra token), last-visual, append or centroid.
        weights: Of the extra token over all N; only the centroid looks at them.
    """
    assert mode in {"gap", "compact", "permuted", "permuted-compact"}
    raster = sorted(order)
    at = _extra_index(N, extra_rule, weights)

    slots = list(order) if mode in {"permuted", "permuted-compact"} else raster
    if at is not None:
        before = len(slots)
        if mode in {"gap", "compact"}:
            before = len([index for index in raster if index <= at])
        slots = [*slots[:before], EXTRA, *slots[before:]]

    if mode in {"compact", "permuted-compact"}:
        visual = [s + slot for slot in range(len(slots))]
        text = s + len(slots)
    else:
        visual = [s + index for index in sorted([*raster, *([] if at is None else [at])])]
        text = s + N + (1 if extra_rule == "append" else 0)
    position_ids = [*range(s), *visual, *(text + j for j in range(t))]
    return slots, position_ids, text + t


def _extra_index(total, extra_rule, weights):
    """The index that the extra token takes its ID from, None without one."""
    if extra_rule is None:
        return None
    if extra_rule == "last-visual":
        return total - 1
    if extra_rule == "append":
        return total
    assert extra_rule == "centroid"
    return centroid(weights)


def centroid(weights):
    """Weighted mean index, halves up. Exact: equal weights give the mean of plain numbers."""
    parts = [Fraction(float(weight)) for weight in weights]
    total = sum(parts)
    if total <= 0:
        raise ValueError("an extra token made of nothing has no centroid")
    mean = sum(part * index for index, part in enumerate(parts)) / total
    return math.floor(mean + Fraction(1, 2))
