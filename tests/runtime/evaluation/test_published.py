"""What a row of figures is of, with and without wrong labels, and beside what it may be put."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from PIL import Image

from gap_runtime.cli import main as cli
from gap_runtime.evaluation.compare import compare_rows
from gap_runtime.evaluation.data import Data
from gap_runtime.evaluation.expression import Expression, FilePicture
from gap_runtime.evaluation.protocol import list_protocols, load_protocol
from gap_runtime.evaluation.published import (
    describe_standings,
    list_standings,
    read_conventions,
)
from gap_runtime.evaluation.results import Answers, DataFacts, Header, Row, Subject
from gap_runtime.evaluation.score import score_rows
from gap_runtime.evaluation.splits import COUNTS
from gap_runtime.evaluation.statistics import mcnemar_p
from gap_runtime.pictures.boxes import Box

TRUE = Box(10.0, 10.0, 30.0, 30.0)
RIGHT, HALF, WRONG = "[0.1, 0.1, 0.3, 0.3]", "[0.1, 0.1, 0.3, 0.2]", "[0.5, 0.5, 0.6, 0.6]"


def make_row(key, answer, ratio=0.5):
    return Row(
        key=key,
        ratio=ratio,
        picture="a.png",
        phrase="it",
        size=(100, 100),
        box=TRUE,
        answer=answer,
        token_ids=(1,),
        milliseconds={"total": 1.0},
    )


def make_expression(key, **changes):
    picture = FilePicture(key="a.png", path=Path("a.png"), turned=False)
    expression = Expression(key=key, picture=picture, phrase="it", box=TRUE, size=None, target="")
    return dataclasses.replace(expression, **changes)


def make_data(name="refcoco", split="val", **changes):
    data = Data(
        name=f"{name}:{split}",
        format="mdetr",
        expressions=(make_expression("a"),),
        sha256="0",
        notes=(),
        set=name,
        split=split,
        by="",
        limited=False,
        whole=True,
    )
    return dataclasses.replace(data, **changes)


def test_figures_with_and_without_wrong_labels(llava_box):
    rows = [make_row("a", RIGHT), make_row("b", WRONG), make_row("c", WRONG), make_row("d", RIGHT)]
    reviewed = [make_expression(key, wrong=key in "bd") for key in "abcd"]
    every, kept = score_rows(rows, "ref-l4", load_protocol("ref-l4"), llava_box, reviewed)
    assert (every.labels, every.phrases, every.left_out, every.accuracy) == (
        "published",
        4,
        0,
        0.5,
    )
    assert (kept.labels, kept.phrases, kept.left_out, kept.accuracy) == ("reviewed", 2, 2, 0.5)
    assert every.frame == kept.frame == "padded-square"
    # Nobody looked: one row.
    (alone,) = score_rows(
        rows, "ref-l4", load_protocol("ref-l4"), llava_box, [make_expression("a")]
    )
    assert alone == every


def test_every_label_wrong_leaves_a_row_without_numbers(llava_box):
    rows, asked = [make_row("a", RIGHT)], [make_expression("a", wrong=True)]
    _, kept = score_rows(rows, "ref-l4", load_protocol("ref-l4"), llava_box, asked)
    assert (kept.phrases, kept.left_out) == (0, 1)
    assert math.isnan(kept.accuracy)


def test_two_files_with_and_without_wrong_labels(llava_box):
    header = Header(
        subject=Subject(
            name="x", sha256="0", engine="e", strategy="s", positions="gap", dtype="float32"
        ),
        data=DataFacts(name="mine", format="plain", phrases=3, sha256="1"),
        box=llava_box,
    )
    this = Answers(header=header, rows=tuple(make_row(key, RIGHT) for key in "abc"))
    other = Answers(
        header=header,
        rows=(make_row("a", RIGHT), make_row("b", WRONG), make_row("c", WRONG)),
    )
    asked = [make_expression(key, wrong=key == "c") for key in "abc"]
    found = compare_rows(this, other, "o", "ref-l4", load_protocol("ref-l4"), asked)
    assert [(c.labels, c.phrases, c.only_this, c.only_other) for c in found] == [
        ("published", 3, 2, 0),
        ("reviewed", 2, 1, 0),
    ]
    assert [c.p for c in found] == [mcnemar_p(2, 0), mcnemar_p(1, 0)]
    assert [c.differing for c in found] == [2, 1]


def test_thresholds_up_to_95_by_plain_loops(llava_box):
    # IoU 1, 0.5 and 0: with > t, the second one counts nowhere.
    rows = [make_row("a", RIGHT), make_row("b", HALF), make_row("c", WRONG)]
    strict, loose = (
        score_rows(rows, name, load_protocol(name), llava_box)[0]
        for name in ("ref-l4", "lmms-eval")
    )
    assert strict.accuracy == pytest.approx(1 / 3)
    assert loose.accuracy == pytest.approx(2 / 3)
    assert strict.accuracy_90 == loose.accuracy_90 == pytest.approx(1 / 3)
    assert strict.mean_accuracy == pytest.approx(1 / 3)
    assert loose.mean_accuracy == pytest.approx((2 / 3 + 9 * 1 / 3) / 10)


def test_points_have_no_iou_and_parts_are_scored_alone(llava_box):
    # The centre of an answer that covers the whole picture is not in the box.
    rows = [
        make_row("a", RIGHT),
        make_row("b", "(0.2, 0.2)"),
        make_row("c", "[0, 0, 1, 1]"),
        make_row("d", "nothing"),
    ]
    asked = [make_expression(key, part=part) for key, part in zip("abcd", "xxyy", strict=True)]
    (score,) = score_rows(rows, "point", load_protocol("point"), llava_box, asked)
    assert (score.measure, score.accuracy, score.unparsable) == ("point", 0.5, 1)
    for value in (
        *(score.mean_iou, score.accuracy_25, score.accuracy_75, score.accuracy_90),
        *(score.mean_accuracy, *(size.mean_iou for size in score.sizes)),
    ):
        assert math.isnan(value)
    assert [(p.part, p.phrases, p.accuracy) for p in score.parts] == [("x", 2, 1.0), ("y", 2, 0.0)]


def score_of(llava_box, protocol, **changes):
    (score,) = score_rows([make_row("a", RIGHT)], protocol, load_protocol(protocol), llava_box)
    return dataclasses.replace(score, **changes)


def reasons(score, data):
    return {each.who: each.reasons for each in list_standings(score, data)}


def test_a_row_compares_with_those_who_scored_alike(llava_box):
    found = reasons(score_of(llava_box, "shikra"), make_data())
    assert found["Shikra (2306.15195)"] == ()
    # The frame is named where it is another one.
    assert found["GAP, LLaVA (2506.21873)"] == ("protocol lmms-eval, frame original",)
    assert found["IVC-Prune, Qwen2.5-VL (2602.03060)"] == (
        "protocol qwen25, frame resized to multiples of 28",
    )
    assert found["Ref-L4's RefCOCO without wrong labels (2406.16866)"] == (
        "protocol ref-l4",
        "reviewed labels",
    )
    assert "Ref-L4 (2406.16866)" not in found


def test_what_else_parts_a_row_from_a_published_one(llava_box):
    score, who = score_of(llava_box, "shikra"), "Shikra (2306.15195)"
    for changes, reason in (
        ({"limited": True}, "all phrases"),
        ({"whole": False}, "the published count of phrases"),
        ({"by": "google"}, "split by unc"),
    ):
        assert reasons(score, make_data(**changes))[who] == (reason,)
    assert reasons(score, make_data(by="unc"))[who] == ()
    unasked = dataclasses.replace(score, unasked=3)
    assert reasons(unasked, make_data())[who] == ("every phrase asked",)
    reviewed = dataclasses.replace(score, labels="reviewed")
    assert reasons(reviewed, make_data())[who] == ("published labels",)
    # Tables over the hub's file count its phrases, which are not those of the published split.
    lmms, hub = score_of(llava_box, "lmms-eval"), "lmms-eval's tables, Nuwa (2602.02951)"
    assert reasons(lmms, make_data(format="hub", whole=False))[hub] == ()
    assert reasons(lmms, make_data())[hub] == ("phrases of format hub",)


def test_sets_whose_splits_are_quoted_together(llava_box):
    score = score_of(llava_box, "ref-l4")
    (one,) = list_standings(score, make_data("ref-l4", "val"))
    assert one.reasons == ("split all",)
    (both,) = list_standings(score, make_data("ref-l4", "all"))
    assert both.reasons == ()
    (click,) = list_standings(score_of(llava_box, "point"), make_data("screenspot-pro", "all"))
    assert click.reasons == ()
    assert list_standings(score, make_data("mine", "")) == ()
    assert describe_standings([one, both]) == (
        "Ref-L4 (2406.16866)",
        "Ref-L4 (2406.16866) (split all)",
    )


def test_every_convention_is_of_something_that_there_is():
    sets = {name for name, _ in COUNTS}
    for each in read_conventions():
        assert set(each.sets) <= sets
        assert each.protocol in list_protocols()
        assert not each.split or all((name, each.split) in COUNTS for name in each.sets)


def test_the_line_about_the_data():
    assert make_data().describe() == "refcoco:val (split by unc), 1 of 10,834 published phrases"
    google = make_data(by="google")
    assert google.describe() == "refcoco:val (split by google), 1 phrases"
    assert make_data("mine", "x").describe() == "mine:x, 1 phrases"


@pytest.fixture
def reviewed_file(tmp_path):
    """Four phrases of a small picture in the reviewed form, one of them wrong."""
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    images = [
        {"id": k, "file_name": "a.png", "caption": "the red mug", "width": 16, "height": 16}
        for k in range(4)
    ]
    annotations = [
        {"id": k, "image_id": k, "bbox": [4, 4, 8, 4], "caption_quality": int(k != 3)}
        for k in range(4)
    ]
    path = tmp_path / "refcoco_val_reviewed.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


def test_the_command_names_what_every_row_is_of(
    capsys, make_bundle, answer_with, reviewed_file, tmp_path
):
    answer_with(11)
    folder, out = make_bundle(), tmp_path / "out.jsonl"
    command = [
        *("evaluate", str(folder), "--data", f"refcoco:val@{reviewed_file.parent}"),
        *("--protocol", "ref-l4", "--protocol", "point", "--ratio", "0.5", "--out", str(out)),
    ]
    assert cli.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [
        (s["protocol"], s["labels"], s["phrases"], s["left_out"]) for s in found["scores"]
    ] == [
        *(("ref-l4", "published", 4, 0), ("ref-l4", "reviewed", 3, 1)),
        *(("point", "published", 4, 0), ("point", "reviewed", 3, 1)),
    ]
    assert {s["frame"] for s in found["scores"]} == {"padded-square"}
    assert (found["data"]["set"], found["data"]["split"], found["data"]["whole"]) == (
        *("refcoco", "val", False),
    )
    assert found["scores"][2]["mean_iou"] is None
    standing = {each["who"]: each["reasons"] for each in found["scores"][1]["published"]}
    assert standing["Ref-L4's RefCOCO without wrong labels (2406.16866)"] == [
        "the published count of phrases"
    ]
    assert cli.main([*command, "--resume", "--compare", str(out)]) == 0
    text = capsys.readouterr().out
    for part in (
        *("refcoco:val (split by unc), 4 of 10,834 published phrases", "reviewed", "frame"),
        "point, published labels, ratio 0.5 against 0.5 of out.jsonl: the same answers to all 4",
        *("Acc@0.5 or in the box", "beside which published figures", "no, theirs: protocol"),
    ):
        assert part in text


def test_a_page_with_pictures_of_what_failed(
    capsys, make_bundle, answer_with, reviewed_file, tmp_path
):
    # The answer's box is another one than the true box.
    answer_with(11)
    data = json.loads(reviewed_file.read_text())
    for k in (1, 3):
        data["annotations"][k]["bbox"] = [0, 0, 3, 3]
        data["images"][k]["caption"] = "the mug"
    data["images"][1]["caption"] = "the red mug"
    reviewed_file.write_text(json.dumps(data))
    page = tmp_path / "page.html"
    command = [
        *("evaluate", str(make_bundle()), "--data", f"refcoco:val@{reviewed_file.parent}"),
        *("--protocol", "ref-l4", "--html", str(page)),
    ]
    assert cli.main(command) == 0
    assert f"report: {page}" in capsys.readouterr().err
    text = page.read_text(encoding="utf-8")
    assert "2 phrases were answered wrong at one ratio at least; 2 of them" in text
    assert text.count("<figure>") == 2
    # The phrase whose label is wrong comes last.
    assert text.index("0.5 removed, IoU 0.00<") < text.index("its label was found wrong")
    assert text.count("<code>[0.25,0.25,0.75,0.50]</code>") == 2
    for part in ("refcoco:val (split by unc), 4 of 10,834", "published by", "reviewed"):
        assert part in text
    assert "<script" not in text
    # No picture of the data, where none is wanted.
    assert cli.main([*command, "--gallery", "0"]) == 0
    assert "<figure>" not in page.read_text(encoding="utf-8")
    for more, part in (
        (["--gallery", "-1"], "--gallery -1: at least 0"),
        (["--html", str(tmp_path)], "is a folder"),
    ):
        assert cli.main([*command, *more]) == 2
        assert part in capsys.readouterr().err
