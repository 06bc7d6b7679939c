"""Models of tiles in every dialect, dtype and weight: the graphs answer as PyTorch does."""

import pytest
from makers.families import export, find_family

from gap_runtime import Bundle, Grounder
from gap_runtime.errors import EngineError
from gap_runtime.pictures.load import load_picture

CASES = [
    pytest.param("internvl3", "standard", {}, marks=pytest.mark.matrix),
    pytest.param("internvl3", "portable", {"dtype": "float16"}, marks=pytest.mark.matrix),
    # For the CPU it is exported by test_matrix.py.
    pytest.param(
        "internvl3",
        "cpu",
        {"quantize__weights": "int8", "quantize__vision": True},
        marks=pytest.mark.matrix,
    ),
    pytest.param("internvl3.5", "standard", {"dtype": "float16"}, marks=pytest.mark.matrix),
    ("internvl3.5", "portable", {}),
    pytest.param("internvl3.5", "cpu", {"quantize__weights": "int4"}, marks=pytest.mark.matrix),
    ("llava-onevision", "standard", {"dtype": "float16"}),
    pytest.param("llava-onevision", "portable", {}, marks=pytest.mark.matrix),
    pytest.param(
        "llava-onevision",
        "cpu",
        {"quantize__weights": "int4", "quantize__vision": True},
        marks=pytest.mark.matrix,
    ),
]


@pytest.mark.parametrize(("family", "target", "overrides"), CASES, ids=str)
def test_the_check_passes(tmp_path_factory, tmp_path, family, target, overrides):
    case = find_family(family, tmp_path_factory, head_dim=16)
    plan = case.plan(
        tmp_path / "b", target=target, reference=True, prune__ratios=[0.5], **overrides
    )
    report = export(plan).report
    assert report is not None
    assert report.passed
    assert len(report.rows) == len(case.buckets)
    assert all(row.same_prompt for row in report.rows)
    # Quantized scores may exchange patches that nearly tie.
    if "quantize__weights" not in overrides:
        assert all(row.kept_equal and row.positions_equal for row in report.rows)


@pytest.mark.matrix
@pytest.mark.parametrize(
    "family",
    ["internvl3", "internvl3.5", "llava-onevision"],
)
def test_bfloat16_is_exported(tmp_path_factory, tmp_path, family):
    case = find_family(family, tmp_path_factory)
    plan = case.plan(tmp_path / "b", dtype="bfloat16", prune__ratios=[0.5])
    export(plan)
    bundle = Bundle.open(plan.out)
    assert bundle.manifest.embedding.dtype == "bfloat16"
    with pytest.raises(EngineError, match="no bfloat16 kernels"):
        Grounder(bundle, "onnxruntime:cpu").ground(load_picture(case.picture), "a red ring")
