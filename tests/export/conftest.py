"""Fixtures for the tests of gap_export."""

import pytest

from gap_export.config import load_config
from gap_export.pipeline.plan import ExportRequest, plan_export
from gap_export.pipeline.run import export
from gap_runtime.display import Display

SHORT_PROMPT = "USER: <image>\nWhere is {phrase}? ASSISTANT:"


@pytest.fixture(scope="session")
def make_plan():
    """A function that plans an export of a checkpoint folder with a short prompt."""

    def plan(
        folder,
        out,
        *,
        ratios=(0.5,),
        weights="clone",
        reference=False,
        target="cpu",
        **overrides,
    ):
        named = load_config(
            str(folder),
            {
                "prompt.template": SHORT_PROMPT,
                "prompt.suffix": 24,
                "prompt.answer": 8,
                "prune.ratios": list(ratios),
            }
            | {key.replace("__", "."): value for key, value in overrides.items()},
        )
        return plan_export(
            ExportRequest(
                named=named, target=target, out=out, weights=weights, reference=reference
            )
        )

    return plan


@pytest.fixture(scope="session")
def run_export():
    """A function that carries out a plan without showing anything."""
    return lambda plan: export(plan, Display(quiet=True))


@pytest.fixture(scope="session")
def exported(tmp_path_factory, tiny_llava, make_plan, run_export):
    """A finished export of the tiny checkpoint at two ratios, without a reference. Read only."""
    out = tmp_path_factory.mktemp("bundles") / "tiny"
    return run_export(make_plan(tiny_llava, out, ratios=(0.5, 0.75)))
