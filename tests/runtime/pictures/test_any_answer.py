"""Any text is an answer: the boxes in it are found, and nothing else, by any pattern."""

import dataclasses
from fractions import Fraction

import pytest

from gap_runtime.evaluation.protocol import find_first
from gap_runtime.pictures.boxes import PictureFrame, parse_boxes

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

READ_ONLY = hypothesis.settings(
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
SIZES = st.tuples(st.integers(1, 5000), st.integers(1, 5000))
NUMBERS = st.tuples(
    st.sampled_from(("", "", "", "-")), st.integers(0, 3), st.integers(0, 999)
).map(lambda parts: f"{parts[0]}{parts[1]}.{parts[2]:03d}")
BOXES = st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS)
WORDS = st.text(st.characters(exclude_characters="[]"), max_size=8)
ANSWERS = st.lists(st.tuples(WORDS, BOXES), max_size=4)
TEXTS = st.lists(
    st.text(max_size=12) | st.sampled_from(("[", "]", ",", "0.5", "-1", "9" * 400, "[0,0,1,1]")),
    max_size=12,
).map("".join)
PATTERNS = st.sampled_from(
    (
        r"\[(.*?),(.*?),(.*?),(.*?)\].*",
        r"(\[)?(x)?(y)?(z)?.*",
        r"(.)(.)(.)(.).*",
        r"\[(\d+),(\d+),(\d+),(\d+)\]",
        r"()()()().*",
    )
)


def expect(corners, size):
    """Corners in fractions of a picture, exactly; None where they span nothing inside it."""
    x0, y0, x1, y1 = (
        min(max(Fraction(text) * side, 0), side)
        for text, side in zip(corners, size * 2, strict=True)
    )
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


@READ_ONLY
@hypothesis.given(answer=ANSWERS, size=SIZES, end=WORDS)
def test_every_box_of_an_answer_is_found(llava_box, answer, size, end):
    spec = dataclasses.replace(llava_box, frame="original")
    text = "".join(f"{word}[{','.join(corners)}]" for word, corners in answer) + end
    found = parse_boxes(text, spec, PictureFrame.whole(size))
    wanted = [expect(corners, size) for _, corners in answer]
    right = [box for box in wanted if box is not None]
    assert len(found.boxes) == len(right)
    for box, exact in zip(found.boxes, right, strict=True):
        assert list(box) == pytest.approx(list(map(float, exact)), rel=1e-12, abs=1e-12)
    assert len(found.problems) == (wanted.count(None) if wanted else 1)
    first = find_first(text, spec)
    assert first == (tuple(map(float, answer[0][1])) if answer else None)


@READ_ONLY
@hypothesis.given(text=TEXTS, size=SIZES, pattern=st.none() | PATTERNS, shown=SIZES)
def test_any_text_and_pattern_give_boxes_inside_the_picture(llava_box, text, size, pattern, shown):
    spec = llava_box if pattern is None else dataclasses.replace(llava_box, pattern=pattern)
    for frame in ("original", "padded-square", "resized"):
        spec = dataclasses.replace(spec, frame=frame)
        found = parse_boxes(text, spec, PictureFrame.padded(size, shown))
        assert found.boxes or found.problems
        for box in found.boxes:
            assert 0 <= box.x0 < box.x1 <= size[0]
            assert 0 <= box.y0 < box.y1 <= size[1]
        find_first(text, spec)
