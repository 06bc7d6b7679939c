"""`+ivc`: the tokens at extreme rotary positions stay, and the pruner chooses among the others."""

import math
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from makers.scenes import CONFIG, make_scene
from truths import pruners as truth
from truths.choices import PRUNERS, compare, expect, load, realize

from gap_export.config.load import load_config
from gap_export.config.pruners import resolve_pruner
from gap_export.config.records import PruneConfig
from gap_export.dialects import native
from gap_export.graph.coordinates import choose, find_coordinates, find_ids
from gap_export.interfaces.pruner import load_pruner
from gap_export.pipeline.plan import plan_export
from gap_export.pipeline.request import make_request
from gap_export.reference import coordinates as eager
from gap_export.tracing.trace import trace
from gap_runtime.bundle.tensors import TensorSpec
from gap_runtime.errors import ConfigError, UnknownNameError

FREQUENCIES = [10_000.0 ** (-k / 16) for k in range(16)]
STAY = (0, 3, 7, 21)
SCENE = make_scene((6, 8))
STRIPS = make_scene((4, 3), (4, 3), strip=4, views=2)


def coordinates_by_numpy(ids_AN, share):
    """The rule of arXiv:2602.03060, by numpy alone."""
    angles = np.asarray(ids_AN, np.float64)[..., None] * FREQUENCIES
    count = round(share * angles.shape[1])
    found = set()
    for wave in (np.cos, np.sin):
        # Exact sums: cells that mirror each other tie.
        means = np.array([math.fsum(wave(angles[:, k]).ravel()) for k in range(angles.shape[1])])
        found.update(np.argsort(-means, kind="stable")[:count].tolist())
    return sorted(found)


def tables(positions):
    angles = np.arange(positions)[:, None] * np.array(FREQUENCIES)
    return tuple(torch.tensor(wave(angles), dtype=torch.float32) for wave in (np.cos, np.sin))


@pytest.mark.parametrize("grid", [None, (12, 20)])
@pytest.mark.parametrize(("start", "share"), [(35, 0.05), (4, 0.1)])
def test_both_forms_find_the_papers_positions(grid, start, share):
    tokens = list(range(240)) if grid else [k for k in range(250) if k % 25 != 24]
    ids = find_ids(tokens, start, grid)
    if grid:
        assert [row[21] for row in ids] == [start, start + 1, start + 1]
    wanted = coordinates_by_numpy(ids, share)
    assert len(wanted) > round(share * 240)
    assert list(find_coordinates(tables(300), ids, share)) == wanted
    assert eager.find_coordinates(FREQUENCIES, list(zip(*ids, strict=True)), share) == wanted


def others_of(scene):
    """The scene as a pruner sees it that does not see what stays."""
    others = [k for k in range(scene.geometry.tokens) if k not in STAY]
    strip = scene.geometry.strip
    return replace(
        scene,
        geometry=replace(scene.geometry, missing=STAY),
        order=tuple(scene.order[k * strip + j] for k in others for j in range(strip)),
        tokens=scene.tokens[others],
        text_patches=scene.text_patches[others],
    ), others


def truth_of(name, scene, kept):
    """What stays, and the pruner's own rule on the others."""
    rest, others = others_of(scene)
    if name == "spatial":
        count = kept - len(STAY)
        order = [(2 * j + 1) * len(others) // (2 * count) for j in range(count)]
        found = truth.Truth(order=order)
    else:
        found = expect(name, rest, kept - len(STAY))
    weights = None
    if found.weights is not None:
        weights = np.zeros(scene.geometry.tokens)
        weights[others] = found.weights
    rows = found.rows
    if rows is not None:
        rows = np.concatenate([scene.patches.double().numpy()[list(STAY)], rows])
    return replace(
        found,
        order=[*STAY, *(others[k] for k in found.order)],
        rows=rows,
        weights=weights,
        scores=None,
    )


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("scene", [SCENE, STRIPS])
def test_the_pruner_chooses_among_the_others(name, scene):
    module, features = load(name), scene.features()
    choice = choose(module, features, 17, CONFIG, STAY)
    expected = truth_of(name, scene, 17)
    made = realize(choice, scene.patches)
    assert made[0][: len(STAY)] == list(STAY)
    assert len(set(made[0])) == 17
    compare(made, expected, scene.patches)
    found = eager.choose_eagerly(module, scene.vision(), 17, CONFIG, STAY)
    rows = scene.patches[list(found.order)] if found.rows is None else found.rows
    compare((list(found.order), rows, found.extra, found.extra_weights), expected, scene.patches)
    if found.scores is not None:
        assert [k for k, score in enumerate(found.scores) if score == np.inf] == list(STAY)


class Stage(torch.nn.Module):
    """The choice alone, as the graph's stage makes it."""

    def __init__(self, name):
        super().__init__()
        self.module = load(name)
        self.given = sorted(self.module.NEEDS, key=lambda feature: feature.value)

    def forward(self, patches_BNC, values):
        features = replace(
            SCENE.features(),
            patches_BNC=patches_BNC,
            values=dict(zip(self.given, values, strict=True)),
        )
        choice = choose(self.module, features, 17, CONFIG, STAY)
        order = choice.order
        order_BK = torch.tensor([order]) if isinstance(order, tuple) else order
        return (
            order_BK,
            *(each for each in (choice.mix_BKN, choice.extra_BN) if each is not None),
        )


@pytest.mark.parametrize("name", ["prumerge", "spatial"])
def test_the_graph_makes_the_same_choice(name, tmp_path):
    """Rows that are mixed, an extra token, and an order that is a constant."""
    stage, features = Stage(name), SCENE.features()
    given = {"patches": SCENE.patches.numpy()[None]} | {
        feature.value: features.values[feature].numpy() for feature in stage.given
    }
    inputs = [
        TensorSpec(name=key, dtype="float32", shape=value.shape, meaning="")
        for key, value in given.items()
    ]
    expected = truth_of(name, SCENE, 17)
    shapes = {"order": (1, 17)}
    if expected.rows is not None:
        shapes["mix"] = (1, 17, 48)
    if expected.extra is not None:
        shapes["extra"] = (1, 48)
    outputs = [
        TensorSpec(
            name=key, dtype="int64" if key == "order" else "float32", shape=shape, meaning=""
        )
        for key, shape in shapes.items()
    ]
    traced = trace(
        lambda: stage,
        dtype="float32",
        dialect=native,
        opset=24,
        inputs=inputs,
        outputs=outputs,
        nested=len(inputs) - 1,
    )
    path = tmp_path / "stage.onnx"
    ir.save(traced.model, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    made = dict(zip(shapes, session.run(list(shapes), given), strict=True))
    order, patches = made["order"][0].tolist(), SCENE.patches.numpy()
    assert order == expected.order
    if "mix" in made:
        np.testing.assert_allclose(made["mix"][0] @ patches, expected.rows, atol=1e-4)
    if "extra" in made:
        np.testing.assert_allclose(made["extra"][0], expected.weights, atol=1e-5)


def test_names_take_the_modifier():
    assert resolve_pruner("FasterVLM+ivc") == "cls_attention+ivc"
    assert load_pruner("spatial+ivc") is load("spatial")
    config = load_config("refshapes", {"prune.strategy": "DivPrune+ivc"}).config.prune
    assert (config.strategy, config.keeps_coordinates) == ("divprune+ivc", True)
    assert not PruneConfig(strategy="divprune").keeps_coordinates
    with pytest.raises(UnknownNameError, match=r"'divprun'.*divprune"):
        load_config("refshapes", {"prune.strategy": "divprun+ivc"})
    with pytest.raises(ConfigError, match=r"prune.ivc is 0.5, expected a share"):
        load_config("refshapes", {"prune.ivc": 0.5})


def test_a_count_that_leaves_nothing_to_choose_is_refused():
    request = make_request("refshapes", keep=5, pruner="spatial+ivc", reference=False)
    with pytest.raises(
        ConfigError, match=r"keep 5 of 64 with \+ivc: \d visual tokens stay anyway"
    ):
        plan_export(request)
