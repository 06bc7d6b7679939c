r"""Regular expressions that came in a file of a stranger, run with a time limit.

Python's `re` tries until it is done, and a pattern that repeats what is repeated may never be. The
library `regex` stops. So a pattern has to be one that `re` takes too, of which both say the same:
what `re` reads as itself and `regex` as syntax of its own (`{e}`) is written so that it stays
itself, and what cannot be (verbose patterns, POSIX classes) is refused. Of the characters that
`\d`, `\s` and `\w` stand for, `regex` knows a newer Unicode.
"""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Final

from gap_runtime.errors import PatternError

LONGEST_PATTERN: Final = 500
LIMIT_S: Final = 2.0
"""Time of the processor for all that is asked of one text; honest patterns take far below 1 ms."""
_MOST_COPIES: Final = 100_000
"""`regex` writes out what has to come so often, and no limit counts then: a million takes 1 s."""
_TIMES: Final = re.compile(r"\{(\d+)")
_PLAIN_BRACE: Final = re.compile(r"\\.|\{(?!(?:\d+(?:,\d*)?|,\d*)\})", re.DOTALL)
_OTHER_WORDS: Final = re.compile(r"\(\?\w*x|\[:\^?[\w-]*:\]", re.ASCII)


def count_groups(text: str) -> int | None:
    """Groups of a pattern; None where it is none that can be run."""
    try:
        return int(_compile(text).groups)
    except PatternError:
        return None


class Matcher:
    """Looks for patterns in one text; all that one matcher does shares a time limit.

    Args:
        limit_s: Seconds of the processor.
    """

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        self._limit_s = limit_s
        self._end_s = time.process_time() + limit_s

    def find_all(self, pattern: str, text: str) -> Iterator[tuple[int, int]]:
        """Where a pattern is found, begin and end, as `re.finditer` goes on.

        Raises:
            PatternError: It is no pattern, or the time is over.
        """
        compiled = _compile(pattern)
        try:
            for found in compiled.finditer(text, timeout=self._left()):
                yield found.span()
        except (TimeoutError, MemoryError) as error:
            raise self._slow(pattern, text) from error

    def match_whole(self, pattern: str, text: str) -> tuple[str | None, ...] | None:
        """The groups of a pattern that fits a whole text, or None.

        Raises:
            PatternError: It is no pattern, or the time is over.
        """
        compiled = _compile(pattern)
        try:
            found = compiled.fullmatch(text, timeout=self._left())
        except (TimeoutError, MemoryError) as error:
            raise self._slow(pattern, text) from error
        return None if found is None else found.groups()

    def _left(self) -> float:
        left = self._end_s - time.process_time()
        if left <= 0:
            raise TimeoutError
        return left

    def _slow(self, pattern: str, text: str) -> PatternError:
        return PatternError(
            f"the regular expression {pattern!r:.80} is not done with a text of {len(text):,} "
            f"characters after {self._limit_s:g} s; write it without repeats inside of repeats"
        )


@lru_cache(maxsize=256)
def _compile(text: str) -> Any:
    """A pattern of `regex`, which `re` takes too."""
    import regex  # noqa: PLC0415 - 40 ms

    if not 0 < len(text) <= LONGEST_PATTERN:
        raise PatternError(
            f"a regular expression of {len(text):,} characters, expected 1 to {LONGEST_PATTERN}"
        )
    if _OTHER_WORDS.search(text):
        raise PatternError(
            f"the regular expression {text!r:.80} has a flag x or a class like [:alpha:]; "
            "write it without"
        )
    if math.prod(max(int(found), 1) for found in _TIMES.findall(text)) > _MOST_COPIES:
        raise PatternError(
            f"the regular expression {text!r:.80} repeats too often; write {{0,}} or * for "
            "the least numbers"
        )
    same = _PLAIN_BRACE.sub(lambda found: "\\{" if found[0] == "{" else found[0], text)
    try:
        with warnings.catch_warnings():
            # What may mean something else one day.
            warnings.simplefilter("ignore")
            re.compile(text)
            return regex.compile(same)
    except (re.error, regex.error, OverflowError, RecursionError, ValueError) as error:
        raise PatternError(f"{text!r:.80} is no regular expression: {error}") from error
