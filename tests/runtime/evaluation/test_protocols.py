"""Protocols on answers whose IoU is computed by hand."""

import dataclasses
import random
import re

import numpy as np
import pytest

from gap_runtime.errors import UnknownNameError
from gap_runtime.evaluation.protocol import (
    judge_singles,
    list_protocols,
    load_protocol,
    round_singles,
)
from gap_runtime.evaluation.protocols.internvl import find_parts
from gap_runtime.evaluation.protocols.qwen25 import resize_box
from gap_runtime.evaluation.protocols.shikra import pad_box
from gap_runtime.pictures.boxes import Box, PictureFrame, iou

# A wide picture: padded to a square of 200, it lies 50 pixels below the top.
SIZE = (200, 100)
whole = PictureFrame.whole
TRUE = (50.0, 25.0, 100.0, 75.0)
# The true box as fractions of the picture, and of the square.
OWN = "[0.25, 0.25, 0.5, 0.75]"
PADDED = "[0.25, 0.375, 0.5, 0.625]"

CASES = [
    # The frame: the same answer is right in one and half right in the other.
    ("frame", PADDED, 1.0, "box"),
    ("lmms-eval", PADDED, 0.5, "box"),
    ("lmms-eval", OWN, 1.0, "box"),
    ("internvl", OWN, 1.0, "box"),
    ("shikra", "[0.250,0.375,0.500,0.625]", 1.0, "box"),
    ("shikra", "[0.250,0.250,0.500,0.750]", 0.5, "box"),
    ("minigpt-v2", "{<25><25><50><75>}", 1.0, "box"),
    # Read in the square, the box is y 0 to 100 of the picture: cut, half of it is the true one.
    ("frame", OWN, 0.5, "box"),
    # Pixels counted: 51 * 26 of 51 * 51, where 50 * 25 of 50 * 50 would be half.
    ("minigpt-v2", "{<25><25><50><50>}", 1326 / 2601, "box"),
    ("minigpt-v2", "{<25><25><25><75>}", 51 / 2601, "degenerate"),
    # Thousandths, told by their sum.
    ("internvl", "[[250, 250, 500, 750]]", 1.0, "box"),
    ("internvl", "[1, 1, 1, 0.9]", 0.0, "degenerate"),
    ("lmms-eval", "[250, 250, 500, 750]", 0.0, "box"),
    # Reversed corners.
    ("frame", "[0.5, 0.375, 0.25, 0.625]", 0.0, "degenerate"),
    ("lmms-eval", "[0.5, 0.25, 0.25, 0.75]", 0.0, "degenerate"),
    ("internvl", "[0.5, 0.25, 0.25, 0.75]", 0.0, "degenerate"),
    ("shikra", "[0.500,0.375,0.250,0.625]", 0.0, "degenerate"),
    ("minigpt-v2", "{<50><25><25><75>}", 0.0, "degenerate"),
    # A negative area that cancels the true one: the script would divide by zero.
    ("lmms-eval", "[0.5, 0.25, 0.25, 0.75] [0, 0, 1, 1]", 0.0, "degenerate"),
    # Negative numbers: inside .25 * .5 of .6 * .5.
    ("lmms-eval", "[-0.1, 0.25, 0.5, 0.75]", 0.125 / 0.3, "box"),
    ("internvl", "[-0.1, 0.25, 0.5, 0.75]", 0.125 / 0.3, "box"),
    ("shikra", "[-0.1,0.375,0.5,0.625]", 0.0, "unparsable"),
    ("minigpt-v2", "{<-5><25><50><75>}", 0.0, "unparsable"),
    # Cut at the edge: x 0 to 100, of which half is the true box.
    ("frame", "[-0.1, 0.375, 0.5, 0.625]", 0.5, "box"),
    # Two boxes: the first one, or none.
    ("lmms-eval", f"{OWN} and [0, 0, 0.1, 0.1]", 1.0, "box"),
    ("internvl", f"{OWN} and [0, 0, 0.1, 0.1]", 1.0, "box"),
    ("shikra", "[0.250,0.375,0.500,0.625] [0.000,0.000,0.100,0.100]", 0.0, "unparsable"),
    ("shikra", "[0.250,0.375,0.500,0.625;0.000,0.000,0.100,0.100]", 0.0, "unparsable"),
    ("frame", f"{PADDED} [0, 0.3, 0.1, 0.4]", 0.0, "unparsable"),
    ("minigpt-v2", "{<25><25><50><75>}<delim>{<0><0><10><10>}", 1.0, "box"),
    # Text around the box.
    ("frame", f"It is at {PADDED}.", 1.0, "box"),
    ("lmms-eval", f"It is at {OWN}.", 1.0, "box"),
    ("internvl", f"It is at {OWN}.", 1.0, "box"),
    ("internvl", f"The [small] one: {OWN}", 0.0, "unparsable"),
    ("lmms-eval", f"The [small] one: {OWN}", 1.0, "box"),
    ("shikra", "Answer: [0.250,0.375,0.500,0.625] .", 1.0, "box"),
    ("minigpt-v2", "It is {<25><25><50><75>}", 0.0, "unparsable"),
    ("minigpt-v2", " { <25> <25> <50> <75> } <unk>", 1.0, "box"),
    ("minigpt-v2", "{<25><25><50><75>} it is", 1.0, "box"),
    # Ref-L4's: the first box, not cut: x -50 to 100, of which a third is the true box.
    ("ref-l4", PADDED, 1.0, "box"),
    ("ref-l4", f"It is [here] {PADDED} [0, 0.3, 0.1, 0.4]", 1.0, "box"),
    ("ref-l4", "[-0.25, 0.375, 0.5, 0.625]", 1 / 3, "box"),
    ("ref-l4", "[0.5, 0.375, 0.25, 0.625]", 0.0, "degenerate"),
    ("ref-l4", "[1" + "0" * 50 + ", 0.375, 0.25, 0.625]", 0.0, "unparsable"),
    # A point in the box: the centre of a box whose IoU is a third, whatever the order of corners.
    ("point", "[0.0, 0.375, 0.75, 0.625]", 1.0, "box"),
    ("point", "[0.75, 0.375, 0.0, 0.625]", 1.0, "degenerate"),
    ("point", "[0.5, 0.375, 0.75, 0.625]", 0.0, "box"),
    ("point", "click (0.375, 0.5)", 1.0, "box"),
    ("point", "[0.375,0.5]", 1.0, "box"),
    ("point", "(0.375, 0.3)", 0.0, "box"),
    # On the edge: x is 0.5 of 200.
    ("point", "(0.5, 0.5)", 1.0, "box"),
    ("point", "(0.501, 0.5)", 0.0, "box"),
    ("point", "at 0.375, 0.5", 0.0, "unparsable"),
    ("point", "(1" + "0" * 50 + ", 0.5)", 0.0, "unparsable"),
    # Qwen's frame: 200 x 100 becomes 196 x 112, the true box 49, 28, 98, 84.
    ("qwen25", '[{"bbox_2d": [49, 28, 98, 84], "label": "mug"}]', 1.0, "box"),
    # Pixels of the original: 48 * 47 of 50 * 50 and 49 * 56.
    ("qwen25", '{"bbox_2d": [50,25, 100,75]}', 2256 / 2988, "box"),
    # Taken for fractions of the original, 200 x 100: 49 * 56, of which all but 84 - 100 is in it.
    ("qwen25", '"bbox_2d": [0, 0, 1, 1]', 49 * 56 / 20000, "box"),
    ("qwen25", '"bbox_2d": [98, 28, 49, 84]', 0.0, "degenerate"),
    ("qwen25", '"bbox_2d": [49.0, 28.0, 98.0, 84.0]', 0.0, "unparsable"),
    ("qwen25", PADDED, 0.0, "unparsable"),
    ("qwen25", '"bbox_2d": [1' + "0" * 5000 + ", 28, 98, 84]", 0.0, "unparsable"),
    # Spaces, which one script does not expect.
    ("shikra", PADDED, 0.0, "unparsable"),
    # No box, no number, too many numbers.
    *((name, "", 0.0, "unparsable") for name in ("lmms-eval", "internvl", "shikra", "frame")),
    ("minigpt-v2", "", 0.0, "unparsable"),
    ("internvl", "[a, b, c, d]", 0.0, "unparsable"),
    ("internvl", "[nan, 0, 1, 1]", 0.0, "unparsable"),
    ("internvl", "[1e39, 0, 1, 1]", 0.0, "unparsable"),
    ("internvl", "[1e38, 0, 1e38, 1]", 0.0, "unparsable"),
    ("lmms-eval", "[0.1, 0.2, 0.3]", 0.0, "unparsable"),
    ("lmms-eval", "[0, 0, 0, 0]", 0.0, "degenerate"),
    ("frame", "[0, 0, 0, 0]", 0.0, "degenerate"),
    ("frame", "[0, 0, 0.4, 0.2]", 0.0, "degenerate"),
    ("minigpt-v2", "{<1000><0><10><10>}", 0.0, "unparsable"),
]


@pytest.mark.parametrize("protocol", list_protocols())
def test_every_protocol_has_cases(protocol):
    """A box that is right, and an answer without one."""
    found = {(iou > 0, status) for name, _, iou, status in CASES if name == protocol}
    assert {(True, "box"), (False, "unparsable")} <= found, (
        f"work out by hand what '{protocol}' says of a right box and of no box: add them to CASES"
    )


@pytest.mark.parametrize(("name", "answer", "iou", "status"), CASES)
def test_cases_by_hand(llava_box, name, answer, iou, status):
    found = load_protocol(name).judge(answer, whole(SIZE), TRUE, llava_box)
    assert found.iou == pytest.approx(iou, abs=1e-6)
    assert found.iou >= 0
    assert found.status == status


@pytest.mark.parametrize(
    ("name", "answer", "counts"),
    [
        ("frame", OWN, True),
        ("lmms-eval", PADDED, True),
        ("internvl", "[0.25, 0.25, 0.5, 0.5]", True),
        ("shikra", "[0.250,0.375,0.500,0.500]", False),
        ("minigpt-v2", "{<25><25><50><75>}", True),
    ],
)
def test_an_iou_of_just_a_half(llava_box, name, answer, counts):
    """Some scripts count it and others do not."""
    protocol = load_protocol(name)
    iou = protocol.judge(answer, whole(SIZE), TRUE, llava_box).iou
    assert (iou > 0.5 if protocol.STRICT else iou >= 0.5) == counts
    if name != "minigpt-v2":
        assert iou == 0.5


def test_a_half_by_counted_pixels_is_not_above_it(llava_box):
    # 0 to 99 and 0 to 49: 100 * 50 of 100 * 100 counted pixels.
    protocol = load_protocol("minigpt-v2")
    found = protocol.judge(
        "{<0><0><99><49>}", whole((100, 100)), (0.0, 0.0, 99.0, 99.0), llava_box
    )
    assert found.iou == 0.5
    assert protocol.STRICT


def test_ours_reads_the_frame_of_the_model(llava_box):
    own = dataclasses.replace(llava_box, frame="original")
    frame = load_protocol("frame")
    assert frame.judge(OWN, whole(SIZE), TRUE, own).iou == 1.0
    assert frame.judge(PADDED, whole(SIZE), TRUE, own).iou == 0.5


def test_a_square_picture_has_one_frame(llava_box):
    for name in ("frame", "lmms-eval", "internvl"):
        judged = load_protocol(name).judge(
            OWN, whole((100, 100)), (25.0, 25.0, 50.0, 75.0), llava_box
        )
        assert judged.iou == 1.0


def test_the_true_box_goes_through_text_of_three_decimals(llava_box):
    # 1 / 300 is 0.003, 2 / 300 is 0.007: an exact answer is not all of it.
    assert pad_box((1.0, 0.0, 2.0, 300.0), (300, 300)) == [0.003, 0.0, 0.007, 1.0]
    # An odd difference: half of it rounded down, as the picture is placed.
    assert pad_box((0.0, 0.0, 5.0, 8.0), (5, 8)) == [0.125, 0.0, 0.75, 1.0]
    # A box that rounding leaves without an area has no IoU; the script's would be no number.
    judged = load_protocol("shikra").judge(
        "[0.100,0.100,0.100,0.100]", whole((9999, 9999)), (1.0, 1.0, 2.0, 2.0), llava_box
    )
    assert (judged.iou, judged.status) == (0.0, "degenerate")


def test_the_bracket_search_finds_what_the_pattern_finds():
    pattern = re.compile(r"\[*\[(.*?),(.*?),(.*?),(.*?)\]\]*")
    rng = random.Random(0)
    hits = 0
    for _ in range(20_000):
        text = "".join(rng.choices("[],,1\n ", k=rng.randrange(18)))
        found = pattern.findall(text)
        hits += bool(found)
        assert find_parts(text) == (list(found[0]) if found else []), text
    assert hits > 300


def test_an_endless_answer_is_judged_at_once(llava_box):
    for name in list_protocols():
        for piece in ("[", ",", "[,", "[0.1, ", "{<1>", "[0.1,0.1,0.1,0.1;", "9", '"bbox_2d": [9'):
            load_protocol(name).judge(piece * 3000, whole(SIZE), TRUE, llava_box)


def test_stretching_both_boxes_changes_no_iou():
    """Qwen's frame differs from the original by the rounding of the true box, and no more."""
    rng = random.Random(2)
    for _ in range(200):
        size = (rng.randrange(200, 700), rng.randrange(200, 700))
        true, found = (
            Box(x, y, x + rng.randrange(60, 120), y + rng.randrange(60, 120))
            for x, y in [(rng.randrange(60), rng.randrange(60)) for _ in "ab"]
        )
        stretched = [round(value) for value in resize_box(found, size)]
        judged = load_protocol("qwen25").judge(
            f'{{"bbox_2d": {stretched}}}', whole(size), true, None
        )
        # Four edges, each off by at most half a pixel on both boxes.
        assert judged.iou == pytest.approx(iou(true, found), abs=0.06)


def test_protocols_by_name():
    assert list_protocols() == sorted(list_protocols())
    assert {"frame", "lmms-eval", "minigpt-v2", "ref-l4"} <= set(list_protocols())
    for name in list_protocols():
        protocol = load_protocol(name)
        assert protocol.SUMMARY
        assert protocol.FRAME != ""
        assert protocol.MEASURE in {"iou", "point"}
    with pytest.raises(UnknownNameError, match="did you mean lmms-eval"):
        load_protocol("lmms_eval")
    with pytest.raises(UnknownNameError, match=f"have {list_protocols()[0]}, "):
        load_protocol("../frame")


def test_arithmetic_of_32_bits_is_numpys():
    rng = random.Random(1)
    for _ in range(300):
        boxes = [
            round_singles(*(rng.choice((1, 640)) * rng.random() for _ in "xyxy")) for _ in "ab"
        ]
        a, b = (np.array(box, np.float32) for box in boxes)
        sides = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), np.float32(0))
        areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
        shared = sides[0] * sides[1]
        wanted = shared / (areas[0] + areas[1] - shared)
        assert wanted.dtype == np.float32
        assert judge_singles(*boxes).iou == max(float(wanted), 0.0)
