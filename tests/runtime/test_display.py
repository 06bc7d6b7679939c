"""What people see: tables lose nothing in a narrow window."""

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


def test_a_table_without_rows(capsys):
    display.print_table("a table", HEADER, [])
    assert "unparsable" in capsys.readouterr().out
