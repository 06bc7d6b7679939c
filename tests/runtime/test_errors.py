"""Text that is printed: one printable line, whatever was put into it."""

import io
import sys

import pytest

from gap_runtime.display import Display
from gap_runtime.errors import LONGEST_LINE, GapError, InputError, show_line

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

ANY = st.text(st.characters(exclude_categories=()))


@hypothesis.given(text=ANY)
@hypothesis.example(text="\x1b[31mred\x1b[0m\nsecond\rline\u202edrow")
@hypothesis.example(text="\ud800")
@hypothesis.example(text="a" * 3000 + "\n")
def test_a_line_is_printable_and_short(text):
    line = show_line(text)
    assert line.isprintable()
    # Characters that are written out are at most ten for one.
    assert len(line) <= 10 * LONGEST_LINE
    line.encode()
    if text.isprintable() and len(text) <= LONGEST_LINE:
        assert line == text


@hypothesis.given(text=ANY)
def test_an_error_says_a_line(text):
    assert str(InputError(text)) == show_line(text)
    assert str(GapError(f"a{text}")).isprintable()


def test_the_end_of_a_long_message_says_what_to_do():
    message = str(InputError(f"x: {'y' * 100_000}; export again"))
    assert message.startswith("x: yyy")
    assert message.endswith("y; export again")
    assert len(message) == LONGEST_LINE


def test_what_people_see_is_escaped(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    display = Display()
    display.say("a\nb\x1b[2J [red]c[/red]")
    display.table("t", ("name",), [("\x1b[31m[bold]x",)])
    said = sys.stderr.getvalue()
    assert said.startswith("a\\nb\\x1b[2J [red]c[/red]\n")
    assert "\x1b" not in said
    assert "[bold]x" in said
