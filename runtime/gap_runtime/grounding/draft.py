"""What the form of an answer forces next, as tokens that a decoder call can verify.

A box is written in a fixed form: of `[0.12, 0.34, 0.56, 0.78]` only eight digits are news. A call
of several rows costs little more than one of a single row, so the rest is sent along as a draft:
a drafted token counts only where it is the most likely one, so drafts cost time at worst, and
never change a greedy answer. Of the eight, some can be guessed: two from the sizes of other boxes
(`sizes`), in a video all from the last answer (`follow`).

References:
    Leviathan et al., Fast Inference from Transformers via Speculative Decoding, arXiv:2211.17192.
    Here nothing is sampled, and the draft comes from the form instead of a smaller model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from tokenizers import Tokenizer

from gap_runtime.bundle.tensors import MOST_LOGITS
from gap_runtime.grounding.follow import LastAnswers
from gap_runtime.grounding.sizes import LastSizes
from gap_runtime.grounding.tokens import decode_tokens, encode_text

DIGIT: Final = "#"
"""A digit that is not known, in the form of an answer: `[0.##, 0.##, 0.##, 0.##]`."""
PHRASE: Final = "{phrase}"
"""The phrase that was asked for, in the form of an answer that repeats it."""
LONGEST: Final = MOST_LOGITS - 1
"""Tokens of a draft at most: they follow the last token that is known."""
_DIGITS: Final = "0123456789"
_OPENING: Final = "[{<("
_TRIES: Final = 2
"""Misses at one place of the form after which nothing is drafted there any more."""
_MOST_PLACES: Final = 1024
"""Places of which something is known: where digits are joined, each answer has some of its own."""
_TRUST: Final = 8
"""What a place can earn by drafts that were right: so many misses on end would cost it."""


class Drafter:
    """Drafts for the answers of one model; it learns which of them are refused."""

    def __init__(
        self, tokenizer: Tokenizer, form: str, before: str, *, follow: bool = False
    ) -> None:
        """Prepare for one model.

        Args:
            tokenizer: The model's.
            form: The usual answer, with DIGIT for a digit and PHRASE for the phrase.
            before: The end of the prompt, to which the answer is joined.
            follow: Draft the last answer to a phrase too, as far as the form leaves it open.
        """
        self._tokenizer = tokenizer
        self._form, self._filled, self._phrase = form, form, ""
        self._before = before
        self._before_ids = encode_text(tokenizer, before)
        self._before_text: str = self._decode(self._before_ids)
        self._digits = {tokenizer.token_to_id(digit) for digit in _DIGITS} - {None}
        self._gap = " "
        self._known: dict[tuple[int | str, ...], tuple[int, ...]] = {}
        self._trust: dict[tuple[int | str, ...], int] = {}
        self._asked = ""
        self._last = LastAnswers(tokenizer) if follow else None
        self._sizes = LastSizes(form)

    def about(self, phrase: str) -> Drafter:
        """This drafter, for an answer about a phrase, which the form may repeat."""
        self._asked = phrase
        if PHRASE in self._form and phrase != self._phrase:
            self._phrase, self._filled = phrase, self._form.replace(PHRASE, phrase)
            self._known = {}
        return self

    def propose(self, token_ids: Sequence[int], most: int = LONGEST) -> list[int]:
        """Tokens to expect behind an answer so far; none where nothing is known.

        Args:
            token_ids: The answer so far.
            most: There is room for so many; LONGEST is the limit in any case.
        """
        most = max(min(most, LONGEST), 0)
        forced = self._force(token_ids)[:most]
        draft = forced
        if self._last is not None:
            draft = self._last.propose(self._asked, token_ids, forced, most)
        if forced and len(draft) == len(forced):
            draft = self._guess(token_ids)[:most] or forced
        return draft

    def keep(self, token_ids: Sequence[int]) -> None:
        """Take in the whole answer to the phrase that this is about.

        Not for a request that is repeated to time it: its drafts would be right as no user's are.
        """
        if self._last is not None:
            self._last.keep(self._asked, token_ids)
        read = self._read(token_ids)
        # Digits that are joined with others are no tokens, and no guess of one can be sent.
        if read is not None and not self._digits.isdisjoint(token_ids):
            self._sizes.keep(read[1])

    def _force(self, token_ids: Sequence[int]) -> list[int]:
        """Tokens that the form forces behind an answer so far; none where it forces nothing."""
        if self._trust.get(self._place(token_ids), _TRIES) <= 0:
            return []
        return self._look_up(token_ids)

    def _guess(self, token_ids: Sequence[int]) -> list[int]:
        """What the form forces, and the digit behind it that the last boxes' sizes give."""
        read = self._read(token_ids)
        if read is None:
            return []
        rest = _find_rest(self._filled, read[1])
        digit = self._sizes.guess(read[1] + rest.partition(DIGIT)[0])
        return self._look_up(token_ids, digit) if digit else []

    def _look_up(self, token_ids: Sequence[int], digit: str = DIGIT) -> list[int]:
        """The draft behind an answer so far, which is the same at the same place of the form."""
        key = (*self._key(token_ids), digit)
        if key not in self._known:
            self._known[key] = self._draft(token_ids, digit)
            _forget(self._known)
        return list(self._known[key])

    def learn(self, token_ids: Sequence[int], accepted: int) -> None:
        """Take in how many tokens were accepted of the draft behind an answer so far."""
        if not self._force(token_ids):
            # The draft was the last answer's, which is learnt when the answer is whole.
            return
        place = self._place(token_ids)
        trust = self._trust.pop(place, _TRIES) + (1 if accepted else -1)
        self._trust[place] = min(trust, _TRUST)
        _forget(self._trust)

    def _place(self, token_ids: Sequence[int]) -> tuple[int | str, ...]:
        """What earns trust: the place in the form, which is the same for every phrase."""
        if PHRASE not in self._form:
            return self._key(token_ids)
        read = self._read(token_ids)
        left = 0 if read is None else len(_find_rest(self._filled, read[1]))
        behind = len(self._form.rpartition(PHRASE)[2])
        if left > behind + len(self._phrase):
            return ("before", self._gap, left - len(self._phrase))
        return (PHRASE, min(left, behind + 1))

    def _key(self, token_ids: Sequence[int]) -> tuple[int | str, ...]:
        """The place in the form: digits that are tokens of their own are all alike."""
        place = [DIGIT if token in self._digits else token for token in token_ids]
        return (self._gap, *place) if not place else tuple(place)

    def _draft(self, token_ids: Sequence[int], digit: str = DIGIT) -> tuple[int, ...]:
        """The tokens that are the same whatever digits come later.

        Args:
            token_ids: The answer so far.
            digit: The first of those digits, where there is a guess of it.
        """
        start = [*self._before_ids, *token_ids]
        read = self._read(token_ids)
        if read is None:
            return ()
        # The next answer of this model will begin as this one did.
        self._gap, answer = read
        said = self._gap + answer
        rest = _find_rest(self._filled, answer)
        if not rest or rest[0] == DIGIT:
            return ()
        rest = rest.replace(DIGIT, digit, 1)
        shared: list[int] | None = None
        for any_digit in _DIGITS:
            whole = self._before + said + rest.replace(DIGIT, any_digit)
            ids = encode_text(self._tokenizer, whole)
            if ids[: len(start)] != start:
                # The model wrote other tokens than its tokenizer does for the same text.
                return ()
            ids = ids[len(start) :]
            shared = ids if shared is None else _shared(shared, ids)
        return tuple(shared or ())

    def _read(self, token_ids: Sequence[int]) -> tuple[str, str] | None:
        """The space that an answer so far begins with, and its text; None where it cannot be told.

        An answer that has not begun will begin with the space that the last one had.
        """
        text = self._decode([*self._before_ids, *token_ids])
        if not text.startswith(self._before_text):
            return None
        said = text[len(self._before_text) :]
        answer = said.lstrip(" ")
        return (said[: len(said) - len(answer)], answer) if token_ids else (self._gap, "")

    def _decode(self, token_ids: Sequence[int]) -> str:
        return decode_tokens(self._tokenizer, token_ids, skip_special=False)


def _forget(places: dict[tuple[int | str, ...], Any]) -> None:
    """Drop the oldest place where there are more than are kept."""
    if len(places) > _MOST_PLACES:
        del places[next(iter(places))]


def _find_rest(form: str, text: str) -> str:
    """What the form still holds behind a text: one that fills it, or whose last words do.

    An answer may also leave out what the form has before its box, up to a bracket.
    """
    head = form.partition(DIGIT)[0]
    begins = {form[0], *_OPENING}
    forms = [form[place:] for place, letter in enumerate(head) if letter in begins]
    pairs = (
        (each, text[start:])
        for each in forms
        for start in (0, *(k for k, letter in enumerate(text) if k and letter == each[0]))
    )
    return next((rest for each, behind in pairs if (rest := _rest(each, behind))), "")


def _rest(form: str, text: str) -> str:
    """What the form still holds behind a text that has begun to fill it; nothing where it strays.

    Any digit stands for any other, and a number may have more or fewer of them than is usual.
    """
    place = 0
    for letter in text:
        if letter.isdigit():
            at_digit = place < len(form) and _is_digit(form[place])
            if at_digit:
                place += 1
            elif place == 0 or not _is_digit(form[place - 1]):
                return ""
            continue
        while place < len(form) and _is_digit(form[place]):
            place += 1
        if place == len(form) or form[place] != letter:
            return ""
        place += 1
    return form[place:]


def _is_digit(letter: str) -> bool:
    return letter == DIGIT or letter.isdigit()


def _shared(left: list[int], right: list[int]) -> list[int]:
    """The beginning that two lists have in common."""
    both = zip(left, right, strict=False)
    length = next((k for k, (a, b) in enumerate(both) if a != b), min(len(left), len(right)))
    return left[:length]
