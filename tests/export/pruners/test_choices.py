"""Every pruner against tests/truths/pruners.py: in torch, in ONNX Runtime and eagerly."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from makers.scenes import CONFIG, HEADS, SCENES, WIDTH, make_scene
from torch import nn
from truths.choices import PRUNERS, close, compare, expect, load, realize
from truths.formulas import FORMULAS, GREEDY, find_formula

from gap_export.dialects import native
from gap_export.interfaces.features import VisionFeatures
from gap_export.tracing.proof import prove_graph
from gap_export.tracing.trace import trace
from gap_runtime.bundle.tensors import TensorSpec


def list_counts(tokens):
    """How many are kept of a picture: the ends, few, and what lies between."""
    counts = (1, 2, 7, tokens // 3, tokens // 2 + 1, tokens - 1, tokens)
    return sorted({max(1, min(kept, tokens)) for kept in counts})


def list_cases():
    """Every pruner with every scene: two counts of each by turns, all in `make matrix`."""
    for i, pruner in enumerate(PRUNERS):
        for j, (name, scene) in enumerate(SCENES.items()):
            tokens = scene.geometry.tokens
            counts = list_counts(tokens)
            usual = {counts[(i + j) % len(counts)], counts[(i + j + 3) % len(counts)]}
            for kept in counts:
                yield pytest.param(
                    pruner,
                    scene,
                    kept,
                    id=f"{name}, {kept} of {tokens}-{pruner}",
                    marks=() if kept in usual else pytest.mark.matrix,
                )


every_pruner = pytest.mark.parametrize("name", PRUNERS)
every_case = pytest.mark.parametrize(("name", "scene", "kept"), list(list_cases()))


def test_every_formula_has_a_pruner():
    """The other way round, each test of a pruner says which formula it misses."""
    assert set(FORMULAS) | GREEDY <= set(PRUNERS)


@every_case
def test_the_choice_is_the_formulas(name, scene, kept):
    module, features = load(name), scene.features()
    features = replace(features, values={f: features.values[f] for f in module.NEEDS})
    choice = module.prune(features, kept, CONFIG)
    expected = expect(name, scene, kept)
    compare(realize(choice, scene.patches), expected, scene.patches)
    assert (choice.extra_BN is not None) == bool(module.EXTRA)
    for weights in (choice.mix_BKN, choice.extra_BN):
        assert weights is None or (weights.dtype == torch.float32 and weights.isfinite().all())
    if isinstance(choice.order, tuple):
        assert all(type(index) is int for index in choice.order)
    else:
        assert choice.order.dtype == torch.int64


@every_case
def test_the_eager_choice_is_the_formulas(name, scene, kept):
    module = load(name)
    choice = module.prune_eagerly(scene.vision(), kept, CONFIG)
    expected = expect(name, scene, kept)
    rows = scene.patches[list(choice.order)] if choice.rows is None else choice.rows
    made = (list(choice.order), rows, choice.extra, choice.extra_weights)
    compare(made, expected, scene.patches)
    assert all(type(index) is int for index in choice.order)
    assert (choice.scores is None) == (name in GREEDY), (
        "give the scores by which a near tie is told from an error, or name the pruner in GREEDY "
        "of tests/truths/formulas.py where it has none"
    )
    if kept == scene.geometry.tokens:
        assert choice.rows is choice.extra is choice.extra_weights is None
    else:
        assert (choice.extra is not None) == bool(module.EXTRA)
    if choice.scores is not None and name != "prumerge_plus":
        # Scores of any size, in float32.
        size = max(1.0, np.abs(expected.scores).max())
        close(choice.scores, expected.scores, at_most=1e-5 * size)


@every_pruner
@pytest.mark.parametrize("kind", ["odd", "strips", "views"])
def test_eager_rows_have_the_models_dtype(name, kind):
    scene = SCENES[kind]
    made = {
        field: tuple(each.half() for each in getattr(scene, field))
        for field in ("states", "queries", "keys", "attentions")
    }
    halves = replace(scene, **made, tokens=scene.tokens.half(), text=scene.text.half())
    halves = replace(halves, text_patches=scene.text_patches.half())
    choice = load(name).prune_eagerly(halves.vision(), 9, CONFIG)
    assert len(set(choice.order)) == 9
    for rows in (choice.rows, choice.extra):
        assert rows is None or rows.dtype == torch.float16


class Stage(nn.Module):
    """A pruner alone, as the graph's stage calls it."""

    def __init__(self, pruner, scene, kept):
        super().__init__()
        self.pruner, self.kept = pruner, kept
        self.geometry, self.text_sign = scene.geometry, scene.text_sign
        self.given = sorted(pruner.NEEDS, key=lambda feature: feature.value)

    def forward(self, patches_BNC, values):
        features = VisionFeatures(
            patches_BNC=patches_BNC,
            geometry=self.geometry,
            values=dict(zip(self.given, values, strict=True)),
            text_sign=self.text_sign,
        )
        choice = self.pruner.prune(features, self.kept, CONFIG)
        order = choice.order
        order_BK = torch.tensor([order]) if isinstance(order, tuple) else order
        extra_BN = None if choice.extra_BN is None else choice.extra_BN / choice.extra_divisor
        given = (order_BK, choice.mix_BKN, extra_BN)
        return tuple(value for value in given if value is not None)


def export_stage(name, scene, kept, folder):
    """The graph's file, and what the pruner alone gives in ONNX Runtime, by name."""
    module, features = load(name), scene.features()
    choice = module.prune(features, kept, CONFIG)
    stage = Stage(module, scene, kept)
    patches = scene.patches.numpy()[None]
    given = {"patches": patches} | {
        feature.value: features.values[feature].numpy() for feature in stage.given
    }
    tokens = scene.geometry.tokens
    inputs = [
        TensorSpec(name=key, dtype="float32", shape=value.shape, meaning="")
        for key, value in given.items()
    ]
    outputs = [TensorSpec(name="order", dtype="int64", shape=(1, kept), meaning="")]
    for key, weights, shape in (
        ("mix", choice.mix_BKN, (1, kept, tokens)),
        ("extra", choice.extra_BN, (1, tokens)),
    ):
        if weights is not None:
            outputs.append(TensorSpec(name=key, dtype="float32", shape=shape, meaning=""))
    traced = trace(
        lambda: stage,
        dtype="float32",
        dialect=native,
        opset=24,
        inputs=inputs,
        outputs=outputs,
        nested=len(inputs) - 1,
    )
    path = folder / f"{name}.onnx"
    ir.save(traced.model, path)
    prove_graph(path, inputs=inputs, outputs=outputs, opset=24, operators=native.OPERATORS)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [spec.name for spec in outputs]
    return traced, dict(zip(names, session.run(names, given), strict=True))


_SOME, _ALL, _ONE = (make_scene((8, 9)), 13), (make_scene((3, 4)), 12), (make_scene((1, 1)), 1)
_VIEWS = (make_scene((6, 6), (6, 5), strip=4, views=2, sign=1), 20)
EXPORTED = [
    pytest.param(name, *case)
    for j, name in enumerate(PRUNERS)
    for case in (_SOME, (_VIEWS, _ALL, _ONE)[j % 3])
]
"""Several views, and where nothing is removed, by turns."""


@pytest.mark.parametrize(("name", "scene", "kept"), EXPORTED)
def test_the_exported_choice_is_the_formulas(name, scene, kept, tmp_path):
    _, made = export_stage(name, scene, kept, tmp_path)
    expected = expect(name, scene, kept)
    patches = scene.patches.numpy()
    order = made["order"][0].tolist()
    rows = made["mix"][0] @ patches if "mix" in made else patches[order]
    weights = made["extra"][0] if "extra" in made else None
    extra = None if weights is None else weights @ patches
    compare((order, rows, extra, weights), expected, patches)


@pytest.mark.parametrize(("name", "nodes"), [("divprune", 3), ("cdpruner", 15)])
def test_greedy_steps_are_few_nodes(name, nodes, tmp_path):
    scene = make_scene((6, 6))
    counts = []
    for kept in (4, 9):
        traced, _ = export_stage(name, scene, kept, tmp_path)
        counts.append(len(list(traced.model.graph)))
    assert counts[1] - counts[0] == 5 * nodes


@pytest.mark.parametrize("name", ["cdpruner", "divprune"])
@pytest.mark.parametrize(("width", "repeats"), [(4, 1), (60, 2), (3, 10)])
def test_greedy_choices_stay_distinct_where_nothing_differs_any_more(
    name, width, repeats, tmp_path
):
    scene = make_scene((4, 5), width=width)
    different = 20 // repeats
    tokens = scene.tokens[:different].repeat(repeats, 1)
    scene = replace(scene, tokens=tokens)
    for kept in (7, 19, 20):
        eager = load(name).prune_eagerly(scene.vision(), kept, CONFIG).order
        made = load(name).prune(scene.features(), kept, CONFIG).order[0].tolist()
        require_same_choices(eager, made, different)
    _, made = export_stage(name, scene, 20, tmp_path)
    require_same_choices(eager, made["order"][0].tolist(), different)


def require_same_choices(eager, made, different):
    """Which of two tokens that are alike is chosen, the last bit of a product may say."""
    assert len(set(made)) == len(set(eager)) == len(eager)
    first = min(len(eager), different)
    assert [i % different for i in made[:first]] == [i % different for i in eager[:first]]


def make_padded_scene(rounding):
    """A third of the tokens has one key, which CLS does not look at; `rounding` is put to it."""
    scene = make_scene((8, 8))
    block = scene.layer - 1
    queries, keys = scene.queries[block], scene.keys[block].clone()
    noise = torch.Generator().manual_seed(5)
    keys[:, 43:] = -2 * queries[:, :1] + rounding * torch.randn(1, 22, WIDTH, generator=noise)
    query, key = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (queries, keys))
    attention = torch.softmax(query @ key.mT / (WIDTH // HEADS) ** 0.5, dim=-1)
    return replace(
        scene,
        keys=(*scene.keys[:block], keys, *scene.keys[block + 1 :]),
        attentions=(*scene.attentions[:block], attention, *scene.attentions[block + 1 :]),
    )


def test_rounding_does_not_decide_which_of_the_same_tokens_takes_in(tmp_path):
    """The padding of a picture is alike everywhere."""
    kept, scene = 33, make_padded_scene(3e-6)
    # The formula gives a tie to the first, and without rounding there are ties.
    expected = find_formula("visionzip")(make_padded_scene(0.0), kept, CONFIG)
    assert sum(index >= 42 for index in expected.order[-5:]) == 3
    eager = load("visionzip").prune_eagerly(scene.vision(), kept, CONFIG)
    compare((list(eager.order), eager.rows, None, None), expected, scene.patches)
    _, made = export_stage("visionzip", scene, kept, tmp_path)
    order = made["order"][0].tolist()
    compare((order, made["mix"][0] @ scene.patches.numpy(), None, None), expected, scene.patches)


@pytest.mark.parametrize("name", ["dart", "divprune"])
@pytest.mark.parametrize("kept", [50, 64])
def test_rounding_does_not_choose_among_the_same_tokens(name, kept, tmp_path):
    """Of those the first is chosen, and the others by index where more are wanted."""
    noise = torch.Generator().manual_seed(6)
    tokens = make_scene((8, 8)).tokens.clone()
    tokens[43:] = tokens[43]
    exact = replace(make_scene((8, 8)), tokens=tokens)
    expected = find_formula(name)(exact, kept, CONFIG).order
    rounded = tokens + 1e-6 * torch.randn(tokens.shape, generator=noise)
    scene = replace(exact, tokens=rounded)
    assert list(load(name).prune_eagerly(scene.vision(), kept, CONFIG).order) == expected
    _, made = export_stage(name, scene, kept, tmp_path)
    assert made["order"][0].tolist() == expected


@pytest.mark.parametrize("name", ["dart", "divprune"])
def test_tokens_of_zeros_are_tokens(name, tmp_path):
    """Their cosine with themselves is 0, so they are not the same as anything."""
    tokens = make_scene((4, 5)).tokens.clone()
    tokens[3:9] = 0.0
    scene = replace(make_scene((4, 5)), tokens=tokens)
    expected = find_formula(name)(scene, 20, CONFIG).order
    assert list(load(name).prune_eagerly(scene.vision(), 20, CONFIG).order) == expected
    _, made = export_stage(name, scene, 20, tmp_path)
    assert made["order"][0].tolist() == expected


@pytest.mark.parametrize("kept", [30, 50])
def test_rounding_does_not_choose_among_the_same_patches(kept, tmp_path):
    """Patches of equal tiles have the same attention too."""
    made = []
    for rounding in (0.0, 1e-6):
        padded, noise = make_padded_scene(rounding), torch.Generator().manual_seed(7)
        states = padded.states[padded.layer].clone()
        states[:, 43:] = states[:, 43:44] + rounding * torch.randn(22, WIDTH, generator=noise)
        made.append(replace(padded, states=(*padded.states[:2], states, *padded.states[3:])))
    exact, scene = made
    expected = find_formula("vispruner")(exact, kept, CONFIG).order
    assert list(load("vispruner").prune_eagerly(scene.vision(), kept, CONFIG).order) == expected
    _, made = export_stage("vispruner", scene, kept, tmp_path)
    assert made["order"][0].tolist() == expected


@pytest.mark.parametrize("kept", [20, 30, 50])
@pytest.mark.parametrize("name", ["dart", "divprune", "vispruner"])
def test_rounding_does_not_choose_among_pairs_of_the_same_tokens(name, kept, tmp_path):
    """Two equal tiles: of each token there are two, and all pairs are as alike as can be."""
    orders = []
    for rounding in (0.0, 1e-6):
        scene, noise = make_scene((8, 8)), torch.Generator().manual_seed(7)
        tokens, states = scene.tokens.clone(), scene.states[scene.layer].clone()
        tokens[32:] = tokens[:32] + rounding * torch.randn(tokens[:32].shape, generator=noise)
        states[:, 33:] = states[:, 1:33] + rounding * torch.randn(
            states[:, 1:33].shape, generator=noise
        )
        scene = replace(
            scene, tokens=tokens, states=(*scene.states[:2], states, *scene.states[3:])
        )
        orders.append(list(load(name).prune_eagerly(scene.vision(), kept, CONFIG).order))
        _, made = export_stage(name, scene, kept, tmp_path)
        orders.append(made["order"][0].tolist())
    assert orders[1:] == orders[:-1]
