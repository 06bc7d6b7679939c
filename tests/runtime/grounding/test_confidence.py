"""How sure a model was: which tokens count, and what their probabilities come to."""

import math

import numpy as np
import pytest

from gap_runtime.grounding.confidence import find_digits, find_probability, score_answer

PIECES = ["It ", "is ", "at ", "3", "[", "0.", "2", "5", ", 0.", "5,", "0.7,0.9", "]", " 4"]
SAYS = "It is at 3[0.25, 0.5,0.7,0.9] 4"


def decode(token_ids):
    return "".join(PIECES[token] for token in token_ids).strip()


def test_probability_is_the_softmax():
    logits = np.array([0.0, 1.0, 1000.0, 999.0], np.float32)
    assert find_probability(logits, 2) == pytest.approx(1 / (1 + math.exp(-1)), rel=1e-6)
    assert find_probability(logits, 3) == pytest.approx(1 / (1 + math.exp(1)), rel=1e-6)
    assert find_probability(logits, 0) == 0.0


def test_only_digits_inside_a_box_count(llava_box):
    token_ids = list(range(len(PIECES)))
    assert decode(token_ids) == SAYS
    # Not the 3 before it, the brackets, the comma, nor the 4 behind it. "0." holds a digit.
    assert find_digits(token_ids, decode, llava_box) == [5, 6, 7, 8, 9, 10]


def test_score_is_the_geometric_mean_of_the_digits(llava_box):
    token_ids = list(range(len(PIECES)))
    probabilities = [0.1] * len(PIECES)
    for place, value in zip([5, 6, 7, 8, 9, 10], [1.0, 0.5, 0.25, 1.0, 0.5, 1.0], strict=True):
        probabilities[place] = value
    found = score_answer(token_ids, probabilities, decode, llava_box)
    assert found == pytest.approx((0.5 * 0.25 * 0.5) ** (1 / 6))


@pytest.mark.parametrize("token_ids", [[], [0, 1, 2], [3, 12], [4, 11]])
def test_an_answer_without_a_box_has_no_score(token_ids, llava_box):
    assert score_answer(token_ids, [1.0] * len(token_ids), decode, llava_box) == 0.0


def test_a_probability_that_vanished_is_no_error(llava_box):
    assert 0.0 <= score_answer([4, 6, 11], [1.0, 0.0, 1.0], decode, llava_box) < 1e-20
