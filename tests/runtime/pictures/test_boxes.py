"""Boxes from answers, all expected values worked out by hand."""

import dataclasses
import json
import re

import pytest

from gap_runtime.errors import BundleError
from gap_runtime.pictures.boxes import Box, PictureFrame, clip_box, iou, parse_boxes


def box(x0, y0, x1, y1):
    return Box(x0=x0, y0=y0, x1=x1, y1=y1)


def whole(width, height):
    return PictureFrame.whole((width, height))


def corners(parsed):
    return [pytest.approx(list(found)) for found in parsed.boxes]


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        # Square: fractions of the side.
        (100, 100, [25, 30, 50, 60]),
        # Wide, 200x100: the canvas is 200 high, the picture begins at row 50.
        (200, 100, [50, 10, 100, 70]),
        # Tall, 100x200: the picture begins at column 50.
        (100, 200, [0, 60, 50, 120]),
        # Odd: 100 - 61 = 39 columns of padding, 19 of them to the left.
        (61, 100, [6, 30, 31, 60]),
        # Odd: 100 - 61 = 39 rows of padding, 19 of them above.
        (100, 61, [25, 11, 50, 41]),
    ],
)
def test_padding_is_taken_off(llava_box, width, height, expected):
    parsed = parse_boxes("[0.25, 0.30, 0.50, 0.60]", llava_box, whole(width, height))
    assert corners(parsed) == [expected]
    assert parsed.problems == ()


def test_original_frame_has_no_padding(llava_box):
    spec = dataclasses.replace(llava_box, frame="original", scale=1000.0)
    parsed = parse_boxes("[250, 100, 500, 200]", spec, whole(400, 100))
    assert corners(parsed) == [[100, 10, 200, 20]]


def test_unknown_frame_is_refused(llava_box):
    spec = dataclasses.replace(llava_box, frame="crop")
    with pytest.raises(BundleError, match="frame 'crop' is unknown; have padded-square, ori"):
        parse_boxes("[0.1, 0.1, 0.5, 0.5]", spec, whole(400, 100))


def test_box_over_the_edge_is_clipped(llava_box):
    # Wide: rows 0 to 50 of the canvas are padding; y0 = 0 lies 50 above the picture.
    parsed = parse_boxes("[0.9, 0.0, 1.2, 0.5]", llava_box, whole(200, 100))
    assert corners(parsed) == [[180, 0, 200, 50]]
    assert parsed.problems == ()


def test_negative_corner_is_clipped(llava_box):
    parsed = parse_boxes("[-0.10, -0.20, 0.50, 0.50]", llava_box, whole(10, 10))
    assert corners(parsed) == [[0, 0, 5, 5]]


@pytest.mark.parametrize(
    "answer",
    [
        "[0.60, 0.10, 0.20, 0.30]",  # x reversed
        "[0.10, 0.50, 0.20, 0.30]",  # y reversed
        "[0.50, 0.10, 0.50, 0.30]",  # no width
        "[0.10, 0.30, 0.20, 0.30]",  # no height
    ],
)
def test_degenerate_box_is_reported_and_left_out(llava_box, answer):
    parsed = parse_boxes(answer, llava_box, whole(100, 100))
    assert parsed.boxes == ()
    assert parsed.problems == (f"degenerate box {answer}: its corners span no area",)


@pytest.mark.parametrize(
    "answer",
    [
        "[0.10, 0.00, 0.20, 0.20]",  # in the padding above a wide picture
        "[0.10, 0.80, 0.20, 0.90]",  # below it
        "[1.10, 0.30, 1.20, 0.60]",  # right of the frame
        "[-0.50, 0.30, -0.20, 0.60]",  # left of it
    ],
)
def test_box_outside_the_picture_is_reported_and_left_out(llava_box, answer):
    parsed = parse_boxes(answer, llava_box, whole(200, 100))
    assert parsed.boxes == ()
    assert parsed.problems == (f"box {answer} lies outside the picture",)


def test_two_boxes_keep_their_order(llava_box):
    answer = "[0.50, 0.50, 0.75, 0.75] and [0.00, 0.00, 0.25, 0.25]"
    assert corners(parse_boxes(answer, llava_box, whole(8, 8))) == [[4, 4, 6, 6], [0, 0, 2, 2]]


def test_good_box_beside_a_degenerate_one(llava_box):
    parsed = parse_boxes("[0.5, 0.5, 0.1, 0.1] [0.0, 0.0, 0.5, 0.5]", llava_box, whole(8, 8))
    assert corners(parsed) == [[0, 0, 4, 4]]
    assert len(parsed.problems) == 1


def test_text_around_the_box_does_not_matter(llava_box):
    answer = "Sure (see 3, 4): it is at [0.25,0.25 , 0.5,\n0.5]. Anything else?"
    assert corners(parse_boxes(answer, llava_box, whole(8, 8))) == [[2, 2, 4, 4]]


def test_numbers_of_one_decimal_and_none(llava_box):
    assert corners(parse_boxes("[0, 0.5, 1, 1.0]", llava_box, whole(8, 8))) == [[0, 4, 8, 8]]


@pytest.mark.parametrize(
    "answer",
    [
        "[0.1, 0.2, 0.3]",
        "[0.1, 0.2, 0.3, 0.4, 0.5]",
        "[0.1, 0.2, 0.3, 0.4",
        "[0.1 0.2 0.3 0.4]",
        "[a, b, c, d]",
        "[0.1, 0.2, 0..3, 0.4]",
        "[nan, 0.2, 0.3, 0.4]",
        "[.1, .2, .3, .4]",
    ],
)
def test_malformed_answer_is_reported(llava_box, answer):
    parsed = parse_boxes(answer, llava_box, whole(100, 100))
    assert parsed.boxes == ()
    assert parsed.problems == (f"malformed box {answer}",)


@pytest.mark.parametrize("answer", ["", "I see no mug.", "0.1, 0.2, 0.3, 0.4"])
def test_answer_without_a_box_is_reported(llava_box, answer):
    parsed = parse_boxes(answer, llava_box, whole(100, 100))
    assert parsed.boxes == ()
    assert parsed.problems == ("the answer holds no box",)


def test_malformed_box_beside_a_good_one_is_reported(llava_box):
    parsed = parse_boxes("[0.0, 0.0, 0.5, 0.5] and [0.1, 0.2]", llava_box, whole(8, 8))
    assert corners(parsed) == [[0, 0, 4, 4]]
    assert parsed.problems == ("malformed box [0.1, 0.2]",)


def test_huge_numbers_do_not_break(llava_box):
    parsed = parse_boxes(f"[0, 0, {'9' * 400}, 1]", llava_box, whole(10, 10))
    assert corners(parsed) == [[0, 0, 10, 10]]


def test_the_copied_pattern_wants_four_numbers(llava_box):
    assert re.compile(llava_box.pattern).groups == 4


def test_clip_keeps_a_box_inside():
    assert clip_box([1.5, 2, 3, 4], 10, 10) == box(1.5, 2, 3, 4)


def test_clip_gives_nothing_for_a_box_that_only_touches():
    assert clip_box([10, 0, 12, 5], 10, 10) is None
    assert clip_box([0, -5, 5, 0], 10, 10) is None


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (box(0, 0, 10, 10), box(0, 0, 10, 10), 1.0),
        (box(0, 0, 10, 10), box(5, 0, 15, 10), 50 / 150),
        (box(0, 0, 4, 4), box(1, 1, 3, 3), 4 / 16),
        (box(0, 0, 4, 2), box(2, 1, 6, 3), 2 / 14),
        (box(0, 0, 4, 4), box(4, 0, 8, 4), 0.0),  # share an edge
        (box(0, 0, 4, 4), box(5, 5, 8, 8), 0.0),  # apart both ways: no product of negatives
        (box(0, 0, 4, 4), box(2, 9, 6, 12), 0.0),
    ],
)
def test_iou(a, b, expected):
    assert iou(a, b) == pytest.approx(expected)
    assert iou(b, a) == pytest.approx(expected)


def test_area():
    assert box(1, 2, 4, 7).area == 15


def test_a_box_is_its_four_numbers():
    found = Box(1.0, 2.0, 4.0, 6.0)
    assert found == (1.0, 2.0, 4.0, 6.0)
    assert json.loads(json.dumps(found)) == [1.0, 2.0, 4.0, 6.0]
    assert (found.x1, found.area) == (4.0, 12.0)
    assert repr(found) == "Box(x0=1.0, y0=2.0, x1=4.0, y1=6.0)"
