"""What a phrase was answered last, as a draft of what it is answered next.

Frames of a video differ little, and so do the boxes in them: of `[0.12, 0.34, 0.56, 0.78]` most
digits are those of the frame before. So they are sent along, as far as they have been right at
their place lately; a decoder call verifies them as it does what the form forces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tokenizers import Tokenizer

_MOST_PHRASES: Final = 64
"""Phrases whose last answers are kept."""
_BEGIN: Final = 2
_MOST: Final = 4
"""What a place has at the beginning, and at most: so many misses on end, and it is not drafted
until it was right again."""
_SPACES: Final = "▁Ġ "
"""How tokenizers write the space before a word."""


class LastAnswers:
    """The last answer to each of some phrases, and which of its places stay as they are."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Know none yet."""
        self._tokenizer = tokenizer
        self._answers: dict[str, list[int]] = {}
        self._trust: dict[int, int] = {}
        self._numbers: dict[int, bool] = {}

    def extend(
        self, phrase: str, token_ids: Sequence[int], forced: list[int], most: int
    ) -> list[int]:
        """A draft with the last answer's tokens behind what the form forces, where they agree.

        Args:
            phrase: What is asked.
            token_ids: The answer so far.
            forced: What the form forces behind it.
            most: There is room for so many tokens.
        """
        last = self._answers.get(phrase, [])
        begun = len(token_ids)
        if not self._are_alike(last[:begun], token_ids):
            return forced
        draft: list[int] = []
        for place, token in enumerate(last[begun : begun + most], begun):
            if place >= begun + len(forced) and not self._trust.get(place, _BEGIN):
                break
            draft.append(token)
        return draft if draft[: len(forced)] == forced else forced

    def keep(self, phrase: str, token_ids: Sequence[int]) -> None:
        """Take in a whole answer."""
        last = self._answers.pop(phrase, [])
        if self._are_alike(last, token_ids):
            for place, (before, now) in enumerate(zip(last, token_ids, strict=True)):
                trust = self._trust.get(place, _BEGIN) + (1 if before == now else -1)
                self._trust[place] = max(0, min(trust, _MOST))
        self._answers[phrase] = list(token_ids)
        if len(self._answers) > _MOST_PHRASES:
            del self._answers[next(iter(self._answers))]

    def _are_alike(self, left: Sequence[int], right: Sequence[int]) -> bool:
        """Whether two answers are the same but for their numbers."""
        return len(left) == len(right) and all(
            a == b or (self._is_number(a) and self._is_number(b))
            for a, b in zip(left, right, strict=True)
        )

    def _is_number(self, token: int) -> bool:
        if token not in self._numbers:
            piece = self._tokenizer.id_to_token(token) or ""
            self._numbers[token] = piece.strip(_SPACES).isdecimal()
        return self._numbers[token]
