"""Pruning strategies against loops and numbers worked out by hand."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPVisionConfig, CLIPVisionModel

from gap_export.blocks.clip import ClipTower, resolve_layer
from gap_export.config import PruneConfig
from gap_export.errors import CheckpointError
from gap_export.features import EagerVision, Feature, VisionFeatures
from gap_export.pruners import cls_attention, random, spatial


def features(grid, scores=None):
    patches = grid[0] * grid[1]
    extras = {} if scores is None else {Feature.CLS_ATTENTION: torch.tensor([scores])}
    return VisionFeatures(patches_BNC=torch.randn(1, patches, 3), grid=grid, extras=extras)


def vision(grid, attentions=(), layer=1):
    return EagerVision(hidden_states=(), attentions=tuple(attentions), layer=layer, grid=grid)


def attention_maps(scores, *, heads=3, seed=0):
    """Maps of one block whose CLS row has these head means; everything else is noise."""
    noise = torch.Generator().manual_seed(seed)
    tokens = len(scores) + 1
    maps = torch.rand(1, heads, tokens, tokens, generator=noise)
    split = torch.tensor([0.5, 1.5, 1.0])[:heads]
    maps[0, :, 0, 1:] = split[:, None] * torch.tensor(scores)[None]
    # Attention to CLS itself is the largest and must not count as a patch.
    maps[0, :, 0, 0] = 100.0
    return maps


def best_by_loop(scores, kept):
    """Repeatedly take the highest score, the lowest index where scores are equal."""
    left, chosen = dict(enumerate(scores)), []
    for _ in range(kept):
        best = None
        for index, score in left.items():
            if best is None or score > left[best]:
                best = index
        chosen.append(best)
        del left[best]
    return chosen


@pytest.mark.parametrize("kept", [1, 7, 16])
def test_cls_attention_takes_the_highest_scores_best_first(kept):
    rng = np.random.default_rng(kept)
    scores = [float(value) for value in rng.permutation(16) / 100]
    made = cls_attention.prune(features((4, 4), scores), kept, PruneConfig())
    assert made.order.dtype == torch.int64
    assert made.order.tolist() == [best_by_loop(scores, kept)]


def test_cls_attention_keeps_scores_in_float32():
    # Two scores that are one number in float16.
    scores = [0.2, 0.30001, 0.30002, 0.1]
    assert cls_attention.prune(features((2, 2), scores), 1, PruneConfig()).order.tolist() == [[2]]


def test_eager_cls_attention_reads_the_right_block_and_row():
    scores = [0.1, 0.4, 0.2, 0.3]
    maps = [attention_maps([0.9, 0.1, 0.1, 0.1]), attention_maps(scores)]
    maps.append(attention_maps([0.1, 0.1, 0.1, 0.9]))
    choice = cls_attention.prune_eagerly(vision((2, 2), maps, layer=2), 3, PruneConfig())
    assert choice.order == (1, 3, 2)
    assert choice.scores == pytest.approx(scores)


def test_eager_cls_attention_gives_ties_to_the_lower_index():
    # Quarters are exact under the mean of three heads; many, so that an unstable sort shows.
    levels = np.random.default_rng(0).integers(0, 4, 576)
    scores = [0.25 * float(level) for level in levels]
    maps = [attention_maps(scores)]
    for kept in (1, 100, 288, 576):
        choice = cls_attention.prune_eagerly(vision((24, 24), maps), kept, PruneConfig())
        assert list(choice.order) == best_by_loop(scores, kept)


def test_the_towers_score_is_the_librarys_attention():
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=3,
        image_size=28,
        patch_size=7,
        attn_implementation="eager",
    )
    library = CLIPVisionModel(config).eval()
    with torch.no_grad():
        for parameter in library.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    pixels = torch.randn(1, 3, 28, 28)
    layer = resolve_layer(config, -2, "config.json")
    tower = ClipTower(config, layer, frozenset({Feature.CLS_ATTENTION})).eval()
    missing, unexpected = tower.vision_tower.load_state_dict(library.state_dict(), strict=False)
    with torch.no_grad():
        patches, extras = tower(pixels)
        whole = library(pixels, output_hidden_states=True, output_attentions=True)
    expected = torch.stack([whole.attentions[2][0, head, 0, 1:] for head in range(3)]).mean(0)
    assert layer == 3
    assert not missing
    assert all(".3." in name or "post_layernorm" in name for name in unexpected)
    assert torch.allclose(patches, whole.hidden_states[-2][:, 1:], atol=1e-5)
    assert torch.allclose(extras[Feature.CLS_ATTENTION][0], expected, atol=1e-6)
    assert expected.std() > 1e-3


@pytest.mark.parametrize(("layer", "index"), [(-2, 4), (-1, 5), (5, 5), (1, 1), (-5, 1)])
def test_feature_layers_count_hidden_states(layer, index):
    assert resolve_layer(CLIPVisionConfig(num_hidden_layers=5), layer, "x") == index


@pytest.mark.parametrize("layer", [0, 6, -6, -7])
def test_feature_layers_without_a_block_are_refused(layer):
    with pytest.raises(CheckpointError, match="vision_feature_layer"):
        resolve_layer(CLIPVisionConfig(num_hidden_layers=5), layer, "x")


@pytest.mark.parametrize(
    ("grid", "kept", "expected"),
    [
        ((8, 8), 16, [8 * row + column for row in (1, 3, 5, 7) for column in (1, 3, 5, 7)]),
        ((8, 8), 9, [9, 12, 14, 33, 36, 38, 49, 52, 54]),
        ((8, 8), 1, [36]),
        ((8, 8), 64, list(range(64))),
        ((8, 8), 32, list(range(1, 64, 2))),
        ((8, 8), 5, [6, 19, 32, 44, 57]),
        ((2, 6), 4, [1, 4, 7, 10]),
        ((2, 6), 9, [0, 2, 3, 4, 6, 7, 8, 10, 11]),
        ((24, 24), 3, [96, 288, 480]),
    ],
)
def test_spatial_by_hand(grid, kept, expected):
    assert list(spatial.prune(features(grid), kept, PruneConfig()).order) == expected
    assert list(spatial.prune_eagerly(vision(grid), kept, PruneConfig()).order) == expected


@settings(max_examples=100)
@given(st.integers(1, 24), st.integers(1, 24), st.data())
def test_spatial_is_ascending_distinct_and_spread(rows, columns, data):
    patches = rows * columns
    kept = data.draw(st.integers(1, patches))
    order = spatial.prune(features((rows, columns)), kept, PruneConfig()).order
    assert len(order) == kept
    assert all(a < b for a, b in itertools.pairwise(order))
    assert order[0] >= 0
    assert order[-1] < patches


def draw(kept, seed, grid=(8, 8)):
    return random.prune(features(grid), kept, PruneConfig(seed=seed)).order


def test_random_is_one_draw_per_seed():
    # Features are random each time, so the picture has no say.
    assert draw(20, seed=3) == draw(20, seed=3)
    assert draw(20, seed=3) != draw(20, seed=4)
    assert draw(20, seed=3) == random.prune_eagerly(vision((8, 8)), 20, PruneConfig(seed=3)).order


def test_random_draws_distinct_patches_and_not_the_first_ones():
    order = draw(64, seed=0)
    assert sorted(order) == list(range(64))
    assert list(order) != sorted(order)
    assert all(type(index) is int for index in order)


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
