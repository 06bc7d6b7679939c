"""What is traced once for several exports, and that its keys hold all that tracing reads."""

from dataclasses import replace

import pytest
from makers.families import EVERY_FAMILY, FAMILIES, find_family

from gap_export.pipeline import graph_cache, stages
from gap_export.pipeline.graph_cache import GraphCache


class Spy:
    """A plan that remembers what was asked of it."""

    def __init__(self, plan):
        self.plan, self.asked = plan, set()

    def __getattr__(self, name):
        self.asked.add(name)
        return getattr(self.plan, name)


class Untouchable:
    """Stands for a fact that nothing may look at."""

    def _refuse(self, *_):
        raise AssertionError("a graph is made from a fact that its key leaves out")

    __getattr__ = __iter__ = __len__ = __eq__ = __hash__ = __bool__ = __fspath__ = _refuse


class DoneError(Exception):
    """Tracing would begin."""


@pytest.fixture
def only_built(monkeypatch):
    """The modules are built and finished, and not traced."""

    def build_only(build, *_, finish=None, **__):
        module = build()
        if finish is not None:
            finish(module)
        raise DoneError

    monkeypatch.setattr(stages, "trace", build_only)
    monkeypatch.setattr(stages, "trace_stack", build_only)


def arguments_of(plan):
    """The four kinds of graphs, each with what is asked for besides the plan."""
    return {
        "tower": (plan.spec.buckets[0],),
        "pruning": (plan.entries[0],),
        "text": (),
        "decoder": (),
    }


@pytest.fixture
def plan(tmp_path, tmp_path_factory):
    """Of a family with tokens that are never removed and a pruner that reads the phrase."""
    family = find_family("llava-next-vicuna", tmp_path_factory)
    return family.plan(tmp_path / "out", pruner="cdpruner")


@pytest.mark.usefixtures("only_built")
@pytest.mark.parametrize("kind", ["tower", "pruning", "text", "decoder"])
def test_keys_hold_what_tracing_reads(kind, plan):
    more = arguments_of(plan)[kind]
    traced, keyed = Spy(plan), Spy(plan)
    with pytest.raises(DoneError):
        getattr(stages, f"trace_{kind}")(traced, *more)
    getattr(stages, f"{kind}_key")(keyed, *more)
    assert {"spec", "dialect"} <= traced.asked
    assert traced.asked <= keyed.asked


@pytest.mark.usefixtures("only_built")
@pytest.mark.parametrize("kind", ["tower", "pruning", "text", "decoder"])
def test_what_keys_leave_out_is_not_read(kind, plan):
    """No graph is made from where files lie, or from how a prompt is worded."""
    left_out = dict.fromkeys(stages._NOT_IN_GRAPHS - {"buckets"}, Untouchable())
    text = replace(plan.spec.text, tokenizer=Untouchable())
    other = replace(plan, spec=replace(plan.spec, text=text, **left_out))
    more = arguments_of(plan)[kind]
    with pytest.raises(DoneError):
        getattr(stages, f"trace_{kind}")(other, *more)
    key = getattr(stages, f"{kind}_key")
    assert key(other, *more) == key(plan, *more)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_two_plans_of_one_export_have_the_same_keys(family, tmp_path, tmp_path_factory):
    """No key holds where an object lies in memory, or where a folder lies."""
    case = find_family(family, tmp_path_factory)
    first, second = (
        each.plan(tmp_path / "out", reference=reference)
        for each, reference in ((case, False), (case.copy(tmp_path / "elsewhere"), True))
    )
    assert stages.decoder_key(first) == stages.decoder_key(second)
    assert [stages.tower_key(first, each) for each in first.spec.buckets] == [
        stages.tower_key(second, each) for each in second.spec.buckets
    ]


@pytest.mark.parametrize(
    ("changes", "traced"),
    [
        ({}, []),
        ({"prune__ratios": [0.5, 0.75]}, ["pruning"]),
        ({"prune__positions": "compact"}, ["pruning"]),
        ({"prune__seed": 7}, ["pruning"]),
        ({"pruner": "random"}, ["tower", "pruning"]),
        ({"pruner": "cls_attention"}, ["pruning"]),
        ({"prompt__answer": 9}, ["decoder", "pruning"]),
        ({"dtype": "float16"}, ["tower", "decoder", "pruning"]),
        ({"target": "portable"}, ["tower", "decoder", "pruning"]),
    ],
)
def test_what_is_traced_anew(changes, traced, tmp_path, tmp_path_factory, monkeypatch):
    made = []

    class Model:
        def clone(self):
            return self

    for kind in ("tower", "pruning", "text", "decoder"):

        def trace(*_, kind=kind):
            made.append(kind)
            return stages.Traced(model=Model(), inputs=(), outputs=(), parameters=frozenset())

        monkeypatch.setattr(graph_cache, f"trace_{kind}", trace)
    family = find_family("llava", tmp_path_factory)
    known = GraphCache()

    def ask(case, **overrides):
        plan = case.plan(tmp_path / "out", **{"pruner": "vispruner"} | overrides)
        for bucket in plan.spec.buckets:
            known.tower(plan, bucket)
        known.decoder(plan)
        for entry in plan.entries:
            known.pruning(plan, entry)

    ask(family)
    assert made == ["tower", "decoder", "pruning"]
    made.clear()
    # The same files elsewhere are the same graphs.
    ask(family.copy(tmp_path / "copy"), **changes)
    assert made == traced


def test_another_machine_with_the_same_operators_traces_nothing(tmp_path, tmp_path_factory):
    family = find_family("llava", tmp_path_factory)
    plans = [
        family.plan(tmp_path / "out", target=target) for target in ("standard", "jetson-thor")
    ]
    assert plans[0].target != plans[1].target
    assert plans[0].target.dialect == plans[1].target.dialect
    keys = [stages.decoder_key(plan) for plan in plans]
    assert keys[0] == keys[1]
    assert keys[0] != stages.decoder_key(family.plan(tmp_path / "out", target="portable"))


def test_other_models_have_other_keys(tmp_path, tmp_path_factory):
    """Of every family; two of them are the same kind of model in other sizes."""
    plans = [find_family(name, tmp_path_factory).plan(tmp_path / "out") for name in FAMILIES]
    assert len({stages.decoder_key(plan) for plan in plans}) == len(FAMILIES)
    assert len({stages.tower_key(plan, plan.spec.buckets[0]) for plan in plans}) == len(FAMILIES)


def test_what_is_given_is_the_askers_own(tmp_path, tmp_path_factory):
    plan = find_family("llava", tmp_path_factory).plan(tmp_path / "out")
    known = GraphCache()
    first, second = (known.pruning(plan, plan.entries[0]) for _ in range(2))
    nodes = len(second.model.graph)
    first.model.graph.outputs.clear()
    first.model.graph.remove(list(first.model.graph)[-1], safe=False)
    again = known.pruning(plan, plan.entries[0])
    assert len(second.model.graph) == len(again.model.graph) == nodes
    assert len(again.model.graph.outputs) == len(again.outputs) > 0


def test_what_nobody_asks_for_again_is_given_away(tmp_path, tmp_path_factory):
    plan = find_family("llava", tmp_path_factory).plan(tmp_path / "out")
    known = GraphCache(keeps=False)
    first, second = (known.pruning(plan, plan.entries[0]) for _ in range(2))
    assert first.model is not second.model
    assert [node.op_type for node in first.model.graph] == [
        node.op_type for node in second.model.graph
    ]
    assert not known._known
