"""Fixtures for the tests of gap_export."""

import pytest

from gap_export.pipeline import run as pipeline
from gap_export.pipeline.graph_cache import GraphCache
from gap_export.pipeline.plan import plan_export
from gap_export.pipeline.request import make_request
from gap_export.pipeline.run import export

SHORT_PROMPT = "USER: <image>\nWhere is {phrase}? ASSISTANT:"


@pytest.fixture(scope="session", autouse=True)
def trace_once(graphs_traced_once):
    """Tests here look at exports; those that look at tracing ask for `traced_anew`."""


@pytest.fixture
def traced_anew(monkeypatch):
    """Exports of this test trace every graph."""
    monkeypatch.setattr(pipeline, "GraphCache", GraphCache)


@pytest.fixture(scope="session")
def make_plan():
    """A function that plans an export of a checkpoint folder with a short prompt."""

    def plan(
        folder,
        out,
        *,
        ratios=(0.5,),
        bring="copy",
        reference=False,
        target="cpu",
        **overrides,
    ):
        settings = {
            "prompt.template": SHORT_PROMPT,
            "prompt.suffix": 24,
            "prompt.answer": 8,
            "prune.ratios": list(ratios),
        } | {key.replace("__", "."): value for key, value in overrides.items()}
        return plan_export(
            make_request(
                folder,
                settings=settings,
                target=target,
                out=out,
                bring=bring,
                reference=reference,
            )
        )

    return plan


@pytest.fixture(scope="session")
def run_export():
    """A function that carries out a plan without showing anything."""
    return export


@pytest.fixture(scope="session")
def exported(tmp_path_factory, tiny_llava, make_plan, run_export):
    """A finished export of the tiny checkpoint at two ratios, without a reference. Read only."""
    out = tmp_path_factory.mktemp("bundles") / "tiny"
    return run_export(make_plan(tiny_llava, out, ratios=(0.5, 0.75)))
