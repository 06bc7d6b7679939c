"""Passes over graphs have one form: they change the graph that they are given, and give it."""

import inspect
import pkgutil
from importlib import import_module

from makers.families import find_family

from gap_export import quantization, tracing, weights
from gap_export.pipeline import stages
from gap_export.quantization.graph import quantize_graph
from gap_export.tracing import graph as form
from gap_export.tracing.join import join
from gap_export.tracing.keep_batch import keep_batch
from gap_export.tracing.tidy import tidy
from gap_export.weights.bind import bind_weights


def find_passes():
    """Every public function that takes a graph, by name."""
    found = {}
    for package in (tracing, quantization, weights):
        for each in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            module = import_module(each.name)
            for name, function in inspect.getmembers(module, inspect.isfunction):
                own = function.__module__ == module.__name__ and not name.startswith("_")
                signature = inspect.signature(function)
                if own and "Traced" in [p.annotation for p in signature.parameters.values()]:
                    found[name] = signature
    return found


def test_a_pass_takes_a_graph_first_and_gives_one():
    passes = find_passes()
    assert len(passes) >= 6
    for name, signature in passes.items():
        assert next(iter(signature.parameters.values())).annotation == "Traced", name
        assert signature.return_annotation == "Traced", name


def test_the_list_of_passes_is_whole():
    rows = [line.split() for line in form.__doc__.splitlines() if line.startswith("    ")]
    listed = {row[0] for row in rows if "->" in row and row[0] != "def"}
    assert listed - {"trace"} == set(find_passes()) - {"tidy"}


def require_true(traced):
    """What is said of a graph is what the graph says."""
    graph = traced.model.graph
    for values, specs in ((graph.inputs, traced.inputs), (graph.outputs, traced.outputs)):
        assert [value.name for value in values] == [spec.name for spec in specs]
    unknown = {name for name, each in graph.initializers.items() if each.const_value is None}
    assert unknown <= traced.parameters


def test_every_pass_gives_the_graph_that_it_was_given(tmp_path, tmp_path_factory):
    family = find_family("llava-next-vicuna", tmp_path_factory, head_dim=16)
    plan = family.plan(tmp_path / "out", quantize__weights="int4")
    entry = plan.entries[0]
    tower = stages.trace_tower(plan, plan.bucket(entry))
    decoder = stages.trace_decoder(plan)
    nodes = len(decoder.model.graph)
    for first, change in (
        (tower, tidy),
        (tower, lambda traced: join(traced, stages.trace_pruning(plan, entry))),
        (decoder, lambda traced: quantize_graph(traced, plan.schemes)),
        (decoder, lambda traced: keep_batch(quantize_graph(traced, plan.schemes))),
        (
            decoder,
            lambda traced: bind_weights(
                quantize_graph(traced, plan.schemes), plan.weights, tmp_path
            ),
        ),
    ):
        require_true(first)
        given = first.copy()
        after = change(given)
        assert after.model is given.model
        require_true(after)
    # Of all that, nothing reached the graph that was copied.
    assert len(decoder.model.graph) == nodes
