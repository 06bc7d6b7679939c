"""The position mapping against worked examples, a third implementation and its properties."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gap_export.config import POSITION_MODES, PruneConfig
from gap_export.features import Kept
from gap_export.graph.positions import keeps_raster_order, map_positions, sort_ascending
from gap_export.graph.vision import PruneStage
from gap_export.reference import place_tokens
from gap_runtime.layout import TokenLayout

GAP_TABLE = {
    # mode: patches by visual slot, position IDs; 2 before, 4 patches, 3 after, order 3 then 1
    "gap": ([1, 3], [0, 1, 3, 5, 6, 7, 8]),
    "compact": ([1, 3], [0, 1, 2, 3, 4, 5, 6]),
    "permuted": ([3, 1], [0, 1, 3, 5, 6, 7, 8]),
    "permuted-compact": ([3, 1], [0, 1, 2, 3, 4, 5, 6]),
}


class FixedPruner:
    """A pruner that keeps what it is told, as a tensor or as a constant."""

    NEEDS = frozenset()

    def __init__(self, order, *, constant):
        self.order = tuple(order) if constant else torch.tensor([list(order)])

    def prune(self, features, kept, config):
        del features, kept, config
        return Kept(order=self.order)


def layout(before, patches, kept, after):
    return TokenLayout(prefix=before, patches=patches, kept=kept, extra=0, suffix=after, answer=5)


def run_stage(before, patches, after, order, mode, *, constant=False):
    """Slots and IDs as the traced module gives them; feature n of a patch n is the number n."""
    stage = PruneStage(
        FixedPruner(order, constant=constant),
        torch.nn.Identity(),
        config=PruneConfig(positions=mode),
        layout=layout(before, patches, len(order), after),
        grid=(1, patches),
    )
    features = torch.arange(patches, dtype=torch.float32)[None, :, None]
    tokens, index, position_ids = stage(features, [])
    assert position_ids.dtype == index.dtype == torch.int64
    assert tokens[0, :, 0].tolist() == index[0].tolist()
    return index[0].tolist(), position_ids[0].tolist()


def by_deletion(before, patches, after, order, mode):
    """The definition acted out: number the whole sequence, then delete pruned patches."""
    whole = [("before", j) for j in range(before)]
    whole += [("patch", j) for j in range(patches)]
    whole += [("after", j) for j in range(after)]
    numbered = [(kind, j, number) for number, (kind, j) in enumerate(whole)]
    left = [item for item in numbered if item[0] != "patch" or item[1] in order]
    ids = [number for _, _, number in left]
    if mode.endswith("compact"):
        ids = list(range(len(left)))
    raster = [j for kind, j, _ in left if kind == "patch"]
    return (list(order) if mode.startswith("permuted") else raster), ids


@st.composite
def cases(draw):
    patches = draw(st.integers(1, 60))
    order = draw(st.permutations(range(patches)))[: draw(st.integers(1, patches))]
    return draw(st.integers(0, 40)), patches, draw(st.integers(1, 25)), tuple(order)


@pytest.mark.parametrize(
    ("before", "patches", "kept", "after", "expected", "first_new"),
    [
        (35, 576, [0, 24, 575], 20, [*range(35), 35, 59, 610, *range(611, 631)], 631),
        (2, 4, [1, 3], 3, [0, 1, 3, 5, 6, 7, 8], 9),
        (0, 3, [0, 1, 2], 0, [0, 1, 2], 3),
        (
            5,
            576,
            list(range(0, 568, 9)),
            12,
            [0, 1, 2, 3, 4, *range(5, 573, 9), *range(581, 593)],
            593,
        ),
    ],
)
def test_gap_in_worked_examples(before, patches, kept, after, expected, first_new):
    made = map_positions(layout(before, patches, len(kept), after), torch.tensor([kept]), "gap")
    slots, listed = place_tokens(before, patches, after, tuple(kept), "gap")
    assert made[0].tolist() == listed == expected
    assert slots == kept
    assert listed[-1] + 1 == first_new


@pytest.mark.parametrize("mode", POSITION_MODES)
@pytest.mark.parametrize("constant", [False, True])
def test_every_mode_in_the_worked_example(mode, constant):
    assert run_stage(2, 4, 3, (3, 1), mode, constant=constant) == GAP_TABLE[mode]
    assert place_tokens(2, 4, 3, (3, 1), mode) == GAP_TABLE[mode]


def test_there_are_exactly_the_four_modes():
    assert set(POSITION_MODES) == set(GAP_TABLE)
    assert [mode for mode in POSITION_MODES if keeps_raster_order(mode)] == ["gap", "compact"]


def test_sort_ascending_is_exact_for_large_indices():
    index = torch.tensor([[2927, 0, 2048, 2047, 2049, 1]])
    assert sort_ascending(index).tolist() == [[0, 1, 2047, 2048, 2049, 2927]]


@settings(max_examples=300)
@given(cases(), st.sampled_from(POSITION_MODES), st.booleans())
def test_three_implementations_agree(case, mode, constant):
    before, patches, after, order = case
    expected = by_deletion(before, patches, after, order, mode)
    assert place_tokens(before, patches, after, order, mode) == expected
    assert run_stage(before, patches, after, order, mode, constant=constant) == expected


@settings(max_examples=300)
@given(cases())
def test_gap_properties(case):
    before, patches, after, order = case
    slots, ids = run_stage(before, patches, after, order, "gap")
    kept = len(order)
    visual, text = ids[before : before + kept], ids[before + kept :]
    shifts = [number - slot for slot, number in enumerate(ids)]
    assert all(a < b for a, b in itertools.pairwise(ids))
    assert len(ids) == before + kept + after
    assert [number - before for number in visual] == slots == sorted(order)
    assert text == list(range(before + patches, before + patches + after))
    assert shifts == sorted(shifts)
    assert shifts[-1] == patches - kept
    assert ids[:before] == list(range(before))


@settings(max_examples=100)
@given(cases(), st.randoms(use_true_random=False))
def test_raster_modes_do_not_depend_on_the_pruner_order(case, random):
    before, patches, after, order = case
    shuffled = random.sample(order, len(order))
    for mode in ("gap", "compact"):
        one = run_stage(before, patches, after, order, mode)
        assert run_stage(before, patches, after, shuffled, mode) == one
        assert place_tokens(before, patches, after, tuple(shuffled), mode) == one


@settings(max_examples=100)
@given(cases())
def test_gap_equals_compact_only_without_pruning(case):
    before, patches, after, order = case
    ids = {mode: run_stage(before, patches, after, order, mode)[1] for mode in ("gap", "compact")}
    assert (ids["gap"] == ids["compact"]) == (len(order) == patches)
    assert ids["compact"] == list(range(before + len(order) + after))


@settings(max_examples=60)
@given(cases())
def test_keeping_all_patches_changes_nothing(case):
    before, patches, after, order = case
    everything = (*order, *(set(range(patches)) - set(order)))
    whole = list(range(before + patches + after))
    assert run_stage(before, patches, after, everything, "gap") == (list(range(patches)), whole)
    slots, ids = run_stage(before, patches, after, everything, "permuted")
    assert (slots, ids) == (list(everything), whole)
