"""`gap-runtime check` through the TensorRT backend, its engines computed by onnxruntime.

The library and the device are made up (tests/runtime/fake_tensorrt.py), the numbers are not: what
is copied, bound and kept between calls decides whether PyTorch's answers come out.
"""

import pytest

from gap_runtime.cli.main import main
from gap_runtime.grounding.check import check_bundle


@pytest.mark.parametrize(
    "ratios",
    [[0.0, 0.5], pytest.param([0.0, 0.25, 0.5, 0.75], marks=pytest.mark.matrix)],
    ids=["two", "all"],
)
def test_float32_with_the_cache_in_place(build_computed, export, tmp_path, ratios):
    out = export(
        "refshapes",
        tmp_path / "exported",
        target="standard",
        prune__ratios=ratios,
    )
    bundle, gpu = build_computed(out, is_in_place=True)
    report = check_bundle(bundle, "tensorrt")
    assert report.passed
    assert {row.ratio for row in report.rows} == {*ratios}
    assert all(row.same_tokens for row in report.rows)
    assert gpu.counts["launch"] > 20
    assert main(["check", str(bundle.folder), "--backend", "tensorrt:rtx"]) == 0


@pytest.mark.parametrize(
    ("target", "is_in_place"),
    [pytest.param("rtx", True, marks=pytest.mark.matrix), ("jetson-orin-jp6", False)],
)
def test_float16_in_both_dialects(build_computed, export, tmp_path, target, is_in_place):
    out = export(
        "refshapes", tmp_path / "exported", target=target, dtype="float16", prune__ratios=[0.5]
    )
    bundle, gpu = build_computed(out, is_in_place=is_in_place)
    report = check_bundle(bundle, "tensorrt:rtx")
    assert report.passed
    assert bundle.manifest.dtype == "float16"
    # Of steps and of drafts; without a cache in place one for each side that was read often.
    assert len(gpu.graphs) == (2 if is_in_place else 3)
