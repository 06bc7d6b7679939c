"""What planning costs: it settles numbers, so that it must not load what makes graphs."""

import subprocess
import sys

import pytest

TRACER = ("gap_export.tracing.trace", "onnx", "onnx_ir", "onnxscript")
IMPORTED = "import gap_export.pipeline.plan"
PLANNED = """
from gap_export.pipeline.plan import plan_export
from gap_export.pipeline.request import make_request

plan_export(make_request("refshapes"))
"""


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        # A family loads transformers, which loads torch.onnx on its own.
        (IMPORTED, (*TRACER, "torch.onnx._internal")),
        (PLANNED, TRACER),
    ],
    ids=["imported", "planned"],
)
def test_the_tracer_is_not_loaded(code, unwanted):
    script = f"{code}\nimport sys\nprint([name for name in {unwanted} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
