"""What is wrong with a benchmark's command line is one line, exit code 2."""

import importlib
import sys

import pytest

from benchmarks.command import run_benchmark

LINES = [
    ("confidence", ["{none}", "--scenes", "0"], 2, "'0': expected a number of 1 or more"),
    ("confidence", ["{none}", "--scenes", "x"], 2, "'x': expected a number of 1 or more"),
    ("confidence", ["{none}", "--precision", "nan"], 2, "'nan' is no number in [0, 1]"),
    ("confidence", ["{none}", "--ratio", "half"], 2, "invalid float value: 'half'"),
    ("confidence", [], 2, "required: bundle"),
    ("confidence", ["{none}"], 4, "none: "),
    ("export", ["llava-1.5-7"], 2, "unknown checkpoint 'llava-1.5-7'"),
    ("export", ["--peers", "nobody"], 2, "unknown peer 'nobody'"),
    ("export", ["--peers", "--rounds", "-1"], 2, "'-1': expected a number"),
    ("export", ["--peers", "--limit", "nan"], 2, "'nan': expected seconds"),
    ("export", ["--peers", "--precision", "fp7"], 2, "invalid choice: 'fp7'"),
    ("memory", ["llava"], 2, "unknown model 'llava'"),
]


@pytest.mark.parametrize(("name", "words", "code", "said"), LINES)
def test_what_is_wrong_is_a_line(monkeypatch, capsys, tmp_path, name, words, code, said):
    main = importlib.import_module(f"benchmarks.{name}").main
    words = [word.format(none=tmp_path / "none") for word in words]
    monkeypatch.setattr(sys, "argv", [name, *words])
    with pytest.raises(SystemExit) as ended:
        run_benchmark(main)
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == code
    assert line.startswith("error: ")
    assert said in line
