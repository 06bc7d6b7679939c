"""The plain formulas of tests/truths/pruners.py against other ways to write them."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from truths import pruners as truth

SIZES = [(1, 1), (2, 1), (2, 2), (20, 1), (20, 7), (40, 13), (60, 30), (48, 48)]
sizes = pytest.mark.parametrize(("total", "kept"), SIZES)


def draw(total, width, seed=0):
    return np.random.default_rng([total, width, seed]).standard_normal((total, width))


def normalize(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def softmax_rows(rows):
    powers = np.exp(rows - rows.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def best(scores, kept):
    return np.argsort(-np.asarray(scores), kind="stable")[:kept]


def close(one, other):
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


# Pieces.


@pytest.mark.parametrize("kept", [0, 1, 50, 100])
def test_top_is_a_stable_sort(kept):
    scores = np.random.default_rng(0).integers(0, 5, 100) / 4
    assert truth.top(scores, kept) == best(scores, kept).tolist()


def test_pool_takes_means_of_neighbouring_rows():
    values = np.arange(24.0).reshape(12, 2)
    close(truth.pool(values, 4), [[3, 4], [11, 12], [19, 20]])
    close(truth.pool(values[:, 0], 3), [2, 8, 14, 20])
    close(truth.pool(values, 1), values)


def test_softmax_sums_to_one_for_large_numbers():
    made = truth.softmax([1000.0, 1001.0, 999.0])
    close(made.sum(), 1)
    close(made, softmax_rows(np.array([0.0, 1.0, -1.0])))


# Selection only.


def test_cls_attention_by_hand():
    maps = np.full((2, 4, 4), 0.9)
    maps[0, 0] = [0.4, 0.1, 0.3, 0.2]
    maps[1, 0] = [0.3, 0.2, 0.1, 0.4]
    made = truth.cls_attention(maps, 2)
    close(made.scores, [0.15, 0.2, 0.3])
    assert made == truth.Truth(order=[2, 1], scores=made.scores)


@pytest.mark.parametrize("heads", [1, 4])
def test_cls_attention_from_projections(heads):
    q_TC, k_TC = 3 * draw(21, 8, 1), draw(21, 8, 2)
    made = truth.cls_attention_from_qk(q_TC, k_TC, heads, 6)
    q, k = (each.reshape(21, heads, -1).swapaxes(0, 1) for each in (q_TC, k_TC))
    maps = softmax_rows(q @ k.swapaxes(1, 2) / math.sqrt(8 / heads))
    close(made.scores, maps.mean(axis=0)[0, 1:])
    assert made.order == best(maps.mean(axis=0)[0, 1:], 6).tolist()
    assert made.order == truth.cls_attention(maps, 6).order


def test_cls_similarity_is_a_cosine():
    cls, patches = draw(1, 5)[0], draw(30, 5)
    cosines = normalize(patches) @ normalize(cls)
    made = truth.cls_similarity(2 * cls, patches * np.arange(1, 31)[:, None], 8)
    close(made.scores, cosines)
    assert made.order == best(cosines, 8).tolist()


@pytest.mark.parametrize("sign", [1, -1])
def test_text_similarity_is_a_dot(sign):
    text, patches = draw(1, 6)[0], draw(30, 6)
    made = truth.text_similarity(text, patches, 9, sign)
    close(made.scores, sign * (patches @ text))
    assert made.order == best(sign * (patches @ text), 9).tolist()
    assert made.extra is None


@pytest.mark.parametrize("sign", [1, -1])
@sizes
def test_trim_is_a_mask_and_a_mean(total, kept, sign):
    text, text_patches, patches = draw(1, 6)[0], draw(total, 6, 1), draw(total, 4, 2)
    made = truth.trim(text, text_patches, patches, kept, sign)
    # As published: the softmax decides, which changes nothing.
    chosen = best(softmax_rows(sign * (text_patches @ text)), kept)
    assert made.order == np.sort(chosen).tolist()
    assert made.rows is None
    if kept == total:
        assert made.extra is made.weights is None
        return
    keep = np.zeros(total)
    keep[chosen] = 1
    close(made.extra, (1 - keep) @ patches / (total - kept))
    close(made.weights, (1 - keep) / (total - kept))


def test_the_negative_sign_keeps_the_least_similar():
    text, patches = np.array([1.0, 0.0]), np.array([[3.0, 1.0], [-2.0, 0.0], [0.5, 9.0]])
    assert truth.trim(text, patches, patches, 2).order == [1, 2]
    assert truth.text_similarity(text, patches, 2).order == [1, 2]
    assert truth.text_similarity(text, patches, 2, sign=1).order == [0, 2]


# PruMerge.


def merge_inputs(total, width=8):
    return 2 * draw(1, width, 1)[0], draw(total + 1, width, 2), draw(total, width, 3)


def merge_by_masks(idx, a, keys, patches):
    """The static recipe: a one-hot matrix, a threshold at the last neighbour, one product."""
    total = len(a)
    one_hot = (np.asarray(idx)[:, None] == np.arange(total)[None]).astype(float)
    k = normalize(keys[1:])
    cosines = np.where(one_hot == 1, -2, k[idx] @ k.T)
    mask = np.zeros_like(cosines)
    if total > 1:
        limit = -np.sort(-cosines, axis=1)[:, min(32, total - 1) - 1 : min(32, total - 1)]
        mask = (cosines >= limit).astype(float)
    weights = (1 - one_hot.max(axis=0)) * a
    return (mask * a + one_hot) @ patches, weights @ patches, weights


@sizes
def test_prumerge_equals_the_static_recipe(total, kept):
    query, keys, patches = merge_inputs(total)
    made = truth.prumerge(query, keys, patches, kept)
    a = softmax_rows(keys @ query / math.sqrt(8))[1:]
    idx = best(a, kept)
    rows, extra, weights = merge_by_masks(idx, a, keys, patches)
    close(made.scores, a)
    assert made.order == idx.tolist()
    close(made.rows, rows)
    close(made.extra, extra)
    close(made.weights, weights)


def test_rows_of_prumerge_follow_their_tokens():
    query, keys, patches = merge_inputs(50)
    made = truth.prumerge(query, keys, patches, 10)
    rows, _, _ = merge_by_masks(sorted(made.order), made.scores, keys, patches)
    close(made.rows[np.argsort(made.order)], rows)


def test_prumerge_gives_equally_near_neighbours_by_index():
    # All keys are one direction: the 32 neighbours are those of lowest index, without the token.
    patches = np.eye(40)
    made = truth.prumerge(np.zeros(3), np.ones((41, 3)), patches, 2)
    a = 1 / 41
    assert made.order == [0, 1]
    close(made.rows[0], [1, *[a] * 32, *[0] * 7])
    close(made.rows[1], [a, 1, *[a] * 31, *[0] * 7])
    close(made.extra, [0, 0, *[a] * 38])


@sizes
def test_prumerge_plus_equals_priority_scores(total, kept):
    query, keys, patches = merge_inputs(total)
    made = truth.prumerge_plus(query, keys, patches, kept)
    a = softmax_rows(keys @ query / math.sqrt(8))[1:]
    grid = truth.prumerge_plus_grid(total, kept)
    on_grid = np.isin(np.arange(total), grid)
    # Lexicographic: first the grid, then attention.
    idx = np.lexsort((-a, ~on_grid))[:kept]
    rows, extra, weights = merge_by_masks(idx, a, keys, patches)
    assert made.order == idx.tolist()
    assert set(grid) <= set(made.order)
    close(made.rows, rows)
    close(made.extra, extra)
    close(made.weights, weights)


@pytest.mark.parametrize(
    ("total", "kept", "stride"),
    [
        (576, 64, 12),  # step 36
        (576, 40, 19),  # step 57
        (576, 288, 3),  # half: stride 2 would be all of the 288
        (256, 128, 3),
        (64, 32, 3),
        (576, 317, 2),  # 288 and 29
        (576, 174, 4),  # what the authors' rule keeps where 40 are outliers and 10 lie on the grid
        (576, 575, 1),  # what the authors' rule keeps where 100 are outliers
        (576, 574, 2),
        (576, 576, 1),
        (1, 1, 1),
        (256, 18, 18),  # step 56
        (2, 2, 1),  # step 4
        (5, 2, 4),
    ],
)
def test_grids_of_prumerge_plus(total, kept, stride):
    grid = truth.prumerge_plus_grid(total, kept)
    assert grid == list(range(0, max(total - 1, 1), stride))
    assert len(grid) <= kept


@pytest.mark.parametrize("total", [2, 5, 576])
def test_a_single_token_of_prumerge_plus_is_the_best(total):
    assert truth.prumerge_plus_grid(total, 1) == []


def test_prumerge_plus_at_the_adaptive_total_keeps_what_the_authors_keep():
    """Their choice in their own steps: outliers by attention, then what else is on the grid.

    A total that lies between those of two strides can mean either; that is rare.
    """
    same = 0
    for seed in range(100):
        a = softmax_rows((0.5 + seed / 40) * draw(576, 1, seed)[:, 0])
        first, third = np.percentile(a, 25), np.percentile(a, 75)
        ratio = np.count_nonzero(a > third + 1.5 * (third - first)) / 576
        outliers = best(a, int(576 * ratio))
        grid = np.arange(0, 575, int(int(1 / ratio) / 3))
        kept = {*outliers.tolist(), *grid.tolist()}
        scores = a + 2 * np.isin(np.arange(576), truth.prumerge_plus_grid(576, len(kept)))
        same += set(truth.top(scores, len(kept))) == kept
    assert same >= 97


@pytest.mark.parametrize(("dominant", "contextual"), [(54, 10), (108, 20), (162, 30)])
def test_visionzip_is_the_authors_without_cls(dominant, contextual):
    """Their steps on rows with CLS first, of which one of the dominant ones is CLS itself."""
    total = 576
    scores, keys, states = draw(total, 1)[:, 0], draw(total + 1, 6, 1), draw(total + 1, 5, 2)
    keep = np.zeros(total + 1, dtype=bool)
    keep[0] = True
    keep[1 + best(scores, dominant - 1)] = True
    others, metric = states[~keep], normalize(keys[~keep])
    targets = np.arange(0, len(others), max(1, len(others) // contextual))[:contextual]
    merged = np.setdiff1d(np.arange(len(others)), targets)
    nearest = (metric[merged] @ metric[targets].T).argmax(axis=1)
    centres = others[targets].copy()
    for place in set(nearest.tolist()):
        centres[place] += others[merged[nearest == place]].mean(axis=0)
    made = truth.visionzip(scores, keys[1:], states[1:], dominant + contextual - 1)
    close(made.rows, np.concatenate([states[keep][1:], centres]))


@settings(max_examples=200)
@given(st.integers(1, 700), st.data())
def test_every_grid_of_prumerge_plus_fits(total, data):
    kept = data.draw(st.integers(1, total))
    grid = truth.prumerge_plus_grid(total, kept)
    assert grid[:1] == ([0] if kept > 1 or total == 1 else [])
    assert all(index < total for index in grid)
    # The picture has a say wherever two tokens or more are removed.
    assert kept >= total - 1 or kept / 12 <= kept - len(grid)


# Constants.


@pytest.mark.parametrize(
    ("grids", "kept", "expected"),
    [
        ([(8, 8)], 16, [8 * row + column for row in (1, 3, 5, 7) for column in (1, 3, 5, 7)]),
        ([(8, 8)], 9, [9, 12, 14, 33, 36, 38, 49, 52, 54]),
        ([(8, 8)], 1, [36]),
        ([(8, 8)], 64, list(range(64))),
        ([(8, 8)], 5, [6, 19, 32, 44, 57]),
        ([(2, 6)], 4, [1, 4, 7, 10]),
        ([(2, 6)], 9, [0, 2, 3, 4, 6, 7, 8, 10, 11]),
        ([(24, 24)], 3, [96, 288, 480]),
        ([(2, 2), (2, 2)], 2, [3, 7]),
        ([(2, 2), (2, 2)], 1, [3]),  # a tie, for the earlier one
        ([(2, 2), (4, 4)], 1, [14]),  # the first gets nothing
        ([(2, 2), (4, 4)], 5, [3, 9, 11, 17, 19]),
        ([(1, 3), (1, 3), (1, 3)], 4, [0, 2, 4, 7]),
    ],
)
def test_spatial_by_hand(grids, kept, expected):
    assert truth.spatial(grids, kept).order == expected


@pytest.mark.parametrize(
    ("grid_sizes", "kept", "counts"),
    [
        ([576, 2304], 64, [13, 51]),  # 12.8 and 51.2
        ([10, 10, 10], 4, [2, 1, 1]),
        ([10, 10, 10], 5, [2, 2, 1]),
        ([7, 2, 1], 5, [4, 1, 0]),  # 3.5, 1 and 0.5
        ([3, 5], 8, [3, 5]),
        ([3, 5], 0, [0, 0]),
    ],
)
def test_shares_by_largest_remainder(grid_sizes, kept, counts):
    assert truth.share_by_largest_remainder(grid_sizes, kept) == counts


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1), st.data())
def test_spatial_keeps_as_many_as_asked_in_raster_order(grids, data):
    total = sum(rows * columns for rows, columns in grids)
    kept = data.draw(st.integers(1, total))
    order = truth.spatial(grids, kept).order
    assert len(order) == kept
    assert all(one < other for one, other in itertools.pairwise(order))
    assert order[0] >= 0
    assert order[-1] < total


def test_random_is_a_permutation_cut_off():
    whole = truth.random(64, 64, 5).order
    assert sorted(whole) == list(range(64))
    assert whole != sorted(whole)
    assert truth.random(64, 20, 5).order == whole[:20]
    assert truth.random(64, 20, 6).order != whole[:20]


# VisionZip and VisPruner.


@pytest.mark.parametrize(
    ("kept", "contextual"),
    [
        (1, 0),
        (2, 1),
        (6, 1),
        (7, 1),
        (13, 2),
        # As called by the authors: 54 + 10, 108 + 20 and 162 + 30, CLS among the first.
        *((63, 10), (64, 10), (127, 20), (128, 20), (191, 30), (192, 30)),
    ],
)
def test_visionzip_counts(kept, contextual):
    scores = np.linspace(1, 0, 200)
    made = truth.visionzip(scores, draw(200, 4), draw(200, 3), kept)
    # Scores fall, so dominants are the first tokens and targets lie behind, evenly.
    dominants = kept - contextual
    spacing = (200 - dominants) // contextual if contextual else 1
    targets = [dominants + spacing * j for j in range(contextual)]
    assert made.order == [*range(dominants), *targets]


@sizes
def test_visionzip_equals_one_hot_products(total, kept):
    scores, keys, patches = draw(total, 1)[:, 0], draw(total, 6, 1), draw(total, 5, 2)
    made = truth.visionzip(scores, keys, patches, kept)
    contextual = 0 if kept == 1 else max(1, kept * 10 // 64)
    dominants = np.sort(best(scores, kept - contextual))
    rest = np.setdiff1d(np.arange(total), dominants)
    slots = np.arange(0, len(rest), max(1, len(rest) // max(contextual, 1)))[:contextual]
    targets = rest[slots]
    assert made.order == [*dominants.tolist(), *targets.tolist()]
    expected = patches[made.order].copy()
    if contextual:
        others = np.delete(rest, slots)
        nearest = (normalize(keys[others]) @ normalize(keys[targets]).T).argmax(axis=1)
        one_hot = (nearest[:, None] == np.arange(contextual)[None]).astype(float)
        counts = one_hot.sum(axis=0)[:, None]
        expected[kept - contextual :] += one_hot.T @ patches[others] / np.maximum(counts, 1)
    close(made.rows, expected)


def test_visionzip_leaves_targets_alone_that_nothing_is_like():
    # 13 kept: 11 dominants; targets are 11 and 13, and 12 and 14 are both like 13.
    scores = np.linspace(1, 0, 15)
    keys = np.ones((15, 2))
    keys[11] = [1, -1]
    patches = np.arange(15.0)[:, None]
    made = truth.visionzip(scores, keys, patches, 13)
    assert made.order == [*range(11), 11, 13]
    close(made.rows[:, 0], [*range(11), 11, 13 + (12 + 14) / 2])


def prune_by_rounds(scores, patches, kept):
    """VisPruner with a product and a sort per round."""
    ranked = best(scores, len(scores))
    important = kept // 2
    residual, target = ranked[important:], kept - important
    directions = normalize(patches)
    while len(residual) > target:
        evens, odds = residual[::2], residual[1::2]
        drop = min(8, len(residual) - target, len(evens))
        likeness = (directions[evens] @ directions[odds].T).max(axis=1)
        residual = np.concatenate([evens[best(likeness, len(evens))[drop:]], odds])
    return [*ranked[:important].tolist(), *residual.tolist()]


@pytest.mark.parametrize(
    ("total", "kept"), [*SIZES, (100, 64), (100, 1), (99, 10), (99, 9), (7, 1)]
)
def test_vispruner_equals_unrolled_rounds(total, kept):
    scores, patches = draw(total, 1)[:, 0], draw(total, 5, 1)
    made = truth.vispruner(scores, patches, kept)
    assert made.order == prune_by_rounds(scores, patches, kept)
    assert len(set(made.order)) == kept


def test_vispruner_by_hand():
    # Kept 4 of 6: 0 and 1 by score. Residual 2 3 4 5: evens 2 and 4, odds 3 and 5; 4 is like 5.
    patches = np.array([[9, 9], [9, 9], [1, 0], [0, 1], [-1, -0.9], [-1, -1]], dtype=float)
    scores = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    assert truth.vispruner(scores, patches, 5).order == [0, 1, 2, 3, 5]
    assert truth.vispruner(scores, patches, 4).order == [0, 1, 3, 5]
    assert truth.vispruner(scores, patches, 6).order == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("cosines", "residual"),
    [
        ([0.5, 1.0, 0.8], [8, 4, 5, 7]),  # 6 goes, and of the others the more alike is first
        ([0.8, 1.0, 0.5], [4, 8, 5, 7]),
        ([0.5, 1.0, 0.5], [4, 8, 5, 7]),  # a tie keeps the order
        ([1.0, 0.5, 1.0], [8, 6, 5, 7]),  # of two equal ones the earlier goes
    ],
)
def test_vispruner_orders_survivors_by_likeness(cosines, residual):
    # Kept 8 of 9: 0 to 3 by score. Residual 4 to 8: evens 4, 6 and 8, odds 5 and 7; one goes.
    patches = np.tile([1.0, 0.0], (9, 1))
    patches[4::2] = [[cosine, math.sqrt(1 - cosine**2)] for cosine in cosines]
    assert truth.vispruner(np.linspace(1, 0, 9), patches, 8).order == [0, 1, 2, 3, *residual]


# DivPrune and CDPruner.


@sizes
def test_divprune_equals_a_running_minimum(total, kept):
    tokens = draw(total, 6)
    distances = 1 - normalize(tokens) @ normalize(tokens).T
    # The second smallest of a column is the nearest other token.
    first = int(np.sort(distances, axis=0)[min(1, total - 1)].argmax())
    order, nearest = [first], distances[first]
    while len(order) < kept:
        nearest = np.where(np.isin(np.arange(total), order), -1, nearest)
        order.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, distances[order[-1]])
    assert truth.divprune(tokens, kept).order == order


def test_divprune_by_hand():
    angles = np.array([0, 1, 2, 90, 180, 183])
    tokens = np.stack([np.cos(np.radians(angles)), np.sin(np.radians(angles))], axis=1)
    assert truth.divprune(tokens, 4).order == [3, 5, 0, 4]
    assert truth.divprune(np.ones((3, 2)), 3).order == [0, 1, 2]


@pytest.mark.parametrize("sign", [1, -1])
def test_dpp_relevance(sign):
    text, patches = draw(1, 5)[0], draw(30, 5)
    raw = sign * (normalize(patches) @ normalize(text))
    expected = (raw - raw.min() + 1e-6) / (raw.max() - raw.min())
    made = truth.dpp_relevance(text, patches, sign)
    close(made, expected)
    assert made.min() > 0
    close(truth.dpp_relevance(text, patches[:1], sign), [1])
    close(truth.dpp_relevance(text, np.ones((4, 5)), sign), np.ones(4))


@pytest.mark.parametrize(("total", "kept", "seed"), [(1, 1, 0), (8, 8, 0), (12, 5, 1), (20, 9, 2)])
def test_greedy_dpp_maximizes_the_determinant_step_by_step(total, kept, seed):
    text, text_patches, tokens = draw(1, 5, seed)[0], draw(total, 5, seed), draw(total, 24, seed)
    made = truth.cdpruner(text, text_patches, tokens, kept)
    relevance = truth.dpp_relevance(text, text_patches)
    cosines = normalize(tokens) @ normalize(tokens).T
    kernel = relevance[:, None] * cosines * relevance[None]
    close(truth.dpp_kernel(relevance, tokens), kernel)
    chosen = []
    for _ in range(kept):
        gains = {
            i: np.linalg.slogdet(kernel[np.ix_([*chosen, i], [*chosen, i])])[1]
            for i in range(total)
            if i not in chosen
        }
        chosen.append(max(gains, key=gains.get))
    assert made.order == chosen
    close(made.scores, relevance)


@pytest.mark.parametrize(("total", "kept", "seed"), [(12, 5, 1), (40, 20, 2)])
def test_greedy_dpp_equals_the_incremental_recipe(total, kept, seed):
    text, text_patches, tokens = draw(1, 5, seed)[0], draw(total, 5, seed), draw(total, 48, seed)
    kernel = truth.dpp_kernel(truth.dpp_relevance(text, text_patches, 1), tokens)
    gains, columns, order = np.diag(kernel).copy(), np.zeros((0, total)), []
    for _ in range(kept):
        chosen = int(gains.argmax())
        column = (kernel[chosen] - columns[:, chosen] @ columns) / np.sqrt(gains[chosen])
        gains -= column**2
        gains[chosen] = -np.inf
        columns = np.vstack([columns, column])
        order.append(chosen)
    assert truth.cdpruner(text, text_patches, tokens, kept, sign=1).order == order


def test_greedy_dpp_survives_tokens_that_repeat():
    tokens = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    order = truth.greedy_dpp(truth.dpp_kernel(np.ones(4), tokens), 4)
    assert order == [0, 2, 1, 3]


# Counts.


@pytest.mark.parametrize("total", [1, 5, 256, 576])
def test_adaptive_count_is_the_number_of_outliers(total):
    values = np.abs(draw(total, 1)[:, 0]) ** 3
    low, high = np.quantile(values, [0.25, 0.75])
    assert truth.adaptive_count_iqr(values) == int((values > high + 1.5 * (high - low)).sum())


def test_adaptive_count_by_hand():
    # Quartiles 2 and 4, so the fence is 7: 7 itself is inside.
    assert truth.adaptive_count_iqr([1, 2, 3, 4, 7]) == 0
    assert truth.adaptive_count_iqr([1, 2, 3, 4, 7.01]) == 1
    assert truth.adaptive_count_iqr([5, 5, 5, 5]) == 0


@pytest.mark.parametrize(
    ("outliers", "grid"), [(32, 96), (40, 144), (58, 192), (72, 288), (115, 575), (143, 575)]
)
def test_prumerge_plus_counts_of_the_published_code(outliers, grid):
    # Outliers lie on the grid, so that the union is the grid; then one lies beside it.
    stride = max(1, int(int(576 / outliers) / 3))
    a = np.linspace(0.001, 0.0010001, 576)
    a[: outliers * stride : stride] = 1
    assert truth.adaptive_count_iqr(a) == outliers
    assert truth.prumerge_plus_adaptive_count(a) == grid
    a[0], a[575] = 0.001, 1
    assert truth.prumerge_plus_adaptive_count(a) == grid + 1


def test_prumerge_plus_keeps_nothing_without_outliers():
    assert truth.prumerge_plus_adaptive_count(np.ones(16)) == 0
