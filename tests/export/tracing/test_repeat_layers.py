"""Graphs continued from few layers against the same graphs traced whole."""

from dataclasses import replace

import pytest
from makers.families import find_family

from gap_export.pipeline import stages

LAYERS = 4


@pytest.mark.parametrize(
    ("family", "target"),
    [
        ("llava", "cpu"),
        pytest.param("llava", "portable", marks=pytest.mark.matrix),
        ("llava-next-mistral", "cpu"),
    ],
)
def test_copied_layers_are_what_tracing_gives(
    family, target, tmp_path, tmp_path_factory, monkeypatch
):
    plan = find_family(family, tmp_path_factory).plan(tmp_path / "out", target=target)
    plan = with_layers(plan, LAYERS)
    continued = stages.trace_decoder(plan)
    monkeypatch.setattr(stages, "_TRACED_LAYERS", LAYERS)
    whole = stages.trace_decoder(plan)

    assert describe(continued) == describe(whole)
    assert continued.parameters == whole.parameters
    assert (continued.inputs, continued.outputs) == (whole.inputs, whole.outputs)


@pytest.mark.parametrize(
    ("family", "target", "pruner"),
    [
        ("llava", "cpu", "cls_attention"),
        # Its pruner looks into the block behind the last one.
        ("llava-next-mistral", "cpu", "prumerge"),
        ("minigpt-v2", "portable", "vispruner"),
    ],
)
def test_copied_blocks_of_a_tower(family, target, pruner, tmp_path, tmp_path_factory, monkeypatch):
    plan = find_family(family, tmp_path_factory).plan(
        tmp_path / "out", target=target, pruner=pruner
    )
    plan = replace(plan, spec=replace(plan.spec, tower_layers=("block",) * 6))
    bucket = plan.spec.buckets[0]
    continued = stages.trace_tower(plan, bucket)
    monkeypatch.setattr(stages, "_TRACED_TOWER_LAYERS", 6)
    whole = stages.trace_tower(plan, bucket)

    assert describe(continued) == describe(whole)
    assert continued.parameters == whole.parameters


def test_depth_is_not_traced(tmp_path, tmp_path_factory, monkeypatch):
    trace, depths = stages.trace, []

    def count_layers(build, **rest):
        depths.append(len(build().decoder.language_model.layers))
        return trace(build, **rest)

    monkeypatch.setattr(stages, "trace", count_layers)
    plan = find_family("llava", tmp_path_factory).plan(tmp_path / "out")
    traced = stages.trace_decoder(with_layers(plan, 40))
    assert depths == [2]
    assert len(traced.inputs) == 4 + 2 * 40


def with_layers(plan, count):
    decoder = replace(plan.spec.decoder, layers=("layer",) * count)
    return replace(plan, spec=replace(plan.spec, decoder=decoder))


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
