"""How sure a model was of the boxes in an answer: the probabilities of the digits that it wrote.

The score of an answer is the geometric mean of the probabilities of all tokens that write a digit
of a box, each from the softmax over the whole vocabulary at the place where it was chosen. Commas,
brackets and words say nothing of where a thing is and are left out. It lies in [0, 1], and is 0
where the answer holds no digit of a box. It ranks answers of one model at one ratio; it is no
probability that a box is right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from gap_runtime.pictures.boxes import BoxFormat, find_attempts

_LEAST: Final = 1e-30


def find_probability(logits: np.ndarray, token: int) -> float:
    """Softmax of logits float [V] at one token."""
    values = np.exp(logits - logits.max(), dtype=np.float32)
    return float(values[token] / values.sum(dtype=np.float64))


def score_answer(
    token_ids: Sequence[int],
    probabilities: Sequence[float],
    decode: Callable[[list[int]], str],
    box: BoxFormat,
) -> float:
    """The score of an answer.

    Args:
        token_ids: Of the answer.
        probabilities: Of these tokens.
        decode: Text of the first tokens of the answer.
        box: How the model writes boxes.
    """
    digits = find_digits(token_ids, decode, box)
    if not digits:
        return 0.0
    logs = [math.log(max(probabilities[place], _LEAST)) for place in digits]
    return math.exp(sum(logs) / len(logs))


def find_digits(
    token_ids: Sequence[int], decode: Callable[[list[int]], str], box: BoxFormat
) -> list[int]:
    """Places of the tokens that write a digit inside what is meant as a box."""
    text = decode(list(token_ids))
    inside = {
        place
        for found in find_attempts(text, box)
        for place in range(found.begin, found.end)
        if text[place].isdigit()
    }
    if not inside:
        return []
    places, begin, last = [], 0, max(inside)
    for k in range(len(token_ids)):
        if begin > last:
            break
        end = len(decode(list(token_ids[: k + 1])))
        if any(place in inside for place in range(begin, end)):
            places.append(k)
        begin = max(begin, end)
    return places
