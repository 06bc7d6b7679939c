"""Graphs traced by a process and its copy against the same graphs traced by one."""

import os

import onnx_ir as ir
import pytest
from makers.families import GRAPHS, find_family

from gap_export.pipeline import graph_cache, run
from gap_export.pipeline.graph_cache import GraphCache
from gap_export.tracing import aside
from gap_export.tracing.aside import _pack, _unpack, shared_work
from gap_export.tracing.graph import Traced
from gap_runtime.bundle.tensors import TensorSpec


@pytest.fixture
def copies(monkeypatch):
    """Processes that were made."""
    made, fork = [], os.fork

    def note():
        made.append(fork())
        return made[-1]

    monkeypatch.setattr(os, "fork", note)
    return made


def a_graph(name):
    """A graph with a parameter behind a constant, whose parameter is named as is asked."""
    shape, dtype = ir.Shape([2]), ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", shape=shape, type=dtype)
    weight = ir.Value(name=name, shape=shape, type=dtype)
    constant = ir.Value(
        name="c", shape=shape, type=dtype, const_value=ir.tensor([1.0, 2.0], name="c")
    )
    nodes = [ir.Node("", "Add", [x, weight], name="first")]
    nodes.append(ir.Node("", "Mul", [nodes[0].outputs[0], constant], name="second"))
    for node, value in zip(nodes, ("y", "z"), strict=True):
        node.outputs[0].name = value
        node.outputs[0].shape, node.outputs[0].type = shape, dtype
    graph = ir.Graph(
        [x],
        [nodes[1].outputs[0]],
        nodes=nodes,
        initializers=[constant, weight],
        opset_imports={"": 20},
        name="g",
    )
    specs = [TensorSpec(name=each, dtype="float32", shape=(2,), meaning="") for each in "xz"]
    return Traced(
        model=ir.Model(graph, ir_version=10),
        inputs=(specs[0],),
        outputs=(specs[1],),
        parameters=frozenset({name}),
    )


def describe(traced):
    """All of a graph: what ONNX can hold, with parameters as inputs, and what is beside that."""
    graph = (copy := traced.copy()).model.graph
    order = list(graph.initializers)
    for value in [each for each in graph.initializers.values() if each.const_value is None]:
        del graph.initializers[value.name]
        graph.inputs.append(value)
    written = ir.to_proto(copy.model).SerializeToString(deterministic=True)
    return traced.inputs, traced.outputs, traced.parameters, order, written


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return find_family("llava", tmp_path_factory).plan(tmp_path_factory.mktemp("out") / "b")


def test_a_graph_survives_the_journey(plan):
    for make in (
        lambda: a_graph("weight"),
        lambda: GRAPHS.decoder(plan),
        lambda: GRAPHS.pruning(plan, plan.entries[0]),
        lambda: GRAPHS.tower(plan, plan.spec.buckets[0]),
    ):
        traced = make()
        before = describe(traced)
        found = _unpack(_pack(traced))
        assert describe(found) == before


def test_all_jobs_are_done_once_by_whoever_is_free(tmp_path):
    def job(k):
        def work():
            (tmp_path / f"{k}-{os.getpid()}").touch()
            return a_graph(f"weight{k}")

        return work

    with shared_work([job(k) for k in range(9)]) as finish:
        found = finish()
    assert [next(iter(each.parameters)) for each in found] == [f"weight{k}" for k in range(9)]
    assert sorted(int(path.name.split("-")[0]) for path in tmp_path.iterdir()) == [*range(9)]


def test_what_the_copy_cannot_do_the_process_does():
    me = os.getpid()

    def work():
        if os.getpid() != me:
            raise MemoryError
        return a_graph("weight")

    with shared_work([work] * 4) as finish:
        assert len(finish()) == 4


def test_an_error_of_the_process_is_its_own_and_no_copy_is_left(copies):
    def work():
        raise ValueError("a layer is odd")

    with pytest.raises(ValueError, match="odd"), shared_work([work]) as finish:
        finish()
    with pytest.raises(ChildProcessError):
        os.waitpid(copies[0], os.WNOHANG)


def test_a_copy_that_hangs_is_given_up(copies, monkeypatch):
    me = os.getpid()

    def work():
        while os.getpid() != me:
            pass
        return a_graph("weight")

    monkeypatch.setattr(aside, "PATIENCE_SECONDS", 0.2)
    with shared_work([work] * 3) as finish:
        assert len(finish()) == 3
    with pytest.raises(ChildProcessError):
        os.waitpid(copies[0], os.WNOHANG)


def test_a_graph_that_nobody_waits_for_is_given_up(copies):
    me = os.getpid()

    def work():
        while os.getpid() != me:
            pass
        return a_graph("weight")

    with pytest.raises(KeyError), shared_work([work]):
        raise KeyError("room")
    with pytest.raises(ChildProcessError):
        os.waitpid(copies[0], os.WNOHANG)


def test_the_bundle_is_the_same(plan, monkeypatch):
    made = []
    for known in (GRAPHS, GraphCache(keeps=False)):
        if made:
            with known.traced_by_two(plan) as finish:
                assert finish() == len(plan.spec.buckets) + 1 + len(plan.entries)
            monkeypatch.setattr(known, "_find", lambda key, _, k=known: k._known.pop(key))
        graphs = run._trace(plan, run.Display(quiet=True), known, None)
        made.append([describe(each) for each in graphs.all])
    assert made[0] == made[1]


def test_small_models_and_library_calls_stay_in_one_process(plan, monkeypatch):
    monkeypatch.setattr(graph_cache, "can_work_aside", lambda: True)
    assert not graph_cache.has_room_for_two(plan)
    monkeypatch.setattr(graph_cache, "_LARGE_BYTES", 0)
    assert graph_cache.has_room_for_two(plan)
    monkeypatch.setattr(graph_cache, "free_memory", lambda: 2**28)
    assert not graph_cache.has_room_for_two(plan)


@pytest.mark.parametrize(("cores", "threads"), [({0}, 1), ({0, 1}, 2)], ids=["core", "threads"])
def test_one_core_or_other_threads_forbid_it(monkeypatch, cores, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(aside.threading, "active_count", lambda: 1)
    assert aside.can_work_aside()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores)
    monkeypatch.setattr(aside.threading, "active_count", lambda: threads)
    assert not aside.can_work_aside()
