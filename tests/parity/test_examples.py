"""The examples do what they say."""

import contextlib
import importlib.util
import io
import shutil
import sys

import pytest
from tools.places import ROOT

PICTURE = ROOT / "refshapes" / "samples" / "test-006.png"
PHRASE = "the top yellow circle"


def run(name, *arguments, monkeypatch):
    """What an example prints."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        example.main()
    return said.getvalue()


def test_export_and_ground(tmp_path, monkeypatch):
    said = run("export_and_ground", "--out", tmp_path / "bundle", monkeypatch=monkeypatch)
    assert "answers equal PyTorch's" in said
    assert f"0% removed: Grounding('{PHRASE}': (" in said
    assert "kept 32 of 64" in said
    assert (tmp_path / "bundle.png").is_file()


def test_evaluate_a_csv(refshapes_bundle, tmp_path, monkeypatch):
    data = tmp_path / "mine.csv"
    shutil.copy(PICTURE, tmp_path / "photo.png")
    row = f"photo.png,{PHRASE},51,54,83,87"
    data.write_text(f"image,phrase,x0,y0,x1,y1\n{row}\n", encoding="utf-8")
    said = run("evaluate_csv", refshapes_bundle, data, monkeypatch=monkeypatch)
    lines = said.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("0% removed: 100.0% of 1 phrases right")


def test_every_example_is_run():
    names = {path.stem for path in (ROOT / "examples").glob("*.py")}
    # The last one with the service, in test_service.py.
    assert names == {"export_and_ground", "evaluate_csv", "ask_service"}


@pytest.mark.parametrize("name", ["export_and_ground", "evaluate_csv", "ask_service"])
def test_examples_say_how_they_are_started(name):
    text = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    assert f"python examples/{name}.py" in text
