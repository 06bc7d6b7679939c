"""The position mapping against worked examples, an oracle of plain loops and its properties."""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from truths import placing

from gap_export.config.records import EXTRA_RULES, GRID_MODE, POSITION_MODES, PruneConfig
from gap_export.graph.positions import keeps_raster_order, place_tokens
from gap_export.graph.vision import PruneStage
from gap_export.interfaces.features import Geometry, Kept
from gap_export.reference import choice as reference
from gap_runtime.bundle.layout import TokenLayout

MODES = tuple(mode for mode in POSITION_MODES if mode != GRID_MODE)
GAP_TABLE = {
    # mode: patches by visual slot, position IDs; 2 before, 4 patches, 3 after, order 3 then 1
    "gap": ([1, 3], [0, 1, 3, 5, 6, 7, 8]),
    "compact": ([1, 3], [0, 1, 2, 3, 4, 5, 6]),
    "permuted": ([3, 1], [0, 1, 3, 5, 6, 7, 8]),
    "permuted-compact": ([3, 1], [0, 1, 2, 3, 4, 5, 6]),
}
E = placing.EXTRA
EXTRA_TABLE = {
    # The same, and an extra token of the patches 0 and 2 in parts of 1 to 3: its centroid is
    # 1.5, rounded to 2.
    ("gap", "last-visual"): ([1, 3, E], [0, 1, 3, 5, 5, 6, 7, 8]),
    ("gap", "append"): ([1, 3, E], [0, 1, 3, 5, 6, 7, 8, 9]),
    ("gap", "centroid"): ([1, E, 3], [0, 1, 3, 4, 5, 6, 7, 8]),
    ("permuted", "last-visual"): ([3, 1, E], [0, 1, 3, 5, 5, 6, 7, 8]),
    ("permuted", "append"): ([3, 1, E], [0, 1, 3, 5, 6, 7, 8, 9]),
    ("permuted", "centroid"): ([3, 1, E], [0, 1, 3, 4, 5, 6, 7, 8]),
    ("compact", "last-visual"): ([1, 3, E], [0, 1, 2, 3, 4, 5, 6, 7]),
    ("compact", "append"): ([1, 3, E], [0, 1, 2, 3, 4, 5, 6, 7]),
    ("compact", "centroid"): ([1, E, 3], [0, 1, 2, 3, 4, 5, 6, 7]),
    ("permuted-compact", "last-visual"): ([3, 1, E], [0, 1, 2, 3, 4, 5, 6, 7]),
    ("permuted-compact", "append"): ([3, 1, E], [0, 1, 2, 3, 4, 5, 6, 7]),
    ("permuted-compact", "centroid"): ([3, 1, E], [0, 1, 2, 3, 4, 5, 6, 7]),
}
RULES = (None, "last-visual", "append", "centroid")
# A token of the picture has its index for a feature; the extra one is told by this.
EXTRA_VALUE = 10_000.0


@dataclass(frozen=True, kw_only=True)
class Case:
    """A prompt and a choice: `order` and `weights` are over all visual tokens.

    `weights` are whole numbers of an extra token, and 0 for tokens that it is not made of.
    """

    before: int
    patches: int
    after: int
    order: tuple[int, ...]
    rule: str | None = None
    weights: tuple[int, ...] | None = None
    fixed: tuple[int, ...] = ()

    @property
    def layout(self):
        return TokenLayout(
            prefix=self.before,
            patches=self.patches,
            kept=len(self.order),
            extra=int(self.rule is not None),
            suffix=self.after,
            answer=5,
        )


def worked(order=(3, 1), rule=None):
    weights = None if rule is None else (1, 0, 3, 0)
    return Case(before=2, patches=4, after=3, order=order, rule=rule, weights=weights)


def by_loops(case, mode):
    """The oracle's slots and position IDs."""
    slots, ids, first_new = placing.place(
        case.before, case.patches, case.after, case.order, mode, case.rule, case.weights
    )
    assert not ids or first_new == ids[-1] + 1
    return slots, ids


def by_deletion(case, mode):
    """The definition acted out: number the whole sequence, then delete pruned patches."""
    whole = [("before", j) for j in range(case.before)]
    whole += [("patch", j) for j in range(case.patches)]
    whole += [("after", j) for j in range(case.after)]
    numbered = [(kind, j, number) for number, (kind, j) in enumerate(whole)]
    left = [item for item in numbered if item[0] != "patch" or item[1] in case.order]
    ids = [number for _, _, number in left]
    if mode.endswith("compact"):
        ids = list(range(len(left)))
    raster = [j for kind, j, _ in left if kind == "patch"]
    return (list(case.order) if mode.startswith("permuted") else raster), ids


def by_reference(case, mode):
    """Slots and IDs of the reference, with its own reckoning of the extra token's place."""
    extra_place = None
    if case.rule is not None:
        removable = [index for index in range(case.patches) if index not in case.fixed]
        extra_place = reference.find_extra_place(
            PruneConfig(extra_token=case.rule),
            case.patches,
            removable,
            torch.tensor([float(case.weights[index]) for index in removable]),
        )
    slots, ids = reference.place_tokens(
        case.before, case.patches, case.after, list(case.order), mode, extra_place=extra_place
    )
    return [E if token == reference.EXTRA_INDEX else token for token in slots], ids[0]


def by_mapping(case, mode, *, constant):
    """Slots and IDs of the graph's mapping alone, which is told the centroid."""
    centroid = None
    if case.rule == "centroid":
        centroid = torch.tensor([placing.centroid(case.weights)])
    places = place_tokens(
        case.layout,
        case.order if constant else torch.tensor([case.order]),
        mode,
        extra_rule=case.rule,
        centroid_B=centroid,
    )
    kinds = {places.slots_BV.dtype, places.kept_BK.dtype, places.position_ids_AS.dtype}
    assert kinds == {torch.int64}
    held = [*case.order, E]
    slots = [held[slot] for slot in places.slots_BV[0].tolist()]
    assert [token for token in slots if token != E] == places.kept_BK[0].tolist()
    return slots, places.position_ids_AS[0].tolist()


class FixedPruner:
    """A pruner that keeps what it is told, as a tensor or as a constant."""

    NEEDS = frozenset()
    EXTRA = 0

    def __init__(self, order, *, constant, weights=None):
        self.order = tuple(order) if constant else torch.tensor([list(order)])
        self.weights = weights

    def prune(self, features, kept, config):
        del config
        assert kept == len(self.order if isinstance(self.order, tuple) else self.order[0])
        if self.weights is None:
            return Kept(order=self.order)
        # What the weights make of the features, over this, is the mark of the extra token.
        made = float((self.weights @ features.patches_BNC.float())[0, 0, 0])
        return Kept(order=self.order, extra_BN=self.weights, extra_divisor=made / EXTRA_VALUE)


class FixedTokens(torch.nn.Module):
    """The tokens that are never removed; each has its index for a value."""

    def __init__(self, fixed):
        super().__init__()
        self.fixed = fixed

    def forward(self):
        return torch.tensor(self.fixed, dtype=torch.float32)[None, :, None] + 1


def run_stage(case, mode, *, constant=False):
    """Slots and IDs as the traced module gives them; token n is the number n + 1."""
    removable = [index for index in range(case.patches) if index not in case.fixed]
    chosen = [removable.index(index) for index in case.order if index not in case.fixed]
    weights = None
    if case.rule is not None:
        weights = torch.tensor([[float(case.weights[index]) for index in removable]])
    stage = PruneStage(
        FixedPruner(chosen, constant=constant, weights=weights),
        torch.nn.Identity(),
        FixedTokens(case.fixed) if case.fixed else None,
        config=PruneConfig(positions=mode, extra_token=case.rule or "last-visual"),
        layout=case.layout,
        geometry=Geometry(grids=((1, len(removable)),)),
        fixed=case.fixed,
        given=[],
        text_sign=1,
        grid=None,
        planes=0,
    )
    features = torch.tensor(removable, dtype=torch.float32)[None, :, None] + 1
    tokens, index, position_ids = stage(features, [])
    assert position_ids.dtype == index.dtype == torch.int64
    values = tokens[0, :, 0].tolist()
    slots = [E if abs(value - EXTRA_VALUE) < 1 else round(value) - 1 for value in values]
    assert [token for token in slots if token != E] == index[0].tolist()
    return slots, position_ids[0].tolist()


@st.composite
def cases(draw, *, rules=(None,), newlines=False):
    patches = draw(st.integers(1, 60))
    fixed = ()
    if newlines and patches > 1:
        fixed = tuple(sorted(draw(st.sets(st.integers(0, patches - 1), max_size=patches - 1))))
    removable = [index for index in range(patches) if index not in fixed]
    rule = draw(st.sampled_from(rules))
    if rule is not None and len(removable) == 1:
        # Nothing is removed that an extra token could be made of.
        rule = None
    most = len(removable) - (rule is not None)
    order = draw(st.permutations(removable))[: draw(st.integers(1, most))]
    weights = None
    if rule is not None:
        removed = [index for index in removable if index not in order]
        heavy = {index: draw(st.integers(0, 8)) for index in removed}
        heavy[draw(st.sampled_from(removed))] += 1
        weights = tuple(heavy.get(index, 0) for index in range(patches))
    return Case(
        before=draw(st.integers(0, 40)),
        patches=patches,
        after=draw(st.integers(1, 25)),
        order=(*order, *fixed),
        rule=rule,
        weights=weights,
        fixed=fixed,
    )


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
    case = Case(before=before, patches=patches, after=after, order=tuple(kept))
    for constant in (False, True):
        assert by_mapping(case, "gap", constant=constant) == (kept, expected)
    assert by_reference(case, "gap") == (kept, expected)
    assert by_loops(case, "gap") == (kept, expected)
    assert expected[-1] + 1 == first_new


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("constant", [False, True])
def test_every_mode_in_the_worked_example(mode, constant):
    assert run_stage(worked(), mode, constant=constant) == GAP_TABLE[mode]
    assert by_mapping(worked(), mode, constant=constant) == GAP_TABLE[mode]
    assert by_reference(worked(), mode) == GAP_TABLE[mode]
    assert by_loops(worked(), mode) == GAP_TABLE[mode]


@pytest.mark.parametrize(("mode", "rule"), EXTRA_TABLE)
@pytest.mark.parametrize("constant", [False, True])
def test_every_extra_rule_in_the_worked_example(mode, rule, constant):
    expected = EXTRA_TABLE[mode, rule]
    case = worked(rule=rule)
    assert run_stage(case, mode, constant=constant) == expected
    assert by_mapping(case, mode, constant=constant) == expected
    assert by_reference(case, mode) == expected
    assert by_loops(case, mode) == expected


def test_there_are_exactly_these_modes_and_rules():
    assert set(MODES) == set(GAP_TABLE)
    assert [mode for mode in MODES if keeps_raster_order(mode)] == ["gap", "compact"]
    # Dropped is as if there were none.
    assert set(EXTRA_RULES) == {rule for _, rule in EXTRA_TABLE} | {"drop"}
    assert {mode for mode, _ in EXTRA_TABLE} == set(MODES)


@pytest.mark.parametrize("rule", RULES)
def test_the_mapping_is_exact_for_large_indices(rule):
    order = (2927, 0, 2048, 2047, 65536, 2049, 1, 70_001, 70_000)
    weights = [0] * 70_003
    weights[70_002] = 1
    case = Case(before=3, patches=70_003, after=2, order=order, rule=rule, weights=tuple(weights))
    expected = sorted(order) + ([E] if rule else [])
    for mode in ("gap", "compact"):
        slots, ids = by_mapping(case, mode, constant=False)
        assert slots == expected
        assert ids == by_mapping(case, mode, constant=True)[1] == by_reference(case, mode)[1]
    gap = by_mapping(case, "gap", constant=False)[1]
    assert gap[3:12] == [3 + index for index in sorted(order)]


@settings(max_examples=300)
@given(cases(rules=RULES), st.sampled_from(MODES), st.booleans())
def test_all_implementations_agree(case, mode, constant):
    expected = by_loops(case, mode)
    assert by_reference(case, mode) == expected
    assert by_mapping(case, mode, constant=constant) == expected
    assert run_stage(case, mode, constant=constant) == expected
    if case.rule is None:
        assert by_deletion(case, mode) == expected


@settings(max_examples=300)
@given(cases(rules=RULES, newlines=True), st.sampled_from(MODES), st.booleans())
def test_tokens_that_are_never_removed_lie_where_they_lay(case, mode, constant):
    """Newlines of a tiled picture: kept always, last in the pruner's own order."""
    slots, ids = run_stage(case, mode, constant=constant)
    assert (slots, ids) == by_loops(case, mode) == by_reference(case, mode)
    assert set(case.fixed) <= set(slots)
    if mode == "gap" and case.rule is None:
        assert ids[case.before : case.before + len(slots)] == [case.before + s for s in slots]
    if mode.startswith("permuted") and case.fixed:
        last = len(slots) - (case.rule is not None)
        assert tuple(slots[last - len(case.fixed) : last]) == case.fixed


@settings(max_examples=200)
@given(cases(), st.sampled_from(RULES[1:]), st.sampled_from(MODES))
def test_an_extra_token_moves_no_other(case, rule, mode):
    """But for `append`, which moves the text after it on, and wherever IDs are compact."""
    weights = tuple(int(index not in case.order) for index in range(case.patches))
    if not any(weights):
        return
    without, ids = by_reference(case, mode)
    with_extra = replace(case, rule=rule, weights=weights)
    slots, more = by_mapping(with_extra, mode, constant=False)
    assert [token for token in slots if token != E] == without
    assert len(more) == len(ids) + 1
    assert more == sorted(more)
    if mode in {"gap", "permuted"}:
        start = case.before + len(without)
        text = [number + (rule == "append") for number in ids[start:]]
        assert more[start + 1 :] == text
        visual = more[case.before : start + 1]
        own = {
            "last-visual": case.patches - 1,
            "append": case.patches,
            "centroid": placing.centroid(weights),
        }[rule]
        visual.remove(case.before + own)
        assert visual == ids[case.before : start]
    else:
        assert more == list(range(len(ids) + 1))


@settings(max_examples=300)
@given(cases())
def test_gap_properties(case):
    slots, ids = run_stage(case, "gap")
    before, patches, after, kept = case.before, case.patches, case.after, len(case.order)
    visual, text = ids[before : before + kept], ids[before + kept :]
    shifts = [number - slot for slot, number in enumerate(ids)]
    assert all(a < b for a, b in itertools.pairwise(ids))
    assert len(ids) == before + kept + after
    assert [number - before for number in visual] == slots == sorted(case.order)
    assert text == list(range(before + patches, before + patches + after))
    assert shifts == sorted(shifts)
    assert shifts[-1] == patches - kept
    assert ids[:before] == list(range(before))


@settings(max_examples=200)
@given(cases(rules=RULES, newlines=True), st.randoms(use_true_random=False))
def test_raster_modes_do_not_depend_on_the_pruner_order(case, random):
    choice = [index for index in case.order if index not in case.fixed]
    shuffled = (*random.sample(choice, len(choice)), *case.fixed)
    other = replace(case, order=shuffled)
    for mode in ("gap", "compact"):
        one = run_stage(case, mode)
        assert run_stage(other, mode) == one
        assert by_mapping(other, mode, constant=True) == one
        assert by_reference(other, mode) == one


@settings(max_examples=100)
@given(cases())
def test_gap_equals_compact_only_without_pruning(case):
    ids = {mode: run_stage(case, mode)[1] for mode in ("gap", "compact")}
    assert (ids["gap"] == ids["compact"]) == (len(case.order) == case.patches)
    assert ids["compact"] == list(range(case.before + len(case.order) + case.after))


@settings(max_examples=60)
@given(cases(newlines=True))
def test_keeping_all_patches_changes_nothing(case):
    rest = [i for i in range(case.patches) if i not in case.order]
    choice = [index for index in case.order if index not in case.fixed]
    everything = (*choice, *rest, *case.fixed)
    whole = list(range(case.before + case.patches + case.after))
    kept = replace(case, order=everything)
    assert run_stage(kept, "gap") == (list(range(case.patches)), whole)
    slots, ids = run_stage(kept, "permuted")
    assert (slots, ids) == (list(everything), whole)
