"""Anybody's regular expression means what `re` reads in it, and ends."""

import dataclasses
import json
import re
import time
import warnings

import pytest

from gap_runtime.bundle.bundle import Bundle
from gap_runtime.errors import PatternError
from gap_runtime.evaluation.protocol import find_first
from gap_runtime.grounding.confidence import find_digits
from gap_runtime.pictures.boxes import PictureFrame, find_attempts, parse_boxes
from gap_runtime.records import patterns
from gap_runtime.records.patterns import Matcher, count_groups

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
ANGLE = r"\s*<\s*(\d+)\s*>"
SIZE = r"\s*(\d+(?:\.\d+)?)\s*"
SHIPPED = {
    # As the families write them: (attempt, pattern).
    "fractions": (r"\[[^\[\]]*\]?", rf"\[{NUMBER},{NUMBER},{NUMBER},{NUMBER}\]"),
    "internvl": (r"\[[^\[\]]+\]?", rf"\[{NUMBER},{NUMBER},{NUMBER},{NUMBER}\]"),
    "minigpt": (r"\{[^{}]*\}?", rf"\{{{ANGLE * 4}\s*\}}"),
    "qwen": (
        r'"bbox_2d":\s*\[[^\[\]]*\]?',
        rf'"bbox_2d":\s*\[{SIZE},{SIZE},{SIZE},{SIZE}\]',
    ),
}
PIECES = st.sampled_from(
    (
        *("[0.1, 0.2, 0.3, 0.4]", "{<1><2><3><4>}", '"bbox_2d": [1, 2, 3, 4]', "\u0663"),
        *('"bbox_2d":', "[", "]", "{", "}", "<", ">", ",", " ", "\n", "\u3000", "-", ".", "1"),
    )
)
# The four separators are space to `re` alone.
OTHERS = st.text(st.characters(exclude_characters="\x1c\x1d\x1e\x1f"), max_size=6)
ANSWERS = st.lists(PIECES | OTHERS, max_size=14).map("".join)
SLOW = r"(?:\w*)*$|\["


@pytest.mark.parametrize("name", SHIPPED)
@hypothesis.given(answer=ANSWERS)
def test_shipped_patterns_find_what_re_finds(name, answer):
    attempt, pattern = SHIPPED[name]
    matcher = Matcher()
    spans = list(matcher.find_all(attempt, answer))
    assert spans == [found.span() for found in re.finditer(attempt, answer)]
    for text in (answer, *(answer[begin:end] for begin, end in spans)):
        found = re.fullmatch(pattern, text)
        assert matcher.match_whole(pattern, text) == (found and found.groups())


ATOMS = (
    "a",
    "b",
    ".",
    "[ab]",
    "[^b]",
    "[{e]",
    r"\d",
    r"\{",
    "{",
    "{e}",
    "{}",
    "{1",
    "}",
    "$",
    "^",
)
REPEATS = ("", "", "", "*", "+?", "{2}", "{,2}", "{1,}", "?")
PARTS = st.tuples(
    st.sampled_from(("", "(", "(?:", "(?=", "|")),
    st.sampled_from(ATOMS),
    st.sampled_from(REPEATS),
    st.sampled_from(("", "", ")")),
).map("".join)


@hypothesis.given(
    pattern=st.lists(PARTS, min_size=1, max_size=4).map("".join),
    text=st.text("ab1{e}\n", max_size=12),
)
def test_any_pattern_means_what_re_reads(pattern, text):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compiled = re.compile(pattern)
        except re.error:
            assert count_groups(pattern) is None
            return
    if count_groups(pattern) is None:
        # Two syntaxes in one: refused, as no two readers would agree.
        return
    assert count_groups(pattern) == compiled.groups
    found = list(Matcher().find_all(pattern, text))
    assert found == [each.span() for each in compiled.finditer(text)]


@pytest.mark.parametrize(
    "text",
    ["", "(", "a" * 501, "(?x)a{ 9 }", "[[:alpha:]]", "a{1000}" * 2, r"\p{L}", "a**"],
)
def test_what_is_no_pattern_of_both_is_refused(text):
    assert count_groups(text) is None
    with pytest.raises(PatternError):
        Matcher().match_whole(text, "a")


def test_a_matcher_has_one_time_for_all():
    matcher = Matcher(0.05)
    started = time.process_time()
    slow = matcher.find_all(SLOW, "a" * 8000 + "!")
    with pytest.raises(PatternError, match="is not done with a text of 8,001 characters after"):
        list(slow)
    for _ in range(100):
        with pytest.raises(PatternError):
            matcher.match_whole("a", "a")
    assert time.process_time() - started < 2


def test_every_reader_of_answers_ends(llava_box, monkeypatch):
    monkeypatch.setattr(patterns.Matcher.__init__, "__defaults__", (0.02,))
    answer, picture = "a" * 8000 + "! [1, 1, 1, 1]", PictureFrame.whole((8, 8))
    slow = dataclasses.replace(llava_box, attempt=SLOW)
    readers = (
        lambda: find_attempts(answer, slow),
        lambda: parse_boxes(answer, slow, picture),
        lambda: find_first(answer, slow),
        lambda: find_digits([1], lambda _: answer, slow),
        lambda: find_attempts(
            "[" + answer, dataclasses.replace(llava_box, pattern=rf"\[{SLOW[:-3]}", attempt=".*")
        ),
    )
    for reader in readers:
        with pytest.raises(PatternError, match="the regular expression"):
            reader()


def test_a_bundle_with_a_slow_pattern_is_refused_in_one_line(
    make_bundle, make_samples, manifest, monkeypatch
):
    monkeypatch.setattr(patterns.Matcher.__init__, "__defaults__", (0.05,))
    folder = make_bundle(**make_samples(manifest))
    path = folder / "manifest.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["box"]["attempt"] = SLOW
    data["reference"]["samples"][0]["answer"] = "a" * 9000 + "!"
    path.write_text(json.dumps(data), encoding="utf-8")
    started = time.process_time()
    with pytest.raises(PatternError, match=r"manifest\.json: the regular expression") as caught:
        Bundle.open(folder)
    assert caught.value.exit_code == 4
    assert time.process_time() - started < 2
