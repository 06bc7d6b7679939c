"""PyTorch as the one who answers: without anything that makes graphs."""

import subprocess
import sys

SCRIPT = """
import sys
from gap_export.analysis.evaluation import open_answerer
from gap_export.pipeline.request import make_request
from gap_runtime.evaluation.refshapes import draw_scene

answerer = open_answerer(make_request("refshapes", ratios=0.5, reference=False))
scene = draw_scene("val", 0)
answer = answerer.answer(answerer.look(scene.image), scene.questions[0].phrase, 0.5)
print("ANSWER", answer.text)
print("LOADED", *sorted(sys.modules))
"""
EXPORTING = (
    *("onnx", "onnx_ir", "onnxscript", "onnxruntime", "matplotlib"),
    *("gap_export.tracing", "gap_export.weights.write", "gap_export.graph.vision"),
    *("gap_export.quantization.graph", "gap_export.weights.bind"),
    *("gap_export.pipeline.stages", "gap_export.pipeline.run", "gap_export.pipeline.preflight"),
    "gap_export.pruners.random",
)


def is_part(module, package):
    return module == package or module.startswith(f"{package}.")


def test_pytorch_answers_without_the_exporter():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], check=False, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert "[" in lines["ANSWER"]
    loaded = lines["LOADED"].split()
    assert {"torch", "gap_export.reference.answers", "gap_export.models.llava"} <= set(loaded)
    found = [name for name in loaded if any(is_part(name, each) for each in EXPORTING)]
    assert found == []
