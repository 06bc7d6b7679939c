r"""How much a regular expression can make a library try, told from its form alone.

For expressions that a library runs itself, without a time limit: those of a `tokenizer.json`, by
Oniguruma in its Ruby syntax. Python's lock is held meanwhile, so that nothing here could end it.

Told is a number of tries that no text of some length takes more of, for a library that tries all
ways in turn and remembers none. Expressions are read as far as that needs: what a character class
holds is no matter. What repeats something that can match in more than one way takes without end if
anything has to follow, unless it repeats it only a few times.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Final, NoReturn

from gap_runtime.errors import PatternError

LONGEST: Final = 20_000
"""Characters of an expression. Published ones name a language's letters one by one."""
_DEEPEST: Final = 100
_TIMES: Final = re.compile(r"\{(?:(\d{1,6})(,?)(\d{1,6})?|,(\d{1,6}))\}")
_FLAGS: Final = re.compile(r"\?([a-zA-Z-]*)([:)])")
_LOOKS: Final = ("?=", "?>", "?!", "?<=", "?<!")
_NAME: Final = re.compile(r"\?(?:<[^=!>][^>]*>|'[^']*')")
_NAMED_CLASS: Final = re.compile(r"\[:\^?\w+:\]")
_ESCAPE: Final = re.compile(
    r"\\(?:[pP]\{[^}]*\}|x\{[^}]*\}|x[0-9a-fA-F]{1,2}|u[0-9a-fA-F]{4}|.)", re.DOTALL
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """Tries of a part at one place of the text.

    `first` until it matches, `fail` until it is given up where it does not, 0 for what always
    matches, `every` for all its `ways`, one after another. It `takes` so many characters at least.
    """

    first: float
    fail: float
    every: float
    ways: float
    takes: float
    is_choice: bool = False


_ONE: Final = _Work(first=1, fail=1, every=1, ways=1, takes=1)
_PLACE: Final = _Work(first=1, fail=1, every=1, ways=1, takes=0)
_NOTHING: Final = _Work(first=1, fail=0, every=1, ways=1, takes=0)


def count_tries(pattern: str, length: int) -> float:
    """The most tries of a search through all of a text; infinite where only the text ends them.

    Args:
        pattern: In Oniguruma's Ruby syntax, of which the library has taken it.
        length: Characters of the text.

    Raises:
        PatternError: It has something that this cannot read: references to groups, conditions,
            verbose syntax.
    """
    found = _read(pattern, length)
    # What begins where the text does fails at once elsewhere.
    is_begun = pattern.startswith(r"\A") and pattern[2:3] not in {"?", "*", "+", "{"}
    places = 1 if is_begun and not found.is_choice else length
    return length + places * max(found.first, found.fail)


def count_least(pattern: str) -> int:
    """Characters that a match has at least, or fewer.

    Raises:
        PatternError: As of `count_tries`.
    """
    return int(_read(pattern, 1).takes)


def _read(pattern: str, length: int) -> _Work:
    if len(pattern) > LONGEST:
        raise PatternError(
            f"a regular expression of {len(pattern):,} characters, expected at most {LONGEST:,}"
        )
    reader = _Reader(pattern, length)
    found = reader.read_choice(0)
    if reader.at < len(pattern):
        reader.refuse("a bracket too many")
    return found


class _Reader:
    """Reads an expression from left to right."""

    def __init__(self, pattern: str, length: int) -> None:
        self.text, self.length, self.at = pattern, float(length), 0
        self.repeats = 0

    def refuse(self, why: str) -> NoReturn:
        """Raise the error about what is read."""
        raise PatternError(f"the regular expression {self.text!r:.80} has {why}; write it without")

    def takes(self, text: str) -> bool:
        """Whether that comes next, which is passed over then."""
        if not self.text.startswith(text, self.at):
            return False
        self.at += len(text)
        return True

    def read_choice(self, depth: int) -> _Work:
        """Ways one after another, up to the bracket that ends them."""
        if depth > _DEEPEST:
            self.refuse(f"more than {_DEEPEST} brackets in brackets")
        found = self._read_row(depth)
        while self.takes("|"):
            other = self._read_row(depth)
            found = _Work(
                first=max(found.first, found.fail + other.first),
                fail=found.fail + other.fail if found.fail and other.fail else 0,
                every=found.every + other.every,
                ways=found.ways + other.ways,
                takes=min(found.takes, other.takes),
                is_choice=True,
            )
        return found

    def _read_row(self, depth: int) -> _Work:
        parts: list[_Work] = []
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            parts.append(self._read_repeats(self._read_part(depth)))
        row = _NOTHING
        for part in reversed(parts):
            row = _follow(part, row)
        return row

    def _read_part(self, depth: int) -> _Work:
        if self.takes("("):
            return self._read_group(depth)
        if self.takes("^") or self.takes("$"):
            return _PLACE
        if self.takes("["):
            self._skip_class()
        elif self.text[self.at] == "\\":
            return self._read_escape()
        else:
            self.at += 1
        return _ONE

    def _read_escape(self) -> _Work:
        kind = self._take_escape()
        if kind in "123456789gk":
            self.refuse("a reference to a group")
        if kind == "X":
            # What looks like one character can be as long as the text.
            return _Work(first=self.length, fail=1, every=self.length, ways=1, takes=1)
        if kind == "R":
            return _Work(first=2, fail=2, every=2, ways=1, takes=1)
        return _PLACE if kind in "AbBzZGKyY" else _ONE

    def _take_escape(self) -> str:
        """Pass over an escape; the character that says which."""
        found = _ESCAPE.match(self.text, self.at)
        if found is None:
            self.refuse("a backslash at its end")
        self.at = found.end()
        return found[0][1]

    def _skip_class(self) -> None:
        """Pass over a class behind its first bracket, with classes in it."""
        depth = 1
        self._open_class()
        while depth:
            if self.at >= len(self.text):
                self.refuse("a class without an end")
            if self.text[self.at] == "\\":
                self._take_escape()
            elif named := _NAMED_CLASS.match(self.text, self.at):
                self.at = named.end()
            elif self.takes("["):
                depth += 1
                self._open_class()
            elif self.takes("]"):
                depth -= 1
            else:
                self.at += 1

    def _open_class(self) -> None:
        """A bracket that closes is a character where it comes first."""
        self.takes("^")
        self.takes("]")

    def _read_group(self, depth: int) -> _Work:
        """What stands between brackets, behind the first."""
        if self.takes("?#"):
            end = self.text.find(")", self.at)
            self.at = len(self.text) if end < 0 else end + 1
            return _NOTHING
        if flags := _FLAGS.match(self.text, self.at):
            if "x" in flags[1]:
                self.refuse("a flag x")
            self.at = flags.end()
            # `(?i)` makes a group of all that follows, its ways too.
            return self._close(depth) if flags[2] == ":" else self.read_choice(depth + 1)
        looks = next((sign for sign in _LOOKS if self.takes(sign)), None)
        named = None if looks else _NAME.match(self.text, self.at)
        if named is not None:
            self.at = named.end()
        elif looks is None and self.text.startswith(("?", "*"), self.at):
            self.refuse("a bracket of a rare kind")
        repeats = self.repeats
        inner = self._close(depth)
        if looks is None:
            return inner
        if looks == "?!":
            return _turned(inner, 1)
        if looks in {"?<=", "?<!"}:
            # What may have several lengths is looked for from every place before.
            is_fixed = inner.ways == 1 and self.repeats == repeats
            return _turned(inner, 1 if is_fixed else self.length)
        return replace(_alone(inner), takes=inner.takes if looks == "?>" else 0)

    def _close(self, depth: int) -> _Work:
        found = self.read_choice(depth + 1)
        if not self.takes(")"):
            self.refuse("a bracket without an end")
        return found

    def _read_repeats(self, part: _Work) -> _Work:
        """A part with all the signs behind it that repeat it."""
        while self.at < len(self.text):
            if times := _TIMES.match(self.text, self.at):
                self.at = times.end()
                least = int(times[1] or 0)
                exact = times[4] is None and not times[2]
                most = least if exact else float(times[4] or times[3] or math.inf)
                # `{3}?` may be none at all.
                least = 0 if self.takes("?") and exact else least
                part = self._repeat(part, least, most)
            elif self.text[self.at] in "*+?":
                sign = self.text[self.at]
                self.at += 1
                repeated = self._repeat(part, sign == "+", 1 if sign == "?" else math.inf)
                part = _alone(repeated) if self.takes("+") else repeated
                self.takes("?")
            else:
                break
        return part

    def _repeat(self, part: _Work, least: float, most: float) -> _Work:
        """A part so often, as many times as there are characters at most."""
        self.repeats += 1
        least, most = sorted((least, most))
        most = max(least, min(most, self.length))
        once = max(part.first, part.fail)
        if part.ways == 1:
            every, ways, fail = (most + 1) * part.every, most - least + 1, least * once
        else:
            every = part.every * _power(part.ways, most) * 2
            ways = _power(part.ways, most) * 2
            fail = part.every * _power(part.ways, least - 1) * 2 if least else 0
        first = most * part.first + once + fail
        return _Work(
            first=first,
            fail=0 if part.fail == 0 else fail,
            every=max(every, first),
            ways=ways,
            takes=least * part.takes,
        )


def _follow(part: _Work, rest: _Work) -> _Work:
    """A part and all that follows it, which is tried behind each way of the part that there is."""
    if rest.fail == 0:
        first, fail = part.first + rest.first, part.fail
    else:
        first = part.every + part.ways * rest.fail + rest.first
        fail = part.every + part.ways * rest.fail
    every = part.every + part.ways * rest.every
    return _Work(
        first=first,
        fail=fail,
        every=max(every, first),
        ways=part.ways * rest.ways,
        takes=part.takes + rest.takes,
    )


def _alone(part: _Work) -> _Work:
    """A part of which the first way is taken, and no other is tried later."""
    return replace(part, every=max(part.first, part.fail), ways=1)


def _turned(part: _Work, places: float) -> _Work:
    """A part looked for at some places, which matches where it is not there, or the like."""
    tries = max(part.first, part.fail, 1) * places
    return _Work(first=tries, fail=tries, every=tries, ways=1, takes=0)


def _power(base: float, exponent: float) -> float:
    try:
        return float(base**exponent)
    except OverflowError:
        return math.inf
