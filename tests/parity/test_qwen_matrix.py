"""Qwen-VL with every pruner that serves it, in every mode, as its own check sees it.

The check compares kept indices and position IDs exactly, logits within their tolerance and answers
token for token with the library's own model.
"""

import pytest
from makers.families import make_picture, make_samples
from makers.qwen import TEMPLATE, make_qwen3_checkpoint, make_qwen_checkpoint
from truths.references import require_same_references

from gap_export.config.records import POSITION_MODES
from gap_export.pipeline.asking import load_reference
from gap_export.pipeline.plan import plan_export
from gap_export.pipeline.request import make_request
from gap_export.reference.record import record_answers
from gap_runtime import Bundle
from gap_runtime.grounding.check import check_bundle

FAMILIES = {
    "qwen2.5": (make_qwen_checkpoint, "168x112"),
    "qwen3": (make_qwen3_checkpoint, "96x64"),
}
PRUNERS = (
    *("cdpruner", "column_attention", "dart", "divprune", "nuwa", "random", "spatial"),
    *("text_similarity", "trim"),
)
USUAL = {("qwen3", "column_attention", "compact-grid")}
CASES = [(f, p, m) for f in FAMILIES for p in PRUNERS for m in POSITION_MODES]


@pytest.fixture(scope="module")
def find(tmp_path_factory):
    found = {}

    def make(family):
        if family not in found:
            home = tmp_path_factory.mktemp(family)
            make_samples(home / "samples", make_picture(90, 61))
            found[family] = FAMILIES[family][0](home / "model", seed=11)
        return found[family]

    return make


@pytest.mark.parametrize(
    ("family", "pruner", "mode"),
    [
        pytest.param(*case, marks=() if case in USUAL else pytest.mark.matrix, id="-".join(case))
        for case in CASES
    ],
)
def test_the_bundle_is_checked(find, export, tmp_path, family, pruner, mode):
    checkpoint = find(family)
    folder = export(
        checkpoint,
        tmp_path / "b",
        reference=True,
        check__samples=str(checkpoint.parent / "samples"),
        prompt__template=TEMPLATE,
        prompt__answer=4,
        image__canvas=FAMILIES[family][1],
        prune__strategy=pruner,
        prune__positions=mode,
        prune__ratios=[0.0, 0.5, 0.9],
        prune__extra_token="append",
    )
    assert check_bundle(Bundle.open(folder), "onnxruntime:cpu").passed


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_is_read_layer_by_layer_answers_the_same(find, tmp_path, family):
    checkpoint = find(family)
    settings = {
        "check.samples": str(checkpoint.parent / "samples"),
        "prompt.template": TEMPLATE,
        "prompt.answer": 4,
        "image.canvas": FAMILIES[family][1],
    }
    plan = plan_export(
        make_request(
            str(checkpoint),
            ratios=0.5,
            pruner="column_attention",
            settings=settings,
            out=tmp_path / "b",
        )
    )
    found = []
    for name, memory in (("whole", None), ("streamed", 0)):
        (tmp_path / name).mkdir()
        reference = load_reference(plan, memory)
        found.append(record_answers(reference, plan.samples, plan.entries, tmp_path / name))
    require_same_references(*reversed(found))
