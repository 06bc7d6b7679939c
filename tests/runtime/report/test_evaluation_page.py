"""The page of an evaluation: hostile text stays text, and nothing is shown that is not there."""

from PIL import Image

from gap_runtime.pictures.boxes import Box
from gap_runtime.report.evaluation_page import PageFailure, PageTable, make_evaluation_page

HOSTILE = '<script>alert("x")</script>'


def test_hostile_text_stays_text():
    failure = PageFailure(
        phrase=HOSTILE,
        what=HOSTILE,
        answer=HOSTILE,
        picture=Image.new("RGB", (16, 16)),
        found=(Box(1, 1, 9, 9),),
        true=Box(2, 2, 8, 8),
    )
    table = PageTable(title=HOSTILE, header=[HOSTILE, "n"], rows=[[HOSTILE, 3]])
    page = make_evaluation_page(HOSTILE, [HOSTILE], [table], [failure], wrong=1200)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 8
    assert "1,200 phrases were answered wrong at one ratio at least; 1 of them are here" in page


def test_a_page_without_pictures():
    page = make_evaluation_page("t", [], [], [], wrong=0)
    assert "<figure>" not in page
    assert 'class="legend"' not in page
    assert "0 phrases were answered wrong" in page
