"""OpenVINO itself on exported graphs, where it is installed."""

import pytest

from gap_export import export
from gap_runtime.bundle.bundle import Bundle
from gap_runtime.grounding.check import check_bundle

pytest.importorskip("openvino")


@pytest.mark.parametrize(
    "quantize",
    [None, *(pytest.param(each, marks=pytest.mark.matrix) for each in ("int8", "int4"))],
)
def test_its_answers_are_pytorchs(tmp_path, quantize):
    """Float32 to the check's own tolerance; quantized weights keep the boxes."""
    result = export(
        "refshapes", ratios=[0.5], target="openvino", out=tmp_path / "bundle", quantize=quantize
    )
    report = check_bundle(Bundle.open(result.folder), "openvino")
    assert report.passed
    assert all(row.kept_equal and row.positions_equal for row in report.rows)
    if quantize is None:
        assert max(row.max_logit_error for row in report.rows) < 1e-4
