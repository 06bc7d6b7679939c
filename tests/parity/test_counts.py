"""`--keep`: exactly so many visual tokens, of a picture of any shape."""

from makers.families import find_family, make_picture

import gap_export
from gap_runtime import Grounder


def test_a_count_is_kept_of_pictures_of_every_shape(tmp_path, tmp_path_factory):
    """Two kinds of picture of 39 and 19 tokens; one name for what is the same of both."""
    case = find_family("llava-next-vicuna", tmp_path_factory)
    settings = {**case.overrides, "check.samples": str(case.samples), "prompt.answer": 5}
    result = gap_export.export(
        case.model, keep=[12, 19], settings=settings, dtype="float32", out=tmp_path / "bundle"
    )
    assert result.report.passed
    entries = result.manifest.ratios
    assert [(entry.patches, entry.kept) for entry in entries] == [
        *((39, 12), (39, 19)),
        *((19, 12), (19, 19)),
    ]
    assert [entry.ratio for entry in entries] == [0.7, 0.51] * 2
    grounder = Grounder(result.bundle, "onnxruntime:cpu", keep=12)
    for size in case.sizes:
        found = grounder.ground(make_picture(*size), "the red ring")
        assert (found.kept, len(found.kept_index)) == (12, 12)
        assert grounder.ground(make_picture(*size), "the red ring", ratio=0.51).kept == 19
