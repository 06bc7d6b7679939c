"""Text to token IDs and back: the one place where a bundle's tokenizer is asked.

A `tokenizer.json` may fail when it is read, and one that was read over a text: a word without a
token for unknown ones, a template with a token that it lacks. The library then raises a bare
Exception, or panics with what is no Exception at all. And it runs regular expressions of the file
with Python's lock held, where nothing could end one that takes without end: so they are looked at
when the file is read, and texts have a longest.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from threading import Lock
from types import TracebackType
from typing import Any, BinaryIO, Final

from tokenizers import Tokenizer

from gap_runtime.errors import BundleError, GapError, InputError, PatternError
from gap_runtime.records.pattern_work import count_least, count_tries

LONGEST_TEXT: Final = 4_000
"""Characters of a prompt."""
_LONGEST_ANSWER: Final = 100_000
"""Characters of tokens that are written; a token may be a sentence."""
_MOST_TRIES: Final = 1.6e9
"""Of all expressions together, for the longest text; published ones have 0.7e9 at most, and a text
that takes Oniguruma so many would take it 5 s. With the length of the text they grow by its square
at most, so that a phrase of a request is done in less than 2 s, whatever it is."""
_MOST_GROWTH: Final = 100
_WIDEST: Final = 18
"""Characters that one may become in a normal form of Unicode."""
_PANIC: Final = "PanicException"
_TRIED: Final = "A [0.12, 3]"
_TRIED_TOKENS: Final = 300
_STDERR: Final = 2
_DESCRIPTOR: Final = Lock()
"""Held by who has put another file in stderr's place; two would put back each other's."""


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


def try_tokenizer(tokenizer: Tokenizer) -> None:
    """Ask a tokenizer that was just read once, so that a panic that any text leads to comes here.

    Other failures are left to whoever asks in earnest. Padding, which may be of any length, is
    left out.
    """
    padding, truncation = tokenizer.padding, tokenizer.truncation
    tokenizer.no_padding()
    tokenizer.no_truncation()
    for special in (True, False):
        with contextlib.suppress(Exception):
            tokenizer.encode(_TRIED, add_special_tokens=special)
    for token in range(_TRIED_TOKENS):
        with contextlib.suppress(Exception):
            tokenizer.decode([token])
    if padding is not None:
        tokenizer.enable_padding(**padding)
    if truncation is not None:
        tokenizer.enable_truncation(**truncation)


class WithoutPanics:
    """Keeps what the library writes of a panic in the block from stderr: our line says it.

    It writes to the file descriptor itself. All else that is written there meanwhile comes behind.
    """

    __slots__ = ("_aside", "_usual")

    def __enter__(self) -> None:
        _DESCRIPTOR.acquire()
        self._aside: BinaryIO | None = None
        # There may be no room, or no stderr.
        with contextlib.suppress(OSError):
            aside = tempfile.TemporaryFile()
            self._usual = os.dup(_STDERR)
            os.dup2(aside.fileno(), _STDERR)
            self._aside = aside

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._aside is not None:
            os.dup2(self._usual, _STDERR)
            os.close(self._usual)
            with self._aside as aside, contextlib.suppress(OSError):
                aside.seek(0)
                said = aside.read()
                if said and not _has_panicked(error):
                    os.write(_STDERR, said)
        _DESCRIPTOR.release()


def _has_panicked(error: BaseException | None) -> bool:
    """Whether an error is a panic, or was made of one."""
    return error is not None and (type(error).__name__ == _PANIC or _has_panicked(error.__cause__))


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
