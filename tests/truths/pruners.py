"""Every pruning rule once more, as slow and plain as possible: the truth that tests compare with.

Float64 numpy, loops over tokens, no torch. Ties go to the lower index. Every rule keeps a fixed
number of tokens; the adaptive counts stand apart at the end. No rule has a batch axis.

N tokens, C patch width, T = N + 1 with the CLS token first, D token width, W text width.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

TINY_NORM = 1e-12
"""Least length that a vector is divided by."""
TINY_GAIN = 1e-12
"""Least d2 that the DPP takes the root of. A gain below it is rounding noise: the next token is a
combination of those chosen, for example because more are kept than tokens are wide. The order of
choice means nothing from there on."""
NEIGHBOURS = 32
DROPS_PER_ROUND = 8


@dataclass(frozen=True)
class Truth:
    """A choice. `order` is the pruner's own; see each rule for what else it gives."""

    order: list[int]
    rows: np.ndarray | None = None
    extra: np.ndarray | None = None
    weights: np.ndarray | None = None
    scores: np.ndarray | None = None


# Pieces.


def top(scores, kept):
    """Indices of the highest scores, best first: the best of what is left, again and again."""
    left = list(range(len(scores)))
    assert 0 <= kept <= len(left)
    chosen = []
    for _ in range(kept):
        best = left[0]
        for index in left[1:]:
            if scores[index] > scores[best]:
                best = index
        chosen.append(best)
        left.remove(best)
    return chosen


def others(chosen, total):
    """Indices that were not chosen, ascending."""
    return [index for index in range(total) if index not in chosen]


def dot(one, other):
    return float(np.dot(one, other))


def unit(vector):
    return vector / max(math.sqrt(dot(vector, vector)), TINY_NORM)


def unit_rows(rows):
    return [unit(row) for row in float64(rows)]


def softmax(values):
    most = max(values)
    powers = [math.exp(value - most) for value in values]
    total = sum(powers)
    return np.array([power / total for power in powers])


def float64(values):
    return np.asarray(values, dtype=np.float64)


def pool(values, strip):
    """Means over consecutive groups of `strip` rows along the first axis."""
    values = float64(values)
    assert len(values) % strip == 0
    means = []
    for start in range(0, len(values), strip):
        total = np.zeros_like(values[0])
        for offset in range(strip):
            total = total + values[start + offset]
        means.append(total / strip)
    return np.array(means)


# CLS attention (FasterVLM) and CLS similarity.


def cls_attention(attention_HTT, kept):
    """Head mean of the CLS row over the patches; best first."""
    attention_HTT = float64(attention_HTT)
    heads = len(attention_HTT)
    scores = []
    for patch in range(attention_HTT.shape[2] - 1):
        total = 0.0
        for head in range(heads):
            total += attention_HTT[head, 0, patch + 1]
        scores.append(total / heads)
    return Truth(order=top(scores, kept), scores=np.array(scores))


def cls_attention_from_qk(q_TC, k_TC, heads, kept):
    """The same from the outputs of the projections: a softmax per head, CLS among the keys."""
    q_TC, k_TC = float64(q_TC), float64(k_TC)
    tokens, width = q_TC.shape
    size = width // heads
    assert size * heads == width
    attention_HTT = np.zeros((heads, tokens, tokens))
    for head in range(heads):
        mine = slice(head * size, (head + 1) * size)
        for row in range(tokens):
            logits = [dot(q_TC[row, mine], k_TC[key, mine]) * size**-0.5 for key in range(tokens)]
            attention_HTT[head, row] = softmax(logits)
    return cls_attention(attention_HTT, kept)


def column_attention_from_qk(q_TC, k_TC, heads):
    """Attention that each patch receives, mean over heads and over all tokens that pay it."""
    q_TC, k_TC = float64(q_TC), float64(k_TC)
    tokens, width = q_TC.shape
    size = width // heads
    received = np.zeros(tokens)
    for head in range(heads):
        mine = slice(head * size, (head + 1) * size)
        for row in range(tokens):
            received += softmax([dot(q_TC[row, mine], k[mine]) / math.sqrt(size) for k in k_TC])
    return received[1:] / (heads * tokens)


def cls_similarity(cls_C, patches_NC, kept):
    """Cosine between CLS and each patch; highest first."""
    direction = unit(float64(cls_C))
    scores = [dot(direction, patch) for patch in unit_rows(patches_NC)]
    return Truth(order=top(scores, kept), scores=np.array(scores))


# PruMerge.


def prumerge(query_C, keys_TC, patches_NC, kept):
    """Best attention first; each kept token takes in its 32 nearest, the rest make the extra.

    `scores` is the attention a. `rows`, `extra` and `weights` are always given; with nothing
    removed the extra token is zero.
    """
    a = _one_head_attention(query_C, keys_TC)
    return _merge(top(a, kept), a, a, keys_TC, patches_NC)


def prumerge_plus(query_C, keys_TC, patches_NC, kept):
    """As `prumerge`, but the tokens of a strided grid come first whatever their attention.

    `scores` are those that chose: a, and a + 2 on the grid.
    """
    a = _one_head_attention(query_C, keys_TC)
    scores = a.copy()
    for index in prumerge_plus_grid(len(a), kept):
        scores[index] = a[index] + 2.0
    return _merge(top(scores, kept), a, scores, keys_TC, patches_NC)


def prumerge_plus_grid(total, kept):
    """Every stride-th token without the last one; wider until a twelfth of the count is left.

    Not where all but the last one are kept anyway.
    """
    step = int(4 * total / kept)
    for stride in range(max(1, step // 3), total + 1):
        grid = [index for index in range(max(1, total - 1)) if index % stride == 0]
        everything = stride == 1 and len(grid) <= kept
        if everything or 12 * (kept - len(grid)) >= kept:
            return grid
    return []


def _one_head_attention(query_C, keys_TC):
    """Attention of CLS to the patches, all heads taken as one; sums to less than one."""
    query_C, keys_TC = float64(query_C), float64(keys_TC)
    scale = math.sqrt(len(query_C))
    return softmax([dot(query_C, key) / scale for key in keys_TC])[1:]


def _merge(order, a, scores, keys_TC, patches_NC):
    """Exactly min(32, N - 1) neighbours, of equally near ones those of lower index."""
    patches_NC = float64(patches_NC)
    total = len(patches_NC)
    keys = unit_rows(keys_TC)[1:]
    assert len(keys) == total
    rows = []
    for center in order:
        rest = [index for index in range(total) if index != center]
        nearness = [dot(keys[center], keys[index]) for index in rest]
        row = patches_NC[center].copy()
        for at in top(nearness, min(NEIGHBOURS, len(rest))):
            neighbour = rest[at]
            row += a[neighbour] * patches_NC[neighbour]
        rows.append(row)
    extra = np.zeros(patches_NC.shape[1])
    weights = np.zeros(total)
    for index in others(order, total):
        extra += a[index] * patches_NC[index]
        weights[index] = a[index]
    return Truth(order=order, rows=np.array(rows), extra=extra, weights=weights, scores=scores)


# TRIM and text similarity.


def trim(text_W, text_patches_NW, patches_NC, kept, sign=-1):
    """Highest sign * dot, in raster order; the extra token is the mean of the removed ones.

    With nothing removed there is no extra token: `extra` and `weights` are None.
    """
    scores = _text_scores(text_W, text_patches_NW, sign)
    patches_NC = float64(patches_NC)
    total = len(scores)
    order = sorted(top(scores, kept))
    removed = others(order, total)
    if not removed:
        return Truth(order=order, scores=scores)
    extra = np.zeros(patches_NC.shape[1])
    weights = np.zeros(total)
    for index in removed:
        extra += patches_NC[index]
        weights[index] = 1 / len(removed)
    return Truth(order=order, extra=extra / len(removed), weights=weights, scores=scores)


def text_similarity(text_W, text_patches_NW, kept, sign=-1):
    """The same score; best first, no extra token."""
    scores = _text_scores(text_W, text_patches_NW, sign)
    return Truth(order=top(scores, kept), scores=scores)


def _text_scores(text_W, text_patches_NW, sign):
    assert sign in {1, -1}
    text_W = float64(text_W)
    return np.array([sign * dot(patch, text_W) for patch in float64(text_patches_NW)])


# The same tokens for every picture.


def spatial(grids, kept):
    """Tokens spread over each grid, in raster order; each grid keeps its share.

    One grid: the middles of m x m equal parts where the count is m squared and m fits both ways,
    else the middles of equal parts of the raster.
    """
    sizes = [rows * columns for rows, columns in grids]
    order, start = [], 0
    for (rows, columns), size, count in zip(
        grids, sizes, share_by_largest_remainder(sizes, kept), strict=True
    ):
        order += [start + index for index in _spread(rows, columns, count)]
        start += size
    return Truth(order=order)


def share_by_largest_remainder(sizes, kept):
    """Counts in proportion to sizes: rounded down, then one more by the largest remainder."""
    total = sum(sizes)
    assert 0 <= kept <= total
    counts = [kept * size // total for size in sizes]
    remainders = [kept * size % total for size in sizes]
    for winner in top(remainders, kept - sum(counts)):
        counts[winner] += 1
    return counts


def _spread(rows, columns, kept):
    if kept == 0:
        return []
    side = math.isqrt(kept)
    if side * side == kept and side <= rows and side <= columns:
        chosen = []
        for part in range(side):
            for other in range(side):
                row = math.floor(Fraction(2 * part + 1, 2) * rows / side)
                column = math.floor(Fraction(2 * other + 1, 2) * columns / side)
                chosen.append(row * columns + column)
        return chosen
    return [math.floor(Fraction(2 * part + 1, 2) * rows * columns / kept) for part in range(kept)]


def random(N, kept, seed):  # noqa: N803
    """The first tokens of a permutation drawn with PCG64, in the order of the draw."""
    assert 0 <= kept <= N
    drawn = np.random.Generator(np.random.PCG64(seed)).permutation(N)
    return Truth(order=[int(index) for index in drawn[:kept]])


# VisionZip.


def visionzip(scores_N, keys_Nd, patches_NC, kept):
    """Best scores in raster order, then evenly spaced others that take in what is most like them.

    Ten of 64 tokens are of the second kind, CLS counted though it is not kept, and at least one
    of two or more.
    """
    scores_N, patches_NC = float64(scores_N), float64(patches_NC)
    keys = unit_rows(keys_Nd)
    total = len(scores_N)
    contextual = max((kept + 1) * 10 // 64, 1) if kept >= 2 else 0
    dominants = sorted(top(scores_N, kept - contextual))
    remaining = others(dominants, total)
    targets = []
    if contextual:
        spacing = max(1, len(remaining) // contextual)
        places = list(range(0, len(remaining), spacing))[:contextual]
        targets = [remaining[at] for at in places]
    assigned = {target: [] for target in targets}
    for index in remaining:
        if index in targets or not targets:
            continue
        nearness = [dot(keys[index], keys[target]) for target in targets]
        assigned[targets[top(nearness, 1)[0]]].append(index)
    rows = [patches_NC[index].copy() for index in dominants]
    for target in targets:
        row = patches_NC[target].copy()
        if assigned[target]:
            total_of_assigned = np.zeros_like(row)
            for index in assigned[target]:
                total_of_assigned += patches_NC[index]
            row += total_of_assigned / len(assigned[target])
        rows.append(row)
    return Truth(order=dominants + targets, rows=np.array(rows), scores=scores_N)


# VisPruner.


def vispruner(scores_N, patches_NC, kept):
    """Half by score, best first; the others are thinned, the most doubled ones first."""
    scores_N = float64(scores_N)
    directions = unit_rows(patches_NC)
    important = kept // 2
    ranked = top(scores_N, len(scores_N))
    residual = ranked[important:]
    target = kept - important
    assert target <= len(residual)
    while len(residual) > target:
        evens, odds = residual[0::2], residual[1::2]
        drop = min(DROPS_PER_ROUND, len(residual) - target, len(evens))
        likeness = []
        for even in evens:
            best = -2.0
            for odd in odds:
                best = max(best, dot(directions[even], directions[odd]))
            likeness.append(best)
        by_likeness = [evens[at] for at in top(likeness, len(evens))]
        residual = by_likeness[drop:] + odds
    return Truth(order=ranked[:important] + residual, scores=scores_N)


def nuwa(scores_N, patches_NC, kept, grids, missing=()):
    """The best of every 2 x 2 cell, as few of each as will do; the weaker take in what is near."""
    scores_N, patches_NC = float64(scores_N), float64(patches_NC)
    where, cells, behind = [], {}, 0
    for grid, (rows, columns) in enumerate(grids):
        behind += rows * columns
        for at in range(rows * columns):
            if behind - rows * columns + at in missing:
                continue
            row, column = divmod(at, columns)
            cells.setdefault((grid, row // 2, column // 2), []).append(len(where))
            where.append((grid, row, column))
    for each in (1, 2, 3, 4):
        best = [(cell, top(scores_N[cell], min(each, len(cell)))) for cell in cells.values()]
        standing = sorted(cell[at] for cell, places in best for at in places)
        if len(standing) >= kept:
            break
    order = sorted(standing[at] for at in top(scores_N[standing], kept))
    rows = [patches_NC[index].copy() for index in order]
    # Linear interpolation at 0.55; what reaches the value itself is strong.
    border = Fraction(55, 100) * (kept - 1)
    for rank, k in enumerate(reversed(top(scores_N[order], kept))):
        if rank < border:
            rows[k] = _take_in_neighbours(order[k], where, patches_NC)
    return Truth(order=order, rows=np.array(rows))


def _take_in_neighbours(center, where, patches_NC):
    """A token and those around it, by likeness and by nearness within its grid."""
    directions = unit_rows(patches_NC)
    weights = np.zeros(len(where))
    for index, (grid, row, column) in enumerate(where):
        if grid == where[center][0]:
            apart = math.hypot(row - where[center][1], column - where[center][2])
            nearness = max(0.0, 1 - apart / math.sqrt(280))
            weights[index] = nearness * max(0.0, dot(directions[center], directions[index]))
    weights = weights / (weights.sum() + 1e-8)
    weights[center] = 1.0
    return weights @ patches_NC


# DivPrune.


def divprune(tokens_ND, kept):
    """Always the token farthest from those chosen; first the one farthest from its nearest."""
    directions = unit_rows(tokens_ND)
    total = len(directions)
    assert 1 <= kept <= total
    if total == 1:
        return Truth(order=[0])
    distance = [[1.0 - dot(one, other) for other in directions] for one in directions]
    nearest = [
        min(distance[index][other] for other in range(total) if other != index)
        for index in range(total)
    ]
    order = top(nearest, 1)
    while len(order) < kept:
        left = others(order, total)
        nearest = [min(distance[index][chosen] for chosen in order) for index in left]
        order.append(left[top(nearest, 1)[0]])
    return Truth(order=order)


# DART.


def dart(tokens_ND, kept):
    """The four largest tokens by absolute sum; each takes an equal share of what is least like it.

    One after another, of what nobody took; of what cannot be shared, the first ones take one more.
    """
    tokens_ND = float64(tokens_ND)
    directions = unit_rows(tokens_ND)
    order = top([sum(abs(value) for value in token) for token in tokens_ND], min(4, kept))
    pivots = list(order)
    shares = [0] * len(pivots)
    for number in range(kept - len(pivots)):
        shares[number % len(pivots)] += 1
    for pivot, share in zip(pivots, shares, strict=True):
        left = others(order, len(tokens_ND))
        strangeness = [-dot(directions[pivot], directions[index]) for index in left]
        order += [left[at] for at in top(strangeness, share)]
    return Truth(order=order)


# CDPruner.


def cdpruner(text_W, text_patches_NW, tokens_ND, kept, sign=-1):
    """Greedy MAP of a DPP with L_ij = r_i S_ij r_j; in the order of choice. `scores` is r."""
    relevance = dpp_relevance(text_W, text_patches_NW, sign)
    order = greedy_dpp(dpp_kernel(relevance, tokens_ND), kept)
    return Truth(order=order, scores=relevance)


def dpp_relevance(text_W, text_patches_NW, sign=-1):
    """sign * cosine, stretched to [0, 1] and a little more; ones where all are equal."""
    assert sign in {1, -1}
    direction = unit(float64(text_W))
    raw = [sign * dot(direction, patch) for patch in unit_rows(text_patches_NW)]
    least, most = min(raw), max(raw)
    if least == most:
        return np.ones(len(raw))
    return np.array([(value - least + 1e-6) / (most - least) for value in raw])


def dpp_kernel(relevance_N, tokens_ND):
    directions = unit_rows(tokens_ND)
    total = len(directions)
    kernel = np.zeros((total, total))
    for i in range(total):
        for j in range(total):
            kernel[i, j] = relevance_N[i] * dot(directions[i], directions[j]) * relevance_N[j]
    return kernel


def greedy_dpp(kernel_NN, kept):
    """d2_i is by how much token i would multiply the determinant of L over the chosen ones.

    The root is taken of d2 or TINY_GAIN, whichever is more; the choice itself is by raw d2.
    """
    total = len(kernel_NN)
    assert 1 <= kept <= total
    gains = [float(kernel_NN[i, i]) for i in range(total)]
    columns = []
    order = []
    for _ in range(kept):
        left = others(order, total)
        chosen = left[top([gains[i] for i in left], 1)[0]]
        root = math.sqrt(max(gains[chosen], TINY_GAIN))
        column = []
        for i in range(total):
            explained = sum(earlier[chosen] * earlier[i] for earlier in columns)
            column.append((float(kernel_NN[chosen, i]) - explained) / root)
        for i in range(total):
            gains[i] -= column[i] ** 2
        columns.append(column)
        order.append(chosen)
    return order


# Counts that depend on the picture.


def adaptive_count_iqr(values):
    """Kept count of PruMerge (on a) and TRIM (on the softmax of its scores): the outliers.

    Quartiles are numpy's, interpolated linearly. As published, the count goes through a ratio
    and back, which can lose one to rounding (never for 256, 576 or 2304 tokens).
    """
    values = float64(values)
    first, third = (float(quartile) for quartile in np.percentile(values, [25, 75]))
    outliers = 0
    for value in values:
        if value > third + 1.5 * (third - first):
            outliers += 1
    ratio = outliers / len(values)
    return int(len(values) * ratio)


def prumerge_plus_adaptive_count(a):
    """Kept count of PruMerge+: the outliers with the grid whose stride they give.

    As published it divides by zero without outliers, and by a stride of 0 where they are more
    than a third (which quartiles rule out); here these are 0 kept and stride 1.
    """
    total = len(a)
    kept = adaptive_count_iqr(a)
    if kept == 0:
        return 0
    step = int(1 / (kept / total))
    stride = max(1, int(step / 3))
    return len({*top(a, kept), *range(0, total - 1, stride)})
