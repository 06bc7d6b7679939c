"""Sizes of boxes: what the last ones would give, whether it was right, and what is no box."""

import pytest

from gap_runtime.grounding.sizes import LastSizes

LLAVA = "[0.##, 0.##, 0.##, 0.##]"
PIXELS = "[###, ###, ###, ###]"


def learn(form, *answers, times=7):
    sizes = LastSizes(form)
    for _ in range(times):
        for answer in answers:
            sizes.keep(answer)
    return sizes


def test_the_end_is_where_the_last_sizes_put_it():
    sizes = learn(LLAVA, "[0.10, 0.10, 0.30, 0.50]")
    # 0.65 and 0.20 wide, 0.44 and 0.40 high.
    assert sizes.guess("[0.65, 0.44, 0.") == "8"
    assert sizes.guess("[0.65, 0.44, 0.85, 0.") == "8"
    assert sizes.guess("a cup at [0.05, 0.07, 0.") == "2"
    # In a second box too.
    assert sizes.guess("[0.1, 0.1, 0.3, 0.5]; [0.31, 0.44, 0.") == "5"


def test_numbers_with_the_same_text_around_each_are_told_apart():
    sizes = learn("{<##><##><##><##>}", "{<10><10><30><50>}")
    begun = ("<", "<65><", "<65><44><", "<65><44><85><")
    assert [sizes.guess("{" + each) for each in begun] == ["", "", "8", "8"]
    # By the height of three numbers, and not by the width of the last two.
    sizes = learn("{<##><##><##><##>}", "{<10><10><20><60>}")
    assert sizes.guess("{<10><10><20><") == "6"


def test_most_sizes_decide_and_the_second_side_goes_by_the_first():
    wide, tall = "[0.00, 0.00, 0.60, 0.10]", "[0.00, 0.00, 0.10, 0.60]"
    sizes = learn(LLAVA, wide, wide, tall, times=16)
    assert sizes.guess("[0.20, 0.20, 0.") == "8"
    assert sizes.guess("[0.20, 0.20, 0.81, 0.") == "3"
    assert sizes.guess("[0.20, 0.20, 0.31, 0.") == "8"


@pytest.mark.parametrize(("last", "digit"), [("0.10", "3"), ("0.12", "4")])
def test_of_sizes_that_are_as_frequent_the_last_one_decides(last, digit):
    sides = ["0.10", "0.12"] if last == "0.12" else ["0.12", "0.10"]
    sizes = learn(LLAVA, *(f"[0.00, 0.00, {side}, 0.10]" for side in sides), times=10)
    assert sizes.guess("[0.29, 0.20, 0.") == digit


@pytest.mark.parametrize("right", [5, 6])
def test_a_guess_is_made_once_six_would_have_been_right(right):
    """The first box is told by none."""
    sizes = learn(LLAVA, "[0.10, 0.10, 0.30, 0.50]", times=1 + right)
    assert bool(sizes.guess("[0.65, 0.44, 0.")) is (right == 6)


def test_who_was_wrong_lately_is_silent_and_speaks_again():
    sizes = learn(LLAVA, "[0.10, 0.10, 0.30, 0.50]", times=20)
    for number in range(11):
        sizes.keep(f"[0.00, 0.00, 0.{40 + number}, 0.{60 + number}]")
    assert sizes.guess("[0.11, 0.11, 0.") == ""
    for _ in range(60):
        sizes.keep("[0.10, 0.10, 0.30, 0.50]")
    assert sizes.guess("[0.11, 0.11, 0.") == "3"


def test_only_the_last_boxes_are_known():
    sizes = learn(LLAVA, "[0.10, 0.10, 0.30, 0.50]", times=100)
    for _ in range(48):
        sizes.keep("[0.10, 0.10, 0.90, 0.90]")
    assert len(sizes._boxes) == 48
    assert sizes.guess("[0.01, 0.11, 0.") == "8"


def test_pixels_have_as_many_digits_as_they_need():
    sizes = learn(PIXELS, "[10, 20, 60, 90]")
    assert sizes.guess("[70, 80, ") == "1"
    assert sizes.guess("[170, 80, 220, ") == "1"
    assert sizes.guess("[3, 4, ") == "5"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[",
        "[0.",
        "[0.65, 0.",
        "[0.65, 0.44",
        "[0.65, 0.44, ",
        "[0.65, 0.44, 0.8",
        "[0.65, 0.44, 0.85, 0.9",
        "[0.65, 0.44, 0.85, 0.91, 0.",
        "0.65, 0.44, 0.",
        "[0.65 0.44 0.",
        "[0.65, 0.44, 0.\n",
    ],
)
def test_elsewhere_nothing_is_likely(text):
    assert learn(LLAVA, "[0.10, 0.10, 0.30, 0.50]").guess(text) == ""


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "no ring in the picture",
        "[0.10, 0.10, 0.30",
        "[0.10, 0.10, 0.30, 0.",
        "[0.10, 0.10, 0.30, 0.5",
        "[0.1, , 0.3, 0.5]",
        "[" + "9" * 5000 + ", 0.1, 0.2, 0.3]",
        "[\u0661, \u0662, \u0663, \u0664]",
    ],
)
def test_what_is_no_box_is_not_known(answer):
    assert not learn(LLAVA, answer)._boxes


def test_numbers_of_a_phrase_are_no_box():
    form = "<ref>{phrase}</ref><box>[[###, ###, ###, ###]]</box>"
    sizes = learn(form, "<ref>page [1, 2, 3, 4]</ref><box>[[100, 200, 300, 500]]</box>")
    assert sizes._boxes[0] == (100, 200, 300, 500)
    # Without the words before its brackets, too.
    assert sizes.guess("[[150, 250, ") == ""
    assert sizes.guess("<box>[[150, 250, ") == "3"


@pytest.mark.parametrize(
    "form", [LLAVA, PIXELS, "[0##, 0##, 0##, 0##]", "[0.0##, 0.0##, 0.0##, 0.0##]"]
)
@pytest.mark.parametrize(
    "answer",
    [
        "[0.90, 0.90, 0.10, 0.10]",
        "[900, 900, 1, 1]",
        "[999999, 1, 2, 0.999999]",
        "[0, 0, 0, 0]",
        "[0.0, 0.0, 0.0, 0.0]",
        "[0.05, 0.05, 0.07, 0.07]",
    ],
)
def test_a_guess_is_a_digit_whatever_the_numbers(form, answer):
    sizes = learn(form, answer, times=20)
    for begun in ("[0.10, 0.10, ", "[0.10, 0.10, 0.05, ", "[10, 10, ", "[10, 10, 5, "):
        for lead in ("", "0", "0.", "0.0"):
            guess = sizes.guess(begun + lead)
            assert guess == "" or guess in "0123456789"


@pytest.mark.parametrize(
    "form", ["", "#", "yes or no", "[##, ##]", "[##, 0.##, ##, ##]", "[##, ##, ##, ##, ##]"]
)
def test_other_forms_are_never_guessed(form):
    assert learn(form, "[0.10, 0.10, 0.30, 0.50]").guess("[0.65, 0.44, 0.") == ""


def test_a_form_of_numbers_alone():
    assert learn("##,##,##,##", "10,10,30,50").guess("65,44,") == "8"
