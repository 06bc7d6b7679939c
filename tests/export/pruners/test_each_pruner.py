"""What random scenes do not show of single pruners: ties, ranks, adaptive counts, draws."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from makers.scenes import CONFIG, make_scene
from truths import pruners as truth
from truths.choices import PRUNERS, close, compare, expect, load, realize
from truths.formulas import find_count, grid_scores

from gap_export.config.records import PruneConfig
from gap_export.interfaces.features import EagerVision, Feature, Geometry, VisionFeatures
from gap_runtime.grounding.compare import is_near_tie

ADAPTIVE = [name for name in PRUNERS if hasattr(load(name), "count_adaptively")]


def test_cdpruner_stays_finite_far_beyond_the_rank():
    scene = make_scene((24, 24), width=24)
    order = load("cdpruner").prune(scene.features(), 500, CONFIG).order[0].tolist()
    assert len(set(order)) == 500
    # The first ones are as many as a token is wide; all others go by relevance.
    relevance = truth.dpp_relevance(scene.text, scene.text_patches)
    chosen = truth.top(relevance, 24 * 24)
    assert order[:24] == truth.cdpruner(scene.text, scene.text_patches, scene.tokens, 24).order
    assert order[30:] == [index for index in chosen if index not in order[:30]][: 500 - 30]


def test_cdpruner_takes_all_as_relevant_where_nothing_tells_them_apart():
    scene = make_scene((4, 5))
    close(load("cdpruner")._rate(scene.features())[0], expect("cdpruner", scene, 1).scores)
    silent = replace(scene, text=torch.zeros_like(scene.text))
    assert load("cdpruner")._rate(silent.features()).eq(1).all()
    for kept in (9, 20):
        assert (
            len(set(load("cdpruner").prune_eagerly(silent.vision(), kept, CONFIG).order)) == kept
        )
        made = load("cdpruner").prune(silent.features(), kept, CONFIG).order[0].tolist()
        assert len(set(made)) == kept


def test_merging_equals_the_public_formulas():
    scene = make_scene((6, 8))
    query, keys = scene.queries[2][0, 0].numpy(), scene.keys[2][0].numpy()
    for name, formula in (("prumerge", truth.prumerge), ("prumerge_plus", truth.prumerge_plus)):
        expected = formula(query, keys, scene.patches.numpy(), 13)
        compare(
            realize(load(name).prune(scene.features(), 13, CONFIG), scene.patches),
            expected,
            scene.patches,
        )


def test_prumerge_plus_ranks_small_attention_apart():
    # All of it about 1 / 577: as 2 + a in float32 a third of the grid's would be ties.
    scene = make_scene((24, 24), spread=0.01)
    a = scene.one_head_attention
    assert len(np.unique(np.float32(2 + a))) < 0.7 * 576
    made = load("prumerge_plus").prune(scene.features(), 64, CONFIG).order[0].tolist()
    expected = truth.top(grid_scores(scene, 64), 64)
    close(np.sort(-a[made[:48]]), -a[made[:48]], at_most=1e-8)
    assert set(made) == set(expected)
    assert sum(one != other for one, other in zip(made, expected, strict=True)) <= 4


@pytest.mark.parametrize("kept", [16, 20, 30])
def test_scores_of_prumerge_plus_judge_near_ties_beside_the_grid(kept):
    scene = make_scene((8, 8))
    choice = load("prumerge_plus").prune_eagerly(scene.vision(), kept, CONFIG)
    a, grid = scene.one_head_attention, truth.prumerge_plus_grid(64, kept)
    beside = truth.others(grid, 64)
    given = np.array(choice.scores)
    close(given[beside], a[beside])
    assert given[grid].min() > given[beside].max()
    expected = np.array(choice.order)
    cut, lost = int(expected[-1]), int(np.setdiff1d(np.arange(64), expected)[0])
    assert cut not in grid
    given[lost] = given[cut] * 0.99999
    exchanged = np.where(expected == cut, lost, expected)
    assert is_near_tie(exchanged, expected, given, 1e-4)
    given[lost] = given[cut] * 0.9
    assert not is_near_tie(exchanged, expected, given, 1e-4)
    given[lost] = given[cut] * 0.99999
    without_grid = np.where(expected == grid[0], lost, expected)
    assert not is_near_tie(without_grid, expected, given, 3e-2)


@pytest.mark.parametrize("spread", [1.0, 4.0, 9.0])
@pytest.mark.parametrize("kind", ["plain", "strips", "views"])
def test_adaptive_counts_are_the_formulas(kind, spread):
    scene = {
        "plain": make_scene((16, 16), spread=spread),
        "strips": make_scene((8, 8), strip=4, spread=spread),
        "views": make_scene((8, 8), (6, 8), views=2, spread=spread),
    }[kind]
    sharp = replace(scene, text=spread * scene.text)
    counts = {name: load(name).count_adaptively(sharp.vision()) for name in ADAPTIVE}
    assert counts == {name: find_count(name)(sharp) for name in ADAPTIVE}
    assert counts["trim"] > 0
    assert spread == 1.0 or counts["prumerge"] > 0


def test_adaptive_counts_of_even_attention_are_zero():
    scene = make_scene((4, 4))
    even = replace(scene, queries=tuple(torch.zeros_like(q) for q in scene.queries))
    assert load("prumerge").count_adaptively(even.vision()) == 0
    assert load("prumerge_plus").count_adaptively(even.vision()) == 0


def features(grid, attention=None):
    values = {} if attention is None else {Feature.CLS_ATTENTION: torch.tensor([attention])}
    return VisionFeatures(
        patches_BNC=torch.randn(1, grid[0] * grid[1], 3),
        geometry=Geometry(grids=(grid,)),
        values=values,
        text_sign=1,
    )


def vision_of_map(attention):
    """A picture of one view with nothing but one block's attention map [H, T, T]."""
    nothing = torch.zeros(attention.shape[1] - 1, 1)
    return EagerVision(
        patches=nothing,
        tokens=nothing,
        hidden_states=(),
        attentions=(attention[None],),
        queries=(),
        keys=(),
        leading=1,
        layer=1,
        geometry=Geometry(grids=((1, len(nothing)),)),
        arrange=lambda values: values[0],
        text=None,
        text_patches=None,
        text_sign=1,
    )


def test_cls_attention_keeps_scores_in_float32():
    # Two scores that are one number in float16.
    attention = [0.2, 0.30001, 0.30002, 0.1]
    choice = load("cls_attention").prune(features((2, 2), attention), 1, CONFIG)
    assert choice.order.tolist() == [[2]]


@pytest.mark.parametrize("name", ["cls_attention", "vispruner"])
def test_eager_attention_gives_ties_to_the_lower_index(name):
    # Quarters are exact under the mean of two heads; many, so that an unstable sort shows.
    levels = 0.25 * np.random.default_rng(0).integers(0, 4, 576)
    maps = torch.zeros(2, 577, 577)
    maps[0, 0, 1:], maps[1, 0, 1:] = torch.tensor(0.5 * levels), torch.tensor(1.5 * levels)
    # Attention to CLS itself is the largest and must not count as a patch.
    maps[:, 0, 0] = 100.0
    ranked = truth.top(levels, 576)
    for kept in (1, 100, 288, 576):
        choice = load(name).prune_eagerly(vision_of_map(maps), kept, CONFIG)
        sure = kept if name == "cls_attention" else kept // 2
        assert list(choice.order)[:sure] == ranked[:sure]


@settings(max_examples=100)
@given(st.integers(1, 24), st.integers(1, 24), st.data())
def test_spatial_is_ascending_distinct_and_spread(rows, columns, data):
    patches = rows * columns
    kept = data.draw(st.integers(1, patches))
    order = load("spatial").prune(features((rows, columns)), kept, CONFIG).order
    assert len(order) == kept
    assert all(a < b for a, b in itertools.pairwise(order))
    assert order[0] >= 0
    assert order[-1] < patches


def draw(kept, seed, grid=(8, 8)):
    return load("random").prune(features(grid), kept, PruneConfig(seed=seed)).order


def test_random_is_one_draw_per_seed():
    # Features are random each time, so the picture has no say.
    assert draw(20, seed=3) == draw(20, seed=3)
    assert draw(20, seed=3) != draw(20, seed=4)


def test_random_draws_distinct_patches_and_not_the_first_ones():
    order = draw(64, seed=0)
    assert sorted(order) == list(range(64))
    assert list(order) != sorted(order)


def test_random_at_a_higher_ratio_keeps_a_subset():
    counts = [64, 48, 32, 16, 1]
    sets = [set(draw(kept, seed=5)) for kept in counts]
    assert [len(each) for each in sets] == counts
    assert all(more > less for more, less in itertools.pairwise(sets))


def test_random_draws_every_patch_about_equally_often():
    hits = np.zeros(16)
    for seed in range(400):
        hits[list(draw(8, seed=seed, grid=(4, 4)))] += 1
    assert hits.min() > 150
    assert hits.max() < 250
