"""The embedded model through the whole road: PyTorch's answers, ONNX's answers, the effect."""

import json
import re
import shutil

import numpy as np
import pytest

import gap_runtime
from gap_export.pipeline.asking import load_reference
from gap_export.pipeline.plan import plan_export
from gap_export.pipeline.request import make_request
from gap_export.pipeline.result import ExportResult
from gap_runtime import Bundle, Grounder
from gap_runtime.cli.main import main
from gap_runtime.evaluation.refshapes import draw_scene
from gap_runtime.grounding.check import check_bundle
from gap_runtime.pictures.boxes import Box, iou

EXPRESSIONS = 120


@pytest.fixture(scope="module")
def asked():
    """Expressions of the val split, with scene and true box."""
    scenes = (draw_scene("val", index) for index in range(EXPRESSIONS))
    pairs = [(scene, question) for scene in scenes for question in scene.questions]
    return pairs[:EXPRESSIONS]


def accuracy(grounder, asked, ratio):
    hits = 0
    for scene, question in asked:
        boxes = grounder.ground(scene.image, question.phrase, ratio=ratio).boxes
        x0, y0, x1, y1 = question.box
        hits += len(boxes) == 1 and iou(boxes[0], Box(x0=x0, y0=y0, x1=x1, y1=y1)) >= 0.5
    return hits / len(asked)


def test_check_passes_at_every_ratio(refshapes_bundle):
    report = check_bundle(Bundle.open(refshapes_bundle, verify_all=True), "onnxruntime:cpu")
    assert {row.ratio for row in report.rows} == {0.0, 0.25, 0.5, 0.75}
    assert report.passed
    assert all(row.kept_equal and row.positions_equal and row.same_tokens for row in report.rows)
    assert max(row.relative_logit_error for row in report.rows) < 1e-4


def test_a_changed_position_mapping_fails_the_check(refshapes_bundle, export, tmp_path):
    # GAP's recorded answers beside compact graphs: the check must see the difference.
    ratios = [entry.ratio for entry in Bundle.open(refshapes_bundle).manifest.ratios]
    compact = export(
        "refshapes",
        tmp_path / "c",
        reference=False,
        prune__positions="compact",
        prune__ratios=ratios,
    )
    manifest = json.loads((refshapes_bundle / "manifest.json").read_text(encoding="utf-8"))
    swapped = json.loads((compact / "manifest.json").read_text(encoding="utf-8"))
    swapped["reference"] = manifest["reference"]
    recorded = set(manifest["files"]) - set(swapped["files"])
    assert "reference.npz" in recorded
    for name in recorded:
        (compact / name).parent.mkdir(exist_ok=True)
        shutil.copy(refshapes_bundle / name, compact / name)
        swapped["files"][name] = manifest["files"][name]
    (compact / "manifest.json").write_text(json.dumps(swapped), encoding="utf-8")
    report = check_bundle(Bundle.open(compact), "onnxruntime:cpu")
    assert not report.passed
    rows = [row for row in report.rows if row.ratio]
    assert rows
    assert all("position IDs differ" in row.reasons for row in rows)
    assert not any(row.same_tokens for row in rows)


def test_gap_keeps_the_accuracy_and_other_ids_lose_it(refshapes_bundle, export, tmp_path, asked):
    grounder = Grounder(Bundle.open(refshapes_bundle), "onnxruntime:cpu")
    unpruned = accuracy(grounder, asked, 0.0)
    gap = accuracy(grounder, asked, 0.5)
    lost = {}
    for mode in ("compact", "permuted"):
        bundle = export(
            "refshapes",
            tmp_path / mode,
            reference=False,
            prune__positions=mode,
            prune__ratios=[0.5],
        )
        lost[mode] = accuracy(Grounder(Bundle.open(bundle), "onnxruntime:cpu"), asked, 0.5)
    assert unpruned >= 0.85
    assert gap >= 0.8 * unpruned
    assert max(lost.values()) < unpruned / 3


def grounder_prompt(grounder, phrase):
    encoded = grounder.encoder.encode(phrase)
    return encoded.prefix + encoded.suffix


def test_pytorch_and_onnx_give_the_same_text(refshapes_bundle, asked):
    bundle = Bundle.open(refshapes_bundle)
    grounder = Grounder(bundle, "onnxruntime:cpu")
    plan = plan_export(make_request("refshapes", ratios=0.0, reference=False))
    (entry,), (bucket,) = plan.entries, plan.spec.buckets
    reference = load_reference(plan, None)
    for scene, question in asked[:25]:
        put = reference.ask(scene.image, question.phrase, bucket)
        exported = grounder.ground(scene.image, question.phrase, ratio=0.0)
        assert put.prefix + put.suffix == grounder_prompt(grounder, question.phrase)
        # Not pruned at all, and pruned by nothing.
        for pruned in (None, entry):
            eager = reference.answer(put, pruned)
            assert eager.text == exported.answer
            assert eager.token_ids == list(exported.token_ids)
            assert eager.order == list(range(64))


def test_ground_draws_and_prints_json(refshapes_bundle, tmp_path, capsys):
    scene = draw_scene("val", 5)
    scene.image.save(tmp_path / "in.png")
    phrase = scene.questions[0].phrase
    arguments = ["ground", str(refshapes_bundle), str(tmp_path / "in.png"), phrase]
    code = main([*arguments, "--ratio", "0.5", "--draw", str(tmp_path / "out.png"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == 0
    assert (found["kept"], found["patches"], len(found["kept_index"])) == (32, 64, 32)
    assert set(found["milliseconds"]) == {"preprocess", "vision", "prefill", "decode", "total"}
    width, height = scene.image.size
    for x0, y0, x1, y1 in found["boxes"]:
        assert 0 <= x0 < x1 <= width
        assert 0 <= y0 < y1 <= height
    assert (tmp_path / "out.png").is_file()


def test_bench_reports_every_ratio(refshapes_bundle, capsys):
    assert main(["bench", str(refshapes_bundle), "--runs", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = report["rows"]
    assert report["peak_memory_mib"] > 50
    assert all(0 < row["request_p50_ms"] <= row["request_p95_ms"] for row in rows)
    assert [row["ratio"] for row in rows] == [0.0, 0.25, 0.5, 0.75]
    assert all(row["prefill_ms"] > 0 and row["token_ms"] > 0 for row in rows)


def test_info_is_the_manifest(refshapes_bundle, capsys):
    assert main(["info", str(refshapes_bundle), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert [bucket["grids"] for bucket in info["buckets"]] == [[[8, 8]]]
    assert [(entry["patches"], entry["kept"], entry["extra"]) for entry in info["ratios"]] == [
        (64, kept, 0) for kept in (64, 48, 32, 16)
    ]
    assert {"prefix", "suffix", "answer", "capacity"} == set(info["layout"])
    assert [stage["ratio"] for stage in info["stages"]] == [0.0, 0.25, 0.5, 0.75, None]
    assert all({"file", "inputs", "outputs"} <= set(stage) for stage in info["stages"])


def test_the_cache_is_written_in_place(refshapes_bundle):
    """Every decode step adds one slot and leaves the others' bytes alone."""
    bundle = Bundle.open(refshapes_bundle)
    grounder = Grounder(bundle, "onnxruntime:cpu")
    decoder = grounder._open_cache().session
    rng = np.random.default_rng(0)
    width = bundle.manifest.embedding.shape[1]
    last, only = np.array([8]), np.array([0])
    rows = rng.standard_normal((1, 9, width)).astype(np.float32)
    decoder.run(rows, np.arange(9)[None], 0, last)
    before = decoder._cache.inputs(0)["cache_key_00"].numpy().copy()
    decoder.run(rng.standard_normal((1, 1, width)).astype(np.float32), np.array([[40]]), 9, only)
    after = decoder._cache.inputs(0)["cache_key_00"].numpy()
    assert decoder._cache.sides == 1
    assert np.array_equal(before[:, :, :9], after[:, :, :9])
    assert not before[:, :, 9].any()
    assert after[:, :, 9].any()
    assert not after[:, :, 10:].any()


def count_by_hand(folder):
    """Answers of four numbers that make a box, by ratio, of the manifest as it lies on disk."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    found = {}
    for sample in manifest["reference"]["samples"]:
        numbers = [float(text) for text in re.findall(r"-?\d+(?:\.\d+)?", sample["answer"])]
        is_box = len(numbers) == 4 and numbers[0] < numbers[2] and numbers[1] < numbers[3]
        found.setdefault(sample["ratio"], []).append(is_box)
    return [
        {"ratio": ratio, "samples": len(boxed), "boxed": sum(boxed)}
        for ratio, boxed in found.items()
    ]


def test_a_check_that_passes_says_where_pytorch_itself_gives_no_box(refshapes_bundle, capsys):
    truth = count_by_hand(refshapes_bundle)
    lacking = [each for each in truth if each["boxed"] < each["samples"]]
    assert lacking, "the embedded model answers with boxes at every ratio: choose others"
    arguments = ["check", str(refshapes_bundle), "--backend", "onnxruntime:cpu"]
    assert main([*arguments, "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["passed"]
    key = lambda each: -1 if each["ratio"] is None else each["ratio"]  # noqa: E731
    assert found["pytorch_boxes"] == sorted(truth, key=key)
    for each in lacking:
        said = f"{each['samples'] - each['boxed']} of {each['samples']} at {each['ratio']:g}"
        assert said in " ".join(captured.err.split())
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == "passed"
    assert "PyTorch itself gives no box for" in " ".join(captured.err.split())


def test_an_export_says_so_too(refshapes_bundle):
    """The same line and the same counts, from the result of the export."""
    bundle = Bundle.open(refshapes_bundle)
    result = ExportResult(
        folder=refshapes_bundle, manifest=bundle.manifest, report=None, note="no", plan=None
    )
    found = result.summarize()["pytorch_boxes"]
    assert {each["ratio"]: each for each in found} == {
        each["ratio"]: each for each in count_by_hand(refshapes_bundle)
    }
    assert result.describe_boxless().startswith("PyTorch itself gives no box for ")


def test_scores_are_pytorchs_own(refshapes_bundle):
    """The same probabilities from PyTorch's logits and from the graphs', to float32."""
    report = check_bundle(Bundle.open(refshapes_bundle))
    scored = [row for row in report.rows if row.reference_score]
    assert len(scored) >= 6
    for row in scored:
        assert row.score == pytest.approx(row.reference_score, abs=1e-4)
        assert 0.05 < row.score <= 1
    # They tell answers apart.
    assert max(row.score for row in scored) > min(row.score for row in scored)


def test_evaluate_is_a_call(refshapes_bundle):
    found = gap_runtime.evaluate(refshapes_bundle, "refshapes:test", ratios=[0.5], limit=3)
    assert [(each.ratio, each.phrases) for each in found.scores] == [(0.5, 3)]
    assert len(found.answers.rows) == 3
    assert len(repr(found)) < 200
    assert found.dump()["data"]["phrases"] == 3
    report = gap_runtime.check(refshapes_bundle, ratios=[0.5])
    assert report.passed
    assert len(repr(report)) < 100
