"""Text to token IDs and back: the one place where a bundle's tokenizer is asked.

A `tokenizer.json` may fail when it is read, and one that was read over a text: a word without a
token for unknown ones, a template with a token that it lacks. The library then raises a bare
Exception, or panics with what is no Exception at all. And it runs regular expressions of the file
with Python's lock held, where nothing could end one that takes without end: so they are looked at
when the file is read, and texts have a longest.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Final

from tokenizers import Tokenizer

from gap_runtime.errors import BundleError, GapError, InputError, PatternError
from gap_runtime.records.pattern_work import count_least, count_tries

LONGEST_TEXT: Final = 10_000
"""Characters of a prompt."""
_LONGEST_ANSWER: Final = 100_000
"""Characters of tokens that are written; a token may be a sentence."""
_MOST_TRIES: Final = 1e10
"""Of all expressions together, for the longest text; published ones have 0.1e10, and a text that
takes Oniguruma so many would take it half a minute. With the length of the text they grow by its
square at most, so that a phrase of a request is done in less than 4 s, whatever it is."""
_MOST_GROWTH: Final = 100
_WIDEST: Final = 18
"""Characters that one may become in a normal form of Unicode."""
_PANIC: Final = "PanicException"


def encode_text(tokenizer: Tokenizer, text: str, *, special: bool = False) -> list[int]:
    """Token IDs of a text; `special` with what the tokenizer puts before and behind it.

    Raises:
        BundleError: The tokenizer fails over it.
        InputError: It is too long.
    """
    if len(text) * _WIDEST > LONGEST_TEXT:
        _require_short(text)
    with _asked(f"cannot read {text!r:.60}"):
        ids: list[int] = tokenizer.encode(text, add_special_tokens=special).ids
    return ids


def _require_short(text: str) -> None:
    length = len(text) if text.isascii() else len(unicodedata.normalize("NFKD", text))
    if length > LONGEST_TEXT:
        raise InputError(
            f"a prompt of {length:,} characters, at most {LONGEST_TEXT:,} are read; use a shorter "
            "phrase"
        )


def require_quick(tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer whose own regular expressions may take too long for some text.

    Raises:
        PatternError: They may, or one cannot be told.
    """
    growth = _require_quick(tokenizer.normalizer, LONGEST_TEXT, 1)
    _require_quick(tokenizer.pre_tokenizer, LONGEST_TEXT, growth)
    _require_quick(tokenizer.decoder, _LONGEST_ANSWER, 1)


def _require_quick(part: Any, length: int, growth: int) -> int:
    """How much longer the part makes a text, which the parts before made longer already."""
    tries = 0.0
    for each in _walk({} if part is None else json.loads(part.__getstate__())):
        pattern = each.get("pattern")
        expression = pattern.get("Regex") if isinstance(pattern, dict) else None
        if isinstance(expression, str):
            tries += count_tries(expression, length * growth)
            if tries > _MOST_TRIES:
                raise PatternError(
                    f"its regular expression {expression!r:.80} may take too long; write it "
                    "without repeats behind or inside of repeats"
                )
        growth *= _find_growth(each, expression)
        if growth > _MOST_GROWTH:
            raise PatternError(f"it makes texts over {_MOST_GROWTH} times as long as they are")
    return growth


def _walk(data: Any) -> Iterator[dict[str, Any]]:
    """Every part of a part, in the order in which they are used."""
    if isinstance(data, dict):
        yield data
        data = list(data.values())
    if isinstance(data, list):
        for each in data:
            yield from _walk(each)


def _find_growth(part: dict[str, Any], expression: object) -> int:
    """How many times as long a text may be behind a part that puts in another."""
    put = part.get("content") if part.get("type") == "Replace" else part.get("prepend")
    if not isinstance(put, str):
        return 1
    if part.get("type") != "Replace":
        # Before each text between two added tokens, which may be one character.
        return 1 + len(put)
    least = (
        count_least(expression)
        if isinstance(expression, str)
        else len(part["pattern"].get("String", ""))
    )
    # What takes nothing may be found between two characters.
    return max(1, math.ceil(len(put) / least)) if least else 1 + len(put)


def decode_tokens(tokenizer: Tokenizer, token_ids: Sequence[int], *, skip_special: bool) -> str:
    """Text of tokens.

    Raises:
        BundleError: The tokenizer fails over them.
    """
    with _asked(f"cannot write {len(token_ids)} tokens"):
        text: str = tokenizer.decode(list(token_ids), skip_special_tokens=skip_special)
    return text


def _asked(what: str) -> AskedOfTokenizer:
    return AskedOfTokenizer(
        lambda error: BundleError(f"the bundle's tokenizer {what} ({error}); export again")
    )


class AskedOfTokenizer:
    """Whatever the library raises in the block, as the error that `refuse` makes of it.

    An answer is decoded once for each of its tokens, so this is no generator, which takes as long
    as the tokenizer.
    """

    __slots__ = ("_refuse",)

    def __init__(self, refuse: Callable[[BaseException], GapError]) -> None:
        self._refuse = refuse

    def __enter__(self) -> None:
        return

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None or isinstance(error, GapError):
            return
        # A bare Exception, or a panic, which is none.
        if isinstance(error, Exception) or type(error).__name__ == _PANIC:
            raise self._refuse(error) from error
