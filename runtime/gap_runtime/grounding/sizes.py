"""The sizes of the last boxes, as a guess of where the next one ends.

The first two numbers of a box are news. The other two are as far from them as its sides are long,
and parts on a belt, cups on a table or houses from above are about as large as those before them.
So where a draft comes to one of these two, the first digit is sent along: that which most of the
last boxes' sizes would give, as long as this has been right lately.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

_KEPT: Final = 48
_NEAREST: Final = 16
"""Boxes that tell the second side: those whose first side is the most alike."""
_WATCHED: Final = 16
_LEAST_RIGHT: Final = 6
"""So many of the last guesses that are watched must have been right. One that is saves a call of a
single row; one that is not costs a sixth row, 0.02 to 0.12 of that where it was measured."""
_IN_FORM: Final = re.compile(r"([0-9.]*)#+")
_BRACKETS: Final = re.compile(r"[^\w\s]*$")
_IN_ANSWER: Final = r"([0-9]{1,6}(?:\.[0-9]{1,6})?)"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where a number may be guessed: behind so many, in a text that ends as this matches."""

    known: int
    begins: re.Pattern[str]
    were_right: deque[bool] = field(default_factory=lambda: deque(maxlen=_WATCHED))

    @property
    def is_likely(self) -> bool:
        """Whether guesses have been right lately, sent or not."""
        return sum(self.were_right) >= _LEAST_RIGHT


class LastSizes:
    """The last boxes of a model, from the texts of its answers."""

    def __init__(self, form: str) -> None:
        """Know none yet.

        Args:
            form: The usual answer, with # for a digit. Unless it has four numbers of one kind,
                nothing is ever guessed.
        """
        self._lead, around = _read_form(form)
        self._whole = _compile(around) if around else None
        self._boxes: deque[tuple[float, ...]] = deque(maxlen=_KEPT)
        end = re.escape(self._lead) + r"\Z"
        # From the most numbers on: the last two of three may look like a box that begins.
        self._places = [
            _Place(known=known, begins=_compile(around[: known + 1], end))
            for known in (3, 2)
            if around
        ]

    def guess(self, text: str) -> str:
        """The first digit of a number that is news; nothing where none is likely.

        Args:
            text: An answer up to that digit. Only the third and fourth number of a box are likely.
        """
        for place in self._places:
            found = place.begins.search(text)
            if found:
                return self._vote(found.groups()) if place.is_likely else ""
        return ""

    def keep(self, answer: str) -> None:
        """Take in the first box of a whole answer."""
        found = self._whole.search(answer) if self._whole else None
        if not found:
            return
        numbers = found.groups()
        for place in self._places:
            digit = self._vote(numbers[: place.known])
            if digit:
                place.were_right.append(numbers[place.known].startswith(self._lead + digit))
        self._boxes.append(tuple(map(float, numbers)))

    def _vote(self, numbers: Sequence[str]) -> str:
        """The digit that most of the last boxes' sizes would give behind two or three numbers."""
        side = len(numbers) - 2
        begin = float(numbers[side])
        decimals = len(numbers[side].partition(".")[2])
        ends = (
            f"{begin + box[side + 2] - box[side]:.{decimals}f}" for box in self._choose(numbers)
        )
        place = len(self._lead)
        digits = Counter(
            end[place]
            for end in ends
            if end.startswith(self._lead) and end[place : place + 1].isdecimal()
        )
        return max(digits, key=digits.__getitem__, default="")

    def _choose(self, numbers: Sequence[str]) -> Iterable[tuple[float, ...]]:
        """The boxes that vote, the newest first: for the second side those of about its first."""
        boxes = reversed(self._boxes)
        if len(numbers) == 2:
            return boxes
        side = float(numbers[2]) - float(numbers[0])
        return sorted(boxes, key=lambda box: abs(box[2] - box[0] - side))[:_NEAREST]


def _compile(around: Sequence[str], end: str = "") -> re.Pattern[str]:
    """A pattern of numbers with these texts around them, and of an end behind the last text."""
    return re.compile(_IN_ANSWER.join(map(re.escape, around)) + end)


def _read_form(form: str) -> tuple[str, list[str]]:
    """What a number of the form has before its digits, and the texts around all four.

    Of the first text only the brackets: a model may leave out the words before them. Of the last
    one the first letter, which says that the number is whole.
    """
    numbers = list(_IN_FORM.finditer(form))
    leads = {number[1] for number in numbers}
    if len(numbers) != 4 or len(leads) != 1:
        return "", []
    starts = [number.start() for number in numbers]
    ends = [number.end() for number in numbers]
    brackets = _BRACKETS.search(form[: starts[0]])
    between = [form[end:start] for end, start in zip(ends, starts[1:], strict=False)]
    return leads.pop(), [brackets[0] if brackets else "", *between, form[ends[-1] :][:1]]
