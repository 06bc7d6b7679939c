"""The page of a check: what it says of every row, and that hostile text stays text."""

import dataclasses
import math

import pytest
from PIL import Image

from gap_runtime.bundle.bundle import Bundle
from gap_runtime.errors import InputError
from gap_runtime.grounding.boxless import BoxCount
from gap_runtime.grounding.check import CheckReport, Compared
from gap_runtime.grounding.compare import CheckRow
from gap_runtime.pictures.boxes import Box
from gap_runtime.report.check_page import make_check_page
from gap_runtime.report.page import encode_picture, make_page, make_table, write_page

GOOD = CheckRow(
    ratio=0.5,
    sample="00-photo",
    pixels_error=1e-7,
    kept_equal=True,
    kept_jaccard=1.0,
    near_tie=False,
    same_prompt=True,
    positions_equal=True,
    visual_error=2e-6,
    max_logit_error=1e-5,
    relative_logit_error=3e-7,
    same_tokens=True,
    token_near_tie=False,
    first_divergence=None,
    draft_divergence=None,
    draft_margin=None,
    answer="[0.10,0.20,0.30,0.40]",
    reference_answer="[0.10,0.20,0.30,0.40]",
    iou=1.0,
    missed=False,
    passed=True,
    reasons=(),
)
BAD = dataclasses.replace(
    GOOD,
    sample="01-photo",
    pixels_error=math.inf,
    kept_equal=False,
    kept_jaccard=0.6,
    visual_error=None,
    relative_logit_error=None,
    same_tokens=False,
    first_divergence=3,
    answer="<script>alert(1)</script>",
    iou=None,
    passed=False,
    reasons=("kept patches differ (Jaccard 0.600, no near tie)",),
)
OCCASION = (("host", "<b>a</b>"), ("GPU", "none found"))
BOX = Box(x0=1.0, y0=1.0, x1=9.0, y1=5.0)


def make_compared(row, *, phrase="the red mug", kept=(0, 1, 2), boxes=(BOX,)):
    return Compared(
        row=row,
        picture=Image.new("RGB", (16, 8), (180, 180, 180)),
        phrase=phrase,
        kept_index=kept,
        reference_kept_index=(0, 1, 2),
        boxes=boxes,
        reference_boxes=(BOX,),
    )


@pytest.fixture
def make_report(make_bundle, pages):
    """The page of some rows, read."""
    bundle = Bundle.open(make_bundle())

    def make(*compared, boxed=()):
        rows = tuple(each.row for each in compared)
        report = CheckReport(
            bundle=str(bundle.folder),
            backend="onnxruntime:cpu",
            precision="float32",
            misses_allowed=0,
            draft_differences=0,
            passed=all(row.passed for row in rows),
            pytorch_boxes=boxed,
            rows=rows,
        )
        page = pages.Page(make_check_page(bundle, report, list(compared), OCCASION))
        pages.require_sound(page)
        return page

    return make


def test_what_passed_is_told_with_its_errors(make_report):
    page = make_report(make_compared(GOOD))
    assert "passed: 1 of 1 rows agree" in page.words.replace(" :", ":")
    for part in ("1.0e-07", "2.0e-06", "3.0e-07", "equal", "none", "3 patches kept"):
        assert part in page.words


def test_where_pytorch_gives_no_box_is_told_though_all_is_equal(make_report):
    boxed = (
        BoxCount(ratio=None, samples=3, boxed=3),
        BoxCount(ratio=0.75, samples=3, boxed=0),
    )
    told = "PyTorch itself gives no box for 3 of 3 at 0.75"
    assert told in make_report(make_compared(GOOD), boxed=boxed).words
    assert "gives no box" not in make_report(make_compared(GOOD), boxed=boxed[:1]).words


def test_what_failed_is_told_with_its_stage_and_first_divergence(make_report):
    page = make_report(make_compared(GOOD), make_compared(BAD, kept=(0, 1, 3), boxes=()))
    for part in (
        *("failed", "1 of 2 rows agree", "Jaccard 0.600", "token 3", "no near tie"),
        *("3 patches kept, 2 in one of the two only, no box", "inf"),
    ):
        assert part in page.words, part


def test_hostile_text_stays_text(make_report):
    phrase = '"><img src=x onerror=alert(2)>'
    page = make_report(make_compared(BAD, phrase=phrase))
    assert "<script>alert(1)</script>" in page.words
    assert phrase in page.words
    assert "host <b>a</b> GPU none found" in " ".join(page.words.split())
    assert len(page.images) == 1


def test_one_ratio_needs_no_map_of_several(make_report):
    assert "heat" not in make_report(make_compared(GOOD)).ids
    other = dataclasses.replace(GOOD, ratio=0.75)
    assert "heat" in make_report(make_compared(GOOD), make_compared(other)).ids


def test_a_large_picture_is_made_smaller():
    small = encode_picture(Image.effect_noise((600, 300), 80))
    large = encode_picture(Image.effect_noise((6000, 3000), 80))
    assert len(large) < 2 * len(small)


def test_a_page_is_written_whole(tmp_path):
    out = tmp_path / "page.html"
    write_page(out, make_page("a < b", make_table("c & d", ["e", "f"], [["g", "<h>"]])))
    text = out.read_text(encoding="utf-8")
    assert "<title>a &lt; b</title>" in text
    assert "&lt;h&gt;" in text
    assert list(tmp_path.iterdir()) == [out]
    with pytest.raises(InputError, match=r"nowhere/page\.html: cannot be written \(No such file"):
        write_page(tmp_path / "nowhere" / "page.html", text)
