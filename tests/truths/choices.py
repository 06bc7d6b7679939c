"""What a pruner makes of a scene, by the formulas of pruners.py, and how it is compared."""

import functools
import importlib

import numpy as np
import torch
from makers.scenes import CONFIG

import gap_export.pruners
from gap_runtime.registry import list_plugins
from truths.formulas import find_formula

PRUNERS = sorted(list_plugins("gap_export.pruners"))


@functools.cache
def expect(name, scene, kept):
    return find_formula(name)(scene, kept, CONFIG)


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
