"""Every pruner against tests/truths/pruners.py: in torch, in ONNX Runtime and eagerly."""

import functools
import importlib
import itertools
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel
from truths import pruners as truth

import gap_export.pruners
from gap_export.blocks import scores
from gap_export.blocks.clip import ClipTower, resolve_layer
from gap_export.config import PruneConfig
from gap_export.dialects import native
from gap_export.errors import CheckpointError
from gap_export.interfaces.features import EagerVision, Feature, Geometry, VisionFeatures
from gap_export.tracing.proof import prove_graph
from gap_export.tracing.trace import trace
from gap_runtime.bundle.tensors import TensorSpec
from gap_runtime.grounding.check import is_near_tie
from gap_runtime.registry import list_plugins

PRUNERS = sorted(list_plugins("gap_export.pruners"))
HEADS, WIDTH = 3, 12


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture in a tower that was made up: what a library would give, and what follows.

    V views of T tokens each, CLS first; `order` arranges the patches of all views.
    """

    geometry: Geometry
    states: tuple[torch.Tensor, ...]
    queries: tuple[torch.Tensor, ...]
    keys: tuple[torch.Tensor, ...]
    attentions: tuple[torch.Tensor, ...]
    layer: int
    order: tuple[int, ...]
    tokens: torch.Tensor
    text: torch.Tensor
    text_patches: torch.Tensor
    text_sign: int

    @property
    def merge_block(self):
        return min(self.layer, len(self.keys) - 1)

    def arrange(self, values):
        return values.flatten(0, 1)[list(self.order)]

    @property
    def patches(self):
        return self.arrange(self.states[self.layer][:, 1:]).reshape(self.geometry.tokens, -1)

    def features(self):
        """As the graph's tower makes them."""
        block, merge = self.layer - 1, self.merge_block
        values = {
            Feature.CLS_ATTENTION: scores.cls_attention(
                self.queries[block][:, 0], self.keys[block], HEADS
            ),
            Feature.CLS_SIMILARITY: scores.cls_similarity(self.states[self.layer]),
            Feature.KEYS: scores.mean_keys(self.keys[block], HEADS),
            Feature.MERGE_ATTENTION: scores.merge_attention(
                self.queries[merge][:, 0], self.keys[merge]
            ),
            Feature.MERGE_KEYS: self.keys[merge][:, 1:],
        }
        values = {feature: self.arrange(value)[None] for feature, value in values.items()}
        values |= {
            Feature.TOKENS: self.tokens[None],
            Feature.TEXT: self.text[None],
            Feature.TEXT_PATCHES: self.text_patches[None],
        }
        assert set(values) == set(Feature)
        return VisionFeatures(
            patches_BNC=self.patches[None],
            geometry=self.geometry,
            values=values,
            text_sign=self.text_sign,
        )

    def vision(self):
        """As the library gives them."""
        return EagerVision(
            patches=self.patches,
            tokens=self.tokens,
            hidden_states=self.states,
            attentions=self.attentions,
            queries=self.queries,
            keys=self.keys,
            layer=self.layer,
            geometry=self.geometry,
            arrange=self.arrange,
            text=self.text,
            text_patches=self.text_patches,
            text_sign=self.text_sign,
        )

    # What the formulas take, in float64.

    def by_token(self, by_view):
        """Lists by view and patch, arranged and pooled."""
        rows = [row for view in by_view for row in np.asarray(view)]
        return truth.pool([rows[index] for index in self.order], self.geometry.strip)

    @functools.cached_property
    def attention(self):
        block = self.layer - 1
        return self.by_token(
            [
                truth.cls_attention_from_qk(q.numpy(), k.numpy(), HEADS, 0).scores
                for q, k in zip(self.queries[block], self.keys[block], strict=True)
            ]
        )

    @functools.cached_property
    def similarity(self):
        return self.by_token(
            [
                truth.cls_similarity(view[0].numpy(), view[1:].numpy(), 0).scores
                for view in self.states[self.layer]
            ]
        )

    @functools.cached_property
    def one_head_attention(self):
        block = self.merge_block
        return self.by_token(
            [
                truth._one_head_attention(q[0].numpy(), k.numpy())
                for q, k in zip(self.queries[block], self.keys[block], strict=True)
            ]
        )

    @functools.cached_property
    def merge_keys(self):
        """With a row for CLS, which the formulas drop."""
        keys = self.by_token([view[1:].double().numpy() for view in self.keys[self.merge_block]])
        return np.concatenate([np.ones((1, WIDTH)), keys])

    @functools.cached_property
    def mean_keys(self):
        views = self.keys[self.layer - 1][:, 1:].double().numpy()
        parts = [views[..., head * WIDTH // HEADS :][..., : WIDTH // HEADS] for head in range(3)]
        return self.by_token(sum(parts) / HEADS)


@functools.cache
def make_scene(
    *grids, strip=1, views=1, layer=2, blocks=3, sign=-1, spread=1.0, width=None, seed=0
):
    """A scene of these grids; `spread` stretches queries, `width` is that of the tokens."""
    geometry = Geometry(grids=grids, strip=strip)
    noise = torch.Generator().manual_seed(1000 * geometry.tokens + 10 * strip + seed)

    def draw(*shape):
        return torch.randn(*shape, generator=noise)

    patches, rest = divmod(geometry.tokens * strip, views)
    assert not rest
    states = tuple(draw(views, patches + 1, WIDTH) for _ in range(blocks + 1))
    queries = tuple(spread * states[k] @ draw(WIDTH, WIDTH) / 4 for k in range(blocks))
    keys = tuple(states[k] @ draw(WIDTH, WIDTH) / 4 + draw(WIDTH) for k in range(blocks))

    def attend(query, key):
        q, k = (each.reshape(views, -1, HEADS, WIDTH // HEADS).mT for each in (query, key))
        q, k = q.permute(0, 3, 1, 2), k.permute(0, 3, 2, 1)
        return torch.softmax(q @ k / (WIDTH // HEADS) ** 0.5, dim=-1)

    order = torch.randperm(views * patches, generator=noise).tolist()
    return Scene(
        geometry=geometry,
        states=states,
        queries=queries,
        keys=keys,
        attentions=tuple(attend(q, k) for q, k in zip(queries, keys, strict=True)),
        layer=layer,
        order=tuple(range(patches)) if views == 1 else tuple(order),
        tokens=draw(geometry.tokens, width or 2 * geometry.tokens + 8),
        text=draw(7),
        text_patches=draw(geometry.tokens, 7),
        text_sign=sign,
    )


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
    "divprune": lambda s, kept, _: truth.divprune(s.tokens, kept),
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
GREEDY = {"cdpruner", "divprune", "random", "spatial", "visionzip", "vispruner"}
"""Those without scores by which a near tie could be judged."""


def grid_scores(scene, kept):
    values = scene.one_head_attention.copy()
    values[truth.prumerge_plus_grid(len(values), kept)] += 2.0
    return values


def merge_truth(scene, kept, values):
    order = truth.top(values, kept)
    return truth._merge(order, scene.one_head_attention, values, scene.merge_keys, scene.patches)


@functools.cache
def expect(name, scene, kept):
    return TRUTHS[name](scene, kept, CONFIG)


CONFIG = PruneConfig(seed=3)
SCENES = {
    "one": make_scene((1, 1)),
    "two": make_scene((1, 2)),
    "odd": make_scene((5, 7)),
    "as many neighbours as tokens": make_scene((3, 11)),
    "square": make_scene((8, 8), sign=1),
    "strips": make_scene((6, 4), strip=4),
    "odd strips": make_scene((7, 5), strip=4, layer=3),
    "last block": make_scene((6, 8), layer=3, spread=3.0),
    "views": make_scene((4, 6), (6, 4), (2, 5), views=2),
    "views of strips": make_scene((4, 3), (6, 4), strip=4, views=3),
}
CASES = [
    pytest.param(scene, kept, id=f"{name}, {kept} of {scene.geometry.tokens}")
    for name, scene in SCENES.items()
    for kept in sorted(
        {
            max(1, min(kept, scene.geometry.tokens))
            for tokens in [scene.geometry.tokens]
            for kept in (1, 2, 7, tokens // 3, tokens // 2 + 1, tokens - 1, tokens)
        }
    )
]
every_pruner = pytest.mark.parametrize("name", PRUNERS)
every_case = pytest.mark.parametrize(("scene", "kept"), CASES)


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


def test_every_pruner_has_a_formula():
    assert set(PRUNERS) == set(TRUTHS)


@every_pruner
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


@every_pruner
@every_case
def test_the_eager_choice_is_the_formulas(name, scene, kept):
    module = load(name)
    choice = module.prune_eagerly(scene.vision(), kept, CONFIG)
    expected = expect(name, scene, kept)
    rows = scene.patches[list(choice.order)] if choice.rows is None else choice.rows
    made = (list(choice.order), rows, choice.extra, choice.extra_weights)
    compare(made, expected, scene.patches)
    assert all(type(index) is int for index in choice.order)
    assert (choice.scores is None) == (name in GREEDY)
    if kept == scene.geometry.tokens:
        assert choice.rows is choice.extra is choice.extra_weights is None
    else:
        assert (choice.extra is not None) == bool(module.EXTRA)
    if choice.scores is not None and name != "prumerge_plus":
        close(choice.scores, expected.scores)


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


EXPORTED = [
    (make_scene((8, 9)), 13),
    (make_scene((6, 6), (6, 5), strip=4, views=2, sign=1), 20),
    (make_scene((3, 4)), 12),
    (make_scene((1, 1)), 1),
]


@every_pruner
@pytest.mark.parametrize(("scene", "kept"), EXPORTED)
def test_the_exported_choice_is_the_formulas(name, scene, kept, tmp_path):
    _, made = export_stage(name, scene, kept, tmp_path)
    expected = expect(name, scene, kept)
    patches = scene.patches.numpy()
    order = made["order"][0].tolist()
    rows = made["mix"][0] @ patches if "mix" in made else patches[order]
    weights = made["extra"][0] if "extra" in made else None
    extra = None if weights is None else weights @ patches
    compare((order, rows, extra, weights), expected, patches)


@pytest.mark.parametrize(("name", "nodes"), [("divprune", 3), ("cdpruner", 18)])
def test_greedy_steps_are_few_nodes(name, nodes, tmp_path):
    scene = make_scene((6, 6))
    counts = []
    for kept in (4, 9):
        traced, _ = export_stage(name, scene, kept, tmp_path)
        counts.append(len(list(traced.model.graph)))
    assert counts[1] - counts[0] == 5 * nodes


# What random scenes do not show.


@pytest.mark.parametrize("name", ["cdpruner", "divprune"])
@pytest.mark.parametrize(("width", "repeats"), [(4, 1), (60, 2), (3, 10)])
def test_greedy_choices_stay_distinct_where_nothing_differs_any_more(
    name, width, repeats, tmp_path
):
    scene = make_scene((4, 5), width=width)
    tokens = scene.tokens[: 20 // repeats].repeat(repeats, 1)
    scene = replace(scene, tokens=tokens)
    for kept in (7, 19, 20):
        eager = load(name).prune_eagerly(scene.vision(), kept, CONFIG).order
        assert len(set(eager)) == kept
        made = load(name).prune(scene.features(), kept, CONFIG).order[0].tolist()
        assert made == list(eager)
    _, made = export_stage(name, scene, 20, tmp_path)
    assert made["order"][0].tolist() == list(eager)


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
    a, vision = scene.one_head_attention, scene.vision()
    assert load("prumerge").count_adaptively(vision) == truth.adaptive_count_iqr(a)
    assert load("prumerge_plus").count_adaptively(vision) == (
        truth.prumerge_plus_adaptive_count(a)
    )
    sharp = replace(scene, text=spread * scene.text)
    dots = truth.text_similarity(sharp.text, sharp.text_patches, 1).scores
    count = load("trim").count_adaptively(sharp.vision())
    assert count == truth.adaptive_count_iqr(truth.softmax(dots))
    assert count > 0
    assert spread == 1.0 or load("prumerge").count_adaptively(vision) > 0


def test_adaptive_counts_of_even_attention_are_zero():
    scene = make_scene((4, 4))
    even = replace(scene, queries=tuple(torch.zeros_like(q) for q in scene.queries))
    assert load("prumerge").count_adaptively(even.vision()) == 0
    assert load("prumerge_plus").count_adaptively(even.vision()) == 0


def test_only_the_published_adaptive_methods_count_adaptively():
    counting = {name for name in PRUNERS if hasattr(load(name), "count_adaptively")}
    assert counting == {"prumerge", "prumerge_plus", "trim"}
    assert {name for name in PRUNERS if load(name).EXTRA} == counting


# By hand.


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
    tower = ClipTower(config, layer, frozenset({Feature.CLS_ATTENTION}), depth=layer).eval()
    missing, unexpected = tower.vision_tower.load_state_dict(library.state_dict(), strict=False)
    with torch.no_grad():
        patches, values = tower(pixels)
        whole = library(pixels, output_hidden_states=True, output_attentions=True)
    expected = torch.stack([whole.attentions[2][0, head, 0, 1:] for head in range(3)]).mean(0)
    assert layer == 3
    assert not missing
    assert all(".3." in name or "post_layernorm" in name for name in unexpected)
    assert torch.allclose(patches, whole.hidden_states[-2][:, 1:], atol=1e-5)
    assert torch.allclose(values[Feature.CLS_ATTENTION][0], expected, atol=1e-6)
    assert expected.std() > 1e-3


@pytest.mark.parametrize(("layer", "index"), [(-2, 4), (-1, 5), (5, 5), (1, 1), (-5, 1)])
def test_feature_layers_count_hidden_states(layer, index):
    assert resolve_layer(CLIPVisionConfig(num_hidden_layers=5), layer, "x") == index


@pytest.mark.parametrize("layer", [0, 6, -6, -7])
def test_feature_layers_without_a_block_are_refused(layer):
    with pytest.raises(CheckpointError, match="vision_feature_layer"):
        resolve_layer(CLIPVisionConfig(num_hidden_layers=5), layer, "x")


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
