"""Graphs whose alike layers are copied against the same graphs traced whole."""

import copy
from dataclasses import replace

import pytest
from makers.families import find_family
from makers.qwen import make_qwen3_checkpoint, make_qwen_checkpoint

from gap_export.pipeline import stages
from gap_export.pipeline.plan import plan_export
from gap_export.pipeline.request import make_request
from gap_export.tracing import repeat_layers

LAYERS = 5


@pytest.fixture
def traced_layers(monkeypatch):
    """Numbers of the layers that were copied, graph by graph."""
    copied = []
    find = repeat_layers.find_copies

    def note(*arguments):
        copied.append(find(*arguments))
        return copied[-1]

    monkeypatch.setattr(repeat_layers, "find_copies", note)
    return copied


def trace_whole(monkeypatch, trace):
    with monkeypatch.context() as patch:
        patch.setattr(repeat_layers, "find_copies", lambda *_: {})
        return trace()


@pytest.mark.parametrize(
    ("family", "target"),
    [
        ("llava", "cpu"),
        pytest.param("llava", "portable", marks=pytest.mark.matrix),
        pytest.param("llava-next-mistral", "cpu", marks=pytest.mark.matrix),
    ],
)
def test_copied_layers_are_what_tracing_gives(
    family, target, tmp_path, tmp_path_factory, monkeypatch, traced_layers
):
    plan = find_family(family, tmp_path_factory).plan(tmp_path / "out", target=target)
    plan = with_layers(plan, LAYERS)
    continued = stages.trace_decoder(plan)
    whole = trace_whole(monkeypatch, lambda: stages.trace_decoder(plan))

    assert sources(traced_layers) == [dict.fromkeys(range(2, LAYERS), 1)]
    assert describe(continued) == describe(whole)
    assert continued.parameters == whole.parameters
    assert (continued.inputs, continued.outputs) == (whole.inputs, whole.outputs)


@pytest.mark.parametrize(
    ("family", "target", "pruner", "copied"),
    [
        # The pruner looks into the last block, which is traced for itself then.
        ("llava", "cpu", "cls_attention", range(2, 5)),
        pytest.param("llava", "cpu", "random", range(2, 6), marks=pytest.mark.matrix),
        # Its pruner looks into the block behind the last one.
        pytest.param(
            "llava-next-mistral", "cpu", "prumerge", range(2, 6), marks=pytest.mark.matrix
        ),
        pytest.param("minigpt-v2", "portable", "vispruner", range(2, 5), marks=pytest.mark.matrix),
    ],
)
def test_copied_blocks_of_a_tower(
    family, target, pruner, copied, tmp_path, tmp_path_factory, monkeypatch, traced_layers
):
    plan = find_family(family, tmp_path_factory).plan(
        tmp_path / "out", target=target, pruner=pruner
    )
    plan = with_blocks(plan, 6)
    bucket = plan.spec.buckets[0]
    continued = stages.trace_tower(plan, bucket)
    whole = trace_whole(monkeypatch, lambda: stages.trace_tower(plan, bucket))

    assert sources(traced_layers) == [dict.fromkeys(copied, 1)]
    assert describe(continued) == describe(whole)
    assert continued.parameters == whole.parameters


@pytest.mark.parametrize(
    ("make", "size", "options", "copied"),
    [
        # Two kinds of blocks, of windows and of the whole picture.
        (
            make_qwen_checkpoint,
            "168x112",
            {"depth": 8, "full": (3, 7)},
            {2: 1, 4: 1, 5: 1, 6: 1, 7: 3},
        ),
        pytest.param(
            make_qwen3_checkpoint,
            "96x64",
            {"depth": 6, "stacked": (0, 3)},
            {2: 1, 3: 1, 4: 1, 5: 1},
            marks=pytest.mark.matrix,
        ),
    ],
)
def test_copied_blocks_of_a_qwen_tower(
    make, size, options, copied, tmp_path, monkeypatch, traced_layers
):
    plan = plan_export(
        make_request(
            str(make(tmp_path / "model", **options)),
            ratios=0.5,
            pruner="divprune",
            settings={"image.canvas": size, "prompt.template": "<image>{phrase}"},
            out=tmp_path / "out",
        )
    )
    bucket = plan.spec.buckets[0]
    runs, trace = [], repeat_layers.trace

    def count(*arguments, **options):
        runs.append(arguments)
        return trace(*arguments, **options)

    monkeypatch.setattr(repeat_layers, "trace", count)
    continued = stages.trace_tower(plan, bucket)
    assert len(runs) == 1, "the copies were given up"
    whole = trace_whole(monkeypatch, lambda: stages.trace_tower(plan, bucket))

    assert sources(traced_layers) == [copied]
    assert describe(continued) == describe(whole)
    assert continued.parameters == whole.parameters


def test_depth_is_not_traced(tmp_path, tmp_path_factory, traced_layers):
    plan = find_family("llava", tmp_path_factory).plan(tmp_path / "out")
    traced = stages.trace_decoder(with_layers(plan, 40))
    assert sources(traced_layers) == [dict.fromkeys(range(2, 40), 1)]
    assert len(traced.inputs) == 4 + 2 * 40


def sources(copied):
    return [{number: each.source.number for number, each in layers.items()} for layers in copied]


def with_layers(plan, count):
    decoder = replace(plan.spec.decoder, layers=count)
    return replace(plan, spec=replace(plan.spec, decoder=decoder))


def with_blocks(plan, count):
    """The plan of a model whose tower has so many blocks up to its patches."""
    config = copy.deepcopy(plan.spec.library_config)
    if hasattr(config, "tower"):
        config = replace(config, tower=replace(config.tower, layers=count))
    else:
        config.vision_config.num_hidden_layers = count + 1
        config.vision_feature_layer = -2
    return replace(plan, spec=replace(plan.spec, library_config=config))


def describe(traced):
    """Nodes in order, with the nodes that they read instead of names of values."""
    graph = traced.model.graph

    def origin(value):
        if value is None:
            return None
        if value.producer() is not None:
            return value.producer().name, value.index()
        if value.is_initializer() and value.const_value is not None:
            return value.const_value.numpy().tobytes()
        return value.name, value.dtype, value.shape

    nodes = [
        (
            node.name,
            node.op_type,
            node.version,
            {name: attribute.value for name, attribute in node.attributes.items()},
            [origin(value) for value in node.inputs],
            [(value.dtype, value.shape) for value in node.outputs],
        )
        for node in graph
    ]
    results = [(value.name, origin(value), value.dtype, value.shape) for value in graph.outputs]
    return [value.name for value in graph.inputs], nodes, results
