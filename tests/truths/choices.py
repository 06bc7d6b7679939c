"""What a pruner makes of a scene, by the formulas of pruners.py, and how it is compared."""

import functools
import importlib

import numpy as np
import pytest
import torch
from makers.scenes import CONFIG

import gap_export.pruners
from gap_runtime.registry import list_plugins
from truths import pruners as truth

PRUNERS = sorted(list_plugins("gap_export.pruners"))


TRUTHS = {
    "cdpruner": lambda s, kept, _: truth.cdpruner(
        s.text, s.text_patches, s.tokens, kept, s.text_sign
    ),
    "cls_attention": lambda s, kept, _: truth.Truth(
        order=truth.top(s.attention, kept), scores=s.attention
    ),
    "cls_similarity": lambda s, kept, _: truth.Truth(
        order=truth.top(s.similarity, kept), scores=s.similarity
    ),
    "column_attention": lambda s, kept, _: truth.Truth(
        order=truth.top(s.column_attention, kept), scores=s.column_attention
    ),
    "dart": lambda s, kept, _: truth.dart(s.tokens, kept),
    "divprune": lambda s, kept, _: truth.divprune(s.tokens, kept),
    "nuwa": lambda s, kept, _: truth.nuwa(
        s.attention, s.patches, kept, s.geometry.grids, s.geometry.missing
    ),
    "prumerge": lambda s, kept, _: merge_truth(s, kept, s.one_head_attention),
    "prumerge_plus": lambda s, kept, _: merge_truth(s, kept, grid_scores(s, kept)),
    "random": lambda s, kept, config: truth.random(s.geometry.tokens, kept, config.seed),
    "spatial": lambda s, kept, _: truth.spatial(s.geometry.grids, kept),
    "text_similarity": lambda s, kept, _: truth.text_similarity(
        s.text, s.text_patches, kept, s.text_sign
    ),
    "trim": lambda s, kept, _: truth.trim(s.text, s.text_patches, s.patches, kept, s.text_sign),
    "visionzip": lambda s, kept, _: truth.visionzip(s.attention, s.mean_keys, s.patches, kept),
    "vispruner": lambda s, kept, _: truth.vispruner(s.attention, s.patches, kept),
}
GREEDY = {"cdpruner", "dart", "divprune", "nuwa", "random", "spatial", "visionzip", "vispruner"}
"""Those without scores by which a near tie could be judged; a new one has scores or is listed."""


def find_truth(name):
    """The formula of a pruner; a new pruner needs one."""
    if name not in TRUTHS:
        pytest.fail(f"no truth for pruner '{name}': add its formula to tests/truths/choices.py")
    return TRUTHS[name]


def grid_scores(scene, kept):
    values = scene.one_head_attention.copy()
    values[truth.prumerge_plus_grid(len(values), kept)] += 2.0
    return values


def merge_truth(scene, kept, values):
    order = truth.top(values, kept)
    return truth._merge(order, scene.one_head_attention, values, scene.merge_keys, scene.patches)


@functools.cache
def expect(name, scene, kept):
    return find_truth(name)(scene, kept, CONFIG)


def load(name):
    return importlib.import_module(f"{gap_export.pruners.__name__}.{name}")


def close(made, expected, *, at_most=1e-5):
    np.testing.assert_allclose(made, expected, rtol=0, atol=at_most)


def realize(choice, patches):
    """What the shared stage makes of a choice: order, rows, the extra token and its weights."""
    order = torch.tensor([choice.order]) if isinstance(choice.order, tuple) else choice.order
    rows = patches[order[0]] if choice.mix_BKN is None else choice.mix_BKN[0] @ patches
    if choice.extra_BN is None:
        return order[0].tolist(), rows, None, None
    weights = choice.extra_BN[0]
    extra = weights @ patches / choice.extra_divisor
    return order[0].tolist(), rows, extra, weights / choice.extra_divisor


def compare(made, expected, patches):
    order, rows, extra, weights = made
    assert order == expected.order
    if len(order) == len(patches):
        return
    close(rows, patches[order] if expected.rows is None else expected.rows)
    assert (extra is None) == (expected.extra is None)
    if extra is not None:
        close(extra, expected.extra)
        close(weights, expected.weights)
