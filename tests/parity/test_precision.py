"""float16 and bfloat16 bundles: converted weights, float32 at the borders, honest limits."""

import onnx
import pytest

from gap_runtime import Bundle, Grounder
from gap_runtime.errors import EngineError
from gap_runtime.evaluation.refshapes import draw_scene
from gap_runtime.grounding.check import check_bundle


@pytest.fixture(scope="module")
def half(export, tmp_path_factory):
    out = tmp_path_factory.mktemp("half") / "b"
    return export("refshapes", out, dtype="float16", prune__ratios=[0.0, 0.5])


def test_float16_passes_its_check(half):
    report = check_bundle(Bundle.open(half), "onnxruntime:cpu")
    assert report.passed
    assert report.precision == "float16"


def test_float16_halves_the_weights_and_copies_no_float32(half):
    files = {path.name: path.stat().st_size for path in half.glob("*.safetensors")}
    assert list(files) == ["weights-float16.safetensors"]
    original = Bundle.open(half).manifest.embedding
    assert original.dtype == "float16"
    assert files["weights-float16.safetensors"] < 3_200_000


def test_scores_stay_float32_in_float16(half):
    model = onnx.load(half / "vision-32of64.onnx", load_external_data=False)
    inferred = onnx.shape_inference.infer_shapes(model)
    types = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    ranked = next(node for node in model.graph.node if node.op_type == "TopK")
    assert types[ranked.input[0]] == onnx.TensorProto.FLOAT


def test_bfloat16_exports_and_says_that_the_cpu_cannot_run_it(export, tmp_path):
    folder = export("refshapes", tmp_path / "b", dtype="bfloat16", prune__ratios=[0.5])
    grounder = Grounder(Bundle.open(folder), "onnxruntime:cpu")
    with pytest.raises(EngineError, match="no bfloat16 kernels"):
        grounder.ground(draw_scene("val", 0).image, "the red circle")
