"""Slots and position IDs of tests/truths/pruners.py by hand, and by sorted pairs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from truths import placing

MODES = ("gap", "compact", "permuted", "permuted-compact")
RULES = (None, "last-visual", "append", "centroid")


def close(one, other):
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


# Slots and position IDs.


@pytest.mark.parametrize(
    ("s", "total", "t", "kept", "visual", "first_new"),
    [
        (35, 576, 20, [0, 24, 575], [35, 59, 610], 631),
        (2, 4, 3, [1, 3], [3, 5], 9),
        (0, 3, 0, [0, 1, 2], [0, 1, 2], 3),
        (5, 576, 12, list(range(0, 568, 9)), list(range(5, 573, 9)), 593),
    ],
)
def test_gap_in_worked_examples(s, total, t, kept, visual, first_new):
    text = list(range(first_new - t, first_new))
    expected = (kept, [*range(s), *visual, *text], first_new)
    assert placing.place(s, total, t, kept, "gap") == expected
    assert placing.place(s, total, t, kept[::-1], "gap") == expected


X = placing.EXTRA


@pytest.mark.parametrize(
    ("mode", "rule", "slots", "ids"),
    [
        ("gap", None, [1, 3], [0, 1, 3, 5, 6, 7, 8]),
        ("compact", None, [1, 3], [0, 1, 2, 3, 4, 5, 6]),
        ("permuted", None, [3, 1], [0, 1, 3, 5, 6, 7, 8]),
        ("permuted-compact", None, [3, 1], [0, 1, 2, 3, 4, 5, 6]),
        ("gap", "last-visual", [1, 3, X], [0, 1, 3, 5, 5, 6, 7, 8]),
        ("gap", "append", [1, 3, X], [0, 1, 3, 5, 6, 7, 8, 9]),
        ("gap", "centroid", [1, X, 3], [0, 1, 3, 4, 5, 6, 7, 8]),
        ("compact", "last-visual", [1, 3, X], [0, 1, 2, 3, 4, 5, 6, 7]),
        ("compact", "append", [1, 3, X], [0, 1, 2, 3, 4, 5, 6, 7]),
        ("compact", "centroid", [1, X, 3], [0, 1, 2, 3, 4, 5, 6, 7]),
        ("permuted", "last-visual", [3, 1, X], [0, 1, 3, 5, 5, 6, 7, 8]),
        ("permuted", "append", [3, 1, X], [0, 1, 3, 5, 6, 7, 8, 9]),
        ("permuted", "centroid", [3, 1, X], [0, 1, 3, 4, 5, 6, 7, 8]),
        ("permuted-compact", "last-visual", [3, 1, X], [0, 1, 2, 3, 4, 5, 6, 7]),
        ("permuted-compact", "append", [3, 1, X], [0, 1, 2, 3, 4, 5, 6, 7]),
        ("permuted-compact", "centroid", [3, 1, X], [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_every_mode_in_the_worked_example(mode, rule, slots, ids):
    # Weights 0.2 and 0.8 on tokens 0 and 2: the centroid is 1.6, rounded 2.
    made = placing.place(2, 4, 3, [3, 1], mode, rule, [0.2, 0, 0.8, 0])
    assert made == (slots, ids, ids[-1] + 1)


@pytest.mark.parametrize(
    ("weights", "slots", "ids"),
    [
        ([1, 0, 0, 0, 0], [X, 1, 3], [0, 1, 3]),  # before all that is kept
        ([1, 0, 1, 0, 0], [1, X, 3], [1, 1, 3]),  # shares its ID, and stands after
        ([0.1, 0, 0.1, 0, 0.1], [1, X, 3], [1, 2, 3]),
        ([0, 0, 1, 0, 1], [1, 3, X], [1, 3, 3]),
        ([0, 0, 0, 0, 2], [1, 3, X], [1, 3, 4]),
    ],
)
def test_extra_tokens_at_their_centroid(weights, slots, ids):
    assert placing.place(0, 5, 0, [3, 1], "gap", "centroid", weights) == (slots, ids, 5)


@pytest.mark.parametrize(
    ("weights", "index"),
    [
        ([0, 1], 1),
        ([1, 1], 1),  # 0.5
        ([1, 0, 0, 1, 0, 0, 0, 0], 2),  # 1.5
        ([0, 1, 0, 0, 1, 0], 3),  # 2.5: up, not to the even number
        ([0.51, 0.49], 0),
        ([0, 0, 3, 0], 2),
        ([1 / 49] * 48, 24),  # 23.5, exact although the weights are not
    ],
)
def test_centroids_round_halves_up(weights, index):
    assert placing.centroid(weights) == index


def test_an_extra_token_of_nothing_has_no_centroid():
    with pytest.raises(ValueError, match="nothing"):
        placing.place(0, 2, 0, [0, 1], "gap", "centroid", [0, 0])


@st.composite
def cases(draw):
    total = draw(st.integers(2, 60))
    order = draw(st.permutations(range(total)))[: draw(st.integers(1, total - 1))]
    weights = [0 if j in order else draw(st.integers(1, 9)) for j in range(total)]
    return draw(st.integers(0, 40)), total, draw(st.integers(0, 25)), order, weights


def lay_out(s, total, t, order, mode, at):
    """Another way: sort (index, is it the extra token) pairs, then delete from the whole."""
    pairs = [(index, False) for index in order]
    extra = [] if at is None else [(at, True)]
    slots = pairs + extra if mode.startswith("permuted") else sorted(pairs + extra)
    shift = int(at == total)
    ids = np.arange(s + len(slots) + t)
    if not mode.endswith("compact"):
        visual = np.sort([index for index, _ in pairs + extra]) + s
        ids = np.concatenate([np.arange(s), visual, np.arange(t) + s + total + shift])
    first = len(ids) if mode.endswith("compact") else s + total + shift + t
    return [X if new else index for index, new in slots], ids.tolist(), first


@settings(max_examples=500)
@given(cases(), st.sampled_from(MODES), st.sampled_from(RULES))
def test_placing_agrees_with_sorted_pairs(case, mode, rule):
    s, total, t, order, weights = case
    mean = np.dot(weights, np.arange(total)) / np.sum(weights)
    at = {
        None: None,
        "last-visual": total - 1,
        "append": total,
        "centroid": int(np.floor(mean + 0.5)),
    }[rule]
    made = placing.place(s, total, t, order, mode, rule, weights)
    assert made == lay_out(s, total, t, order, mode, at)


@settings(max_examples=300)
@given(cases(), st.sampled_from(MODES), st.sampled_from(RULES))
def test_properties_of_placing(case, mode, rule):
    s, total, t, order, weights = case
    slots, ids, first_new = placing.place(s, total, t, order, mode, rule, weights)
    extra = int(rule is not None)
    assert len(slots) == len(order) + extra
    assert [slot for slot in slots if slot != X] == (
        list(order) if mode.startswith("permuted") else sorted(order)
    )
    assert len(ids) == s + len(slots) + t
    assert ids == sorted(ids)
    assert ids[:s] == list(range(s))
    assert first_new > max(ids, default=-1)
    if t:
        assert first_new == ids[-1] + 1
    if mode.endswith("compact"):
        assert first_new == len(ids)
    else:
        assert first_new == s + total + t + int(rule == "append")
        distinct = len(set(ids))
        assert distinct >= len(ids) - extra
    if mode == "gap":
        where = {slot: number - s for slot, number in zip(slots, ids[s:], strict=False)}
        assert all(where[index] == index for index in order)
