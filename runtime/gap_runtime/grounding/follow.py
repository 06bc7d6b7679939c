"""What a phrase was answered last, as a draft of what it is answered next.

Frames of a video differ little, and so do the boxes in them: of `[0.12, 0.34, 0.56, 0.78]` most
digits are those of the frame before. So they are sent along, as far as they have been right at
their place lately; a decoder call verifies them as it does what the form forces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from tokenizers import Tokenizer

_KEPT_PHRASES: Final = 64
_FIRST_TRUST: Final = 2
_MOST_TRUST: Final = 4
"""What a place of an answer has at the beginning, and at most: so many misses on end, and it is
not drafted until it was right again."""
_SPACES: Final = "▁Ġ "
"""How tokenizers write the space before a word."""


@dataclass(slots=True)
class _Answered:
    """The last answer to a phrase, and the trust that its places have earned."""

    token_ids: list[int] = field(default_factory=list)
    trust: dict[int, int] = field(default_factory=dict)


class LastAnswers:
    """The last answer to each of some phrases, and which of its places stay as they are."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Know none yet."""
        self._tokenizer = tokenizer
        self._answered: dict[str, _Answered] = {}
        self._numbers: dict[int, bool] = {}

    def propose(
        self, phrase: str, token_ids: Sequence[int], forced: list[int], most: int
    ) -> list[int]:
        """What the form forces, and the last answer's tokens behind it where they agree with it.

        Args:
            phrase: What is asked.
            token_ids: The answer so far.
            forced: What the form forces behind it.
            most: There is room for so many tokens.
        """
        last = self._answered.get(phrase)
        begun = len(token_ids)
        if last is None or self._count_alike(last.token_ids, token_ids) < begun:
            return forced
        draft: list[int] = []
        for place, token in enumerate(last.token_ids[begun : begun + most], begun):
            is_forced = place < begun + len(forced)
            if not is_forced and not last.trust.get(place, _FIRST_TRUST):
                break
            draft.append(token)
        return draft if draft[: len(forced)] == forced else forced

    def keep(self, phrase: str, token_ids: Sequence[int]) -> None:
        """Take in a whole answer."""
        last = self._answered.pop(phrase, _Answered())
        # Up to where the two part, a draft of the last one could have been sent.
        compared = self._count_alike(last.token_ids, token_ids) + 1
        pairs = zip(last.token_ids[:compared], token_ids, strict=False)
        for place, (before, now) in enumerate(pairs):
            trust = last.trust.get(place, _FIRST_TRUST) + (1 if before == now else -1)
            last.trust[place] = max(0, min(trust, _MOST_TRUST))
        last.token_ids = list(token_ids)
        self._answered[phrase] = last
        if len(self._answered) > _KEPT_PHRASES:
            del self._answered[next(iter(self._answered))]

    def _count_alike(self, left: Sequence[int], right: Sequence[int]) -> int:
        """Tokens at the beginning of two answers that are the same, or numbers in both."""
        pairs = zip(left, right, strict=False)
        unlike = (
            place
            for place, (a, b) in enumerate(pairs)
            if a != b and not (self._is_number(a) and self._is_number(b))
        )
        return next(unlike, min(len(left), len(right)))

    def _is_number(self, token: int) -> bool:
        if token not in self._numbers:
            piece = self._tokenizer.id_to_token(token) or ""
            self._numbers[token] = piece.strip(_SPACES).isdecimal()
        return self._numbers[token]
