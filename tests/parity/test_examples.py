"""The examples do what they say."""

import contextlib
import importlib.util
import io
import os
import re
import shutil
import sys

import nbformat
import pytest
from nbclient import NotebookClient
from tools.places import ROOT

from gap_runtime import Box
from gap_runtime.pictures.boxes import iou

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


@pytest.mark.matrix
def test_the_notebook_runs(monkeypatch):
    """Every cell, in a kernel of its own: the pruned model's box is the whole one's."""
    notebook = nbformat.read(ROOT / "examples" / "export_and_ground.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    # What the package's name would be looked up by in a checkout that is not installed.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "runtime")]))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    client = NotebookClient(
        notebook,
        timeout=120,
        kernel_name="python3",
        resources={"metadata": {"path": str(ROOT / "examples")}},
    )
    client.execute()
    said = "\n".join(
        output.get("text", "") + output.get("data", {}).get("text/plain", "")
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if output.get("name") != "stderr"
    )
    assert "answers equal PyTorch's" in said
    assert "kept 64 of 256" in said
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 1
    whole, pruned = map(read_box, re.findall(r"Grounding\(.*?: (.*)", said))
    assert iou(whole, pruned) > 0.5


def read_box(text):
    """The first four numbers of a text as a box."""
    return Box(*(float(each) for each in re.findall(r"\d+\.\d+", text)[:4]))


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
