"""What planning costs: it settles numbers, so that it must not load what makes graphs."""

import subprocess
import sys

import pytest

TRACER = ("gap_export.tracing.trace", "onnx", "onnx_ir", "onnxscript")
SCRIPT = """
import sys

from gap_export.pipeline.plan import plan_export
print(*sys.modules)
from gap_export.pipeline.request import make_request

plan_export(make_request("refshapes"))
print(*sys.modules)
"""


@pytest.fixture(scope="module")
def loaded():
    """Modules of a process that imported the plan, and then made one."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    imported, planned = done.stdout.splitlines()
    return {"imported": set(imported.split()), "planned": set(planned.split())}


@pytest.mark.parametrize(
    ("when", "unwanted"),
    [
        # A family loads transformers, which loads torch.onnx on its own.
        ("imported", {*TRACER, "torch.onnx._internal"}),
        ("planned", {*TRACER}),
    ],
)
def test_the_tracer_is_not_loaded(loaded, when, unwanted):
    assert "gap_export.pipeline.plan" in loaded[when]
    assert not loaded[when] & unwanted
