"""What is wrong with a benchmark's command line is one line, exit code 2."""

import importlib
import sys

import pytest
from tools.places import ROOT

from benchmarks.command import run_benchmark, run_export
from gap_runtime.cli.options import run_command
from gap_runtime.errors import ConfigError

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
    ("runtime", ["--threads", "0"], 2, "'0': expected threads, 1 to 1024"),
    ("runtime", ["--rounds", "-1"], 2, "'-1': expected a number of 0 or more"),
    ("runtime", ["--limit", "inf"], 2, "'inf': expected seconds, more than 0"),
    ("runtime", ["--home", ""], 2, "'': expected a folder"),
    ("runtime", ["--home", "{file}/a/b"], 2, "file' is no folder"),
    ("runtime", ["--out", "{folder}"], 2, "no file, expected one to write"),
    ("runtime", ["--show", "--out", "{file}"], 2, "not valid JSON"),
    ("runtime", ["--show", "--out", "{rows}"], 2, "not the results of a benchmark; give another"),
    ("request", ["--bundle", "{none}"], 4, "none: no such bundle folder"),
    ("request", ["--bundle", "{folder}", "--picture", "{folder}/x.svg"], 2, "which is read; give"),
    ("request", ["--ratios", "0", "nan"], 2, "'nan': expected a ratio in [0, 1)"),
    ("service", ["{file}"], 4, "file: no such bundle folder"),
    ("service", ["{none}", "--requests", "1"], 2, "--requests 1: at least 2 have a tail"),
    ("service", ["{none}", "--clients", "10000"], 2, "--clients 10000: at most 1000"),
    ("pruning", ["--ratios", "0", "1"], 2, "'1': expected a ratio in [0, 1)"),
    ("pruning", ["--ratios", "0.5"], 2, "the first is what the others are compared with"),
    ("profile", ["{folder}", "--folded", "{folder}/x"], 2, "which is read; give --folded another"),
    ("profile", ["{none}"], 4, "none: no such bundle folder"),
    ("profile", ["{none}", "--slots", "x"], 2, "'x': expected a number of 0 or more"),
    ("scoring", ["--answers", "99999999999"], 2, "'99999999999': expected a number of 1 or more"),
    ("environments", ["../x"], 2, "unknown peer '../x'"),
    ("checkpoints", ["llava-1.5-7", "{none}"], 2, "unknown checkpoint 'llava-1.5-7'"),
    ("checkpoints", ["shikra-7b", "{none}", "--sparse"], 2, "files that cannot be without values"),
    ("shapes", ["x"], 2, "unrecognized arguments: x"),
    ("gpu_day.__main__", ["{full}"], 2, "full: holds something else; give a folder that is new"),
    ("gpu_day.__main__", ["{none}", "--layers", "0"], 2, "'0': expected a number of 1 or more"),
]
SCRIPTS = [
    ("results", ["{none}"], 2, "report.json: no such file"),
    ("results", ["{full}"], 2, "report.json: not the report of such a run (KeyError('cells'))"),
    ("figures", ["--out", "{file}"], 2, "file: no folder, expected one to write to"),
    ("figures", ["--sweep", "{full}", "--out", "{full}"], 2, "not the report of such a run"),
    ("demo", ["{none}", "{none}", "--samples", "{none}", "--out", "x.jpg"], 2, "a PNG file"),
    ("demo", ["{none}", "{none}", "--samples", "{none}", "--out", "x.png"], 4, "no such bundle"),
    ("effect", ["--ratio", "1"], 2, "ratio 1 is outside [0, 1)"),
    ("ablations", ["--write", "{file}"], 2, "lacks <!-- tables: made by refshapes/ablations.py"),
    ("train", ["--threads", "0"], 2, "--threads 0: expected 1 to 1024"),
    ("train", ["--steps", "0"], 2, "--steps 0: expected 1 or more"),
    ("train256", ["--threads", "10000"], 2, "--threads 10000: expected 1 to 1024"),
]


@pytest.fixture
def places(tmp_path):
    """Paths by the words that stand for them in the lines."""
    found = {name: tmp_path / name for name in ("none", "file", "folder", "rows", "full")}
    for name in ("folder", "full"):
        found[name].mkdir()
    found["file"].write_text("x", encoding="utf-8")
    found["rows"].write_text('{"rows": {"a": {}}}', encoding="utf-8")
    (found["full"] / "report.json").write_text("{}", encoding="utf-8")
    return found


@pytest.mark.parametrize(("name", "words", "code", "said"), LINES)
def test_what_is_wrong_is_a_line(monkeypatch, capsys, places, name, words, code, said):
    main = importlib.import_module(f"benchmarks.{name}").main
    monkeypatch.setattr(sys, "argv", [name, *(word.format(**places) for word in words)])
    with pytest.raises(SystemExit) as ended:
        run_benchmark(main)
    require_line(capsys, ended.value.code, code, said)


@pytest.mark.parametrize(("name", "words", "code", "said"), SCRIPTS)
def test_so_it_is_with_what_makes_pages(monkeypatch, capsys, places, name, words, code, said):
    """Scripts of refshapes/, which import each other by their bare names."""
    monkeypatch.syspath_prepend(ROOT / "refshapes")
    monkeypatch.chdir(places["folder"])
    words = [word.format(**places) for word in words]
    require_line(capsys, run_command(importlib.import_module(name).main, words), code, said)


def require_line(capsys, found, code, said):
    (line,) = capsys.readouterr().err.splitlines()
    assert found == code
    assert line.startswith("error: ")
    assert said in line


def test_an_export_that_fails_says_why(tmp_path):
    with pytest.raises(ConfigError, match=r"^gap-export .*none: .*no such"):
        run_export([str(tmp_path / "none"), "--out", str(tmp_path / "out")])
