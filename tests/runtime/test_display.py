"""What people see: tables lose nothing in a narrow window."""

import re

import pytest

from gap_runtime import display

HEADER = ["protocol", "ratio", "phrases", "95 %", "mean IoU", "unparsable", "what is to be done"]
ROW = ["lmms-eval", 0.12345, 1000000, "94.1 % to 96.8 %", 0.914, 12345678, "export it again " * 9]


@pytest.mark.parametrize("columns", [20, 80, 160])
def test_no_cell_of_a_table_is_cut(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    display.print_table("a table", HEADER, [ROW])
    out = capsys.readouterr().out
    assert "…" not in out
    for cell in ("lmms-eval", "0.123", "1000000", "94.1 % to 96.8 %", "0.914", "12345678"):
        assert cell in out
    assert out.count("again") == 9
    for word in " ".join(HEADER).split():
        assert word in out


def test_progress_says_what_is_left_where_the_end_is_known(monkeypatch, capsys):
    monkeypatch.setattr(display, "_LINE_SECONDS", 0)
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(display.time, "monotonic", lambda: float(next(clock)))
    with display.Display().progress("asking") as show:
        show(None, "a camera")
        show(0.0, "one")
        show(0.25, "two")
        show(1.0, "last")
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == ["asking: a camera", "asking: 0%, one"]
    assert re.fullmatch(r"asking: 25%, two, \d min \d\d s left", said[2])
    assert said[3] == "asking: 100%, last, 0 s left"


def test_a_step_whose_library_shows_progress_is_told_at_its_end(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with display.Display().step("pulling", live=False):
        assert capsys.readouterr().err == ""
    assert "pulling" in capsys.readouterr().err
    with display.Display().step("tracing"):
        assert capsys.readouterr().err != ""


def test_a_table_without_rows(capsys):
    display.print_table("a table", HEADER, [])
    assert "unparsable" in capsys.readouterr().out


def test_a_line_is_shown_as_it_is(capsys):
    line = "the [red] mug :red_circle: " + "at the left " * 20
    display.Display().say(line)
    display.Display(quiet=True).say("nothing")
    assert capsys.readouterr() == ("", line + "\n")
