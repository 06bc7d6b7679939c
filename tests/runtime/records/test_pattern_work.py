"""What an expression may take is never less than what a plain backtracking matcher does take."""

import math
import time

import pytest

from gap_runtime.errors import PatternError
from gap_runtime.records.pattern_work import LONGEST, count_least, count_tries

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")


# Expressions as trees, and a matcher of them that counts each look at a character.
def write(tree):
    kind, *parts = tree
    if kind == "one":
        return parts[0]
    if kind == "row":
        return "".join(map(write, parts))
    if kind == "choice":
        return f"(?:{write(parts[0])}|{write(parts[1])})"
    if kind == "look":
        return f"({parts[0]}{write(parts[1])})"
    part, least, most, lazy = parts
    times = f"{{{least},{'' if most == math.inf else most}}}"
    return f"(?:{write(part)}){times}{'?' if lazy else ''}"


class Matcher:
    def __init__(self, text, limit):
        self.text, self.left = text, limit

    def search(self, tree):
        """Every place is tried, also behind one that matches, as a search for all does."""
        for at in range(len(self.text)):
            next(self.ways(tree, at), None)

    def ways(self, tree, at):
        kind, *parts = tree
        if kind == "one":
            self.left -= 1
            assert self.left >= 0
            if at < len(self.text) and parts[0] in {".", self.text[at]}:
                yield at + 1
        elif kind == "row":
            yield from self.row(parts, at)
        elif kind == "choice":
            for part in parts:
                yield from self.ways(part, at)
        elif kind == "look":
            sign, part = parts
            end = next(self.ways(part, at), None)
            if (end is None) == (sign == "?!"):
                yield end if sign == "?>" else at
        else:
            yield from self.repeat(*parts, at, 0)

    def row(self, parts, at):
        if not parts:
            yield at
            return
        for end in self.ways(parts[0], at):
            yield from self.row(parts[1:], end)

    def repeat(self, part, least, most, lazy, at, times):
        if lazy and times >= least:
            yield at
        if times < most:
            for end in self.ways(part, at):
                # What takes no character is not repeated.
                if end > at or times < least:
                    yield from self.repeat(part, least, most, lazy, end, times + 1)
        if not lazy and times >= least:
            yield at


ONE = st.tuples(st.just("one"), st.sampled_from(("a", "b", ".")))


def grow(trees):
    return st.one_of(
        st.tuples(st.just("row"), trees, trees),
        st.tuples(st.just("row"), trees, trees, trees),
        st.tuples(st.just("choice"), trees, trees),
        st.tuples(st.just("look"), st.sampled_from(("?=", "?!", "?>")), trees),
        st.tuples(
            st.just("repeat"),
            trees,
            st.sampled_from((0, 0, 1, 2)),
            st.sampled_from((2, 3, math.inf, math.inf)),
            st.booleans(),
        ),
    )


TREES = st.recursive(ONE, grow, max_leaves=8)
ENDED = st.tuples(st.just("row"), TREES, ONE)


@hypothesis.given(tree=TREES | ENDED, text=st.text("aab", min_size=1, max_size=12))
@hypothesis.settings(max_examples=300)
def test_no_text_takes_more(tree, text):
    told = count_tries(write(tree), len(text))
    hypothesis.assume(told < 200_000)
    Matcher(text, told).search(tree)


@hypothesis.given(tree=TREES, text=st.text("aab", max_size=8))
def test_no_match_is_shorter(tree, text):
    found = Matcher(text, 10**5).ways(tree, 0)
    least = count_least(write(tree))
    assert all(end >= least for _, end in zip(range(100), found, strict=False))


@pytest.mark.parametrize(
    ("pattern", "least"),
    [("a", 1), ("a?", 0), (r"\A\bab$", 2), ("(?=ab)c", 1), ("(?>ab)|c{3}", 2), (r"(?<=a)\R\X", 2)],
)
def test_the_shortest_match(pattern, least):
    assert count_least(pattern) == least


def test_the_matcher_of_this_test_counts():
    assert write(("row", ("repeat", ("one", "a"), 0, math.inf, False), ("one", "b"))) == (
        "(?:a){0,}b"
    )
    slow = ("row", *[("repeat", ("one", "a"), 0, math.inf, False)] * 3, ("one", "b"))
    counted = Matcher("a" * 12, 10**6)
    counted.search(slow)
    # By the number of ways to cut what is left into three, and one more look for each.
    assert 10**6 - counted.left > sum(math.comb(k + 2, 2) for k in range(1, 13))
    with pytest.raises(AssertionError):
        Matcher("a" * 12, 100).search(slow)


def test_each_of_many_ways_counts():
    assert count_tries("|".join("b" * 50), 100) >= 50 * 100


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+$", "(a|aa)+b", "(?:a*)*b", "(?:[ab]+\\s?)*c", "(?>x)(?:a|.)*b", "(?=(a+)+b)c"],
)
def test_repeats_of_what_has_several_ways_have_no_end(pattern):
    assert count_tries(pattern, 100) > 1e30
    assert count_tries(pattern, 10_000) == math.inf


@pytest.mark.parametrize(
    ("pattern", "power"),
    [
        ("a", 1),
        (r"[]a[:alpha:]&&[^b\]]]", 1),
        (r"\p{L}+", 2),
        (r"\s+(?!\S)", 2),
        ("(?:ab)+", 2),
        ("(?:a|b){3}c", 1),
        ("a*b*c", 3),
        ("(?:a*b*c|d)", 3),
        ("a*(?i)b*c|d", 3),
        ("a(?=b*c*d)", 3),
        ("(?<!a*)b", 3),
        ("(?<!a++b)b", 3),
        ("a*+b*+c", 2),
        ("(?#a*b*c*)d", 1),
        (r"\x{61}\u0061\x61*b", 2),
        ("(?<name>a*)b", 2),
        ("a{2}{3}b", 1),
        ("a{,3}?b", 1),
        (r"\Aa*b", 1),
        (r"\Aa*b|b", 2),
    ],
)
def test_tries_grow_with_a_power_of_the_text(pattern, power):
    grown = count_tries(pattern, 20_000) / count_tries(pattern, 10_000)
    assert math.log2(grown) == pytest.approx(power, abs=0.05)


@pytest.mark.parametrize(
    "pattern",
    [
        *(r"(a)\1", r"\k<a>", r"(?<a>b\g<a>?)", "(?x) a # (", "(?~a)", "(?(1)a|b)", "(*FAIL)"),
        *("(?{1})", "(", "a)", "[", "[a", "a\\", "(?", "(" * 200 + ")" * 200, "a" * (LONGEST + 1)),
    ],
)
def test_what_cannot_be_told_is_refused_in_one_line(pattern):
    with pytest.raises(PatternError) as caught:
        count_tries(pattern, 100)
    assert len(str(caught.value)) < 200


def test_long_expressions_are_told_at_once():
    started = time.process_time()
    count_tries("a?" * (LONGEST // 2), 10_000)
    count_tries("a|" * (LONGEST // 2), 10_000)
    assert time.process_time() - started < 1
