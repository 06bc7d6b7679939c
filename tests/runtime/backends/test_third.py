"""A third backend is one folder and one target: nothing that is there has to know of it."""

import json
import shutil

import pytest

import gap_runtime.backends
from gap_runtime.bundle.bundle import Bundle
from gap_runtime.cli.main import main
from gap_runtime.grounding.grounder import Grounder
from gap_runtime.machines import target as targets
from gap_runtime.machines.target import load_target

CODE = '''"""The graphs on a machine that is made up."""

import numpy as np

OPENED = []


class Stage:
    def __init__(self, stage):
        self.stage = stage

    def run(self, inputs):
        return {s.name: np.zeros(s.shape, s.dtype) for s in self.stage.outputs}


class Decoder:
    def fit(self, rows):
        return rows

    def run(self, embeddings, position_ids, write_slot, logits_rows):
        logits = np.zeros((len(logits_rows), 12), np.float32)
        logits[:, 10] = 1
        return logits


def open_stage(bundle, stage, device):
    OPENED.append((stage.name, device))
    return Stage(stage)


def open_decoder(bundle, stage, device):
    OPENED.append((stage.name, device))
    return Decoder()


def find_missing(machine, target):
    wanted = target.packages["made_up"]
    return [f"needs made_up {wanted}; pip install 'gap-runtime[made-up]'"]
'''
TOML = """\
description = "a machine that is made up"
backend = "made_up"
dialect = "portable"
opset = 18
caches_in_place = false

[packages]
made_up = ">=2"
"""


@pytest.fixture
def third(tmp_path, monkeypatch):
    """The folder of a backend and the file of a target, beside those that are there."""
    home = tmp_path / "more" / "made_up"
    home.mkdir(parents=True)
    (home / "__init__.py").write_text(CODE, encoding="utf-8")
    places = gap_runtime.backends.__path__
    places.append(str(home.parent))
    folder = tmp_path / "targets"
    shutil.copytree(targets._FOLDER, folder)
    (folder / "made-up.toml").write_text(TOML, encoding="utf-8")
    monkeypatch.setattr(targets, "_FOLDER", folder)
    yield
    places.remove(str(home.parent))


@pytest.mark.usefixtures("third")
def test_doctor_asks_it_and_no_other(capsys):
    main(["doctor", "--json"])
    found = {each["target"]: each for each in json.loads(capsys.readouterr().out)["targets"]}
    assert found["made-up"]["missing"] == ["needs made_up >=2; pip install 'gap-runtime[made-up]'"]


@pytest.mark.usefixtures("third")
def test_doctor_looks_for_the_packages_that_its_target_names(tmp_path, monkeypatch, capsys):
    (tmp_path / "made_up.py").write_text('__version__ = "2.1"\n', encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    main(["doctor", "--json"])
    assert json.loads(capsys.readouterr().out)["machine"]["engines"]["made_up"] == "2.1"


@pytest.mark.usefixtures("third")
def test_its_target_says_what_it_can():
    found = load_target("made-up")
    assert (found.caches_in_place, found.takes_zero_points) == (False, True)


@pytest.mark.usefixtures("third")
def test_help_names_it_with_a_line_of_its_own(capsys):
    with pytest.raises(SystemExit):
        main(["ground", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for line in ("made_up: The graphs on a machine that is made up", "tensorrt: ", "onnxruntime:"):
        assert line in said


@pytest.mark.usefixtures("third")
def test_it_runs_graphs(make_bundle):
    bundle = Bundle.open(make_bundle(target=load_target("made-up")))
    answer = Grounder(bundle, "made_up:here").ground(_grey(), "the red mug")
    assert answer.boxes == ()
    opened = gap_runtime.backends.open_backend("made_up")[0].OPENED
    assert opened[-2:] == [("vision-8", "here"), ("decoder", "here")]


@pytest.mark.usefixtures("third")
def test_there_is_nothing_to_build(make_bundle, capsys):
    folder = make_bundle(target=load_target("made-up"))
    assert main(["build", str(folder)]) == 2
    said = capsys.readouterr().err
    assert "runs the graphs as they are with made_up" in said
    assert "--target datacenter-ada" in said
    assert "made-up," not in said.partition("name one of")[2]


@pytest.mark.usefixtures("third")
def test_nobody_advises_to_build_for_it(make_bundle, capsys):
    """It names packages, as a target that engines are built for does."""
    folder = make_bundle(target=load_target("standard"))
    main(["bench", str(folder), "--backend", "tensorrt"])
    said = capsys.readouterr().err
    assert "--target datacenter-ada" in said
    assert "made-up" not in said


def _grey():
    from PIL import Image

    return Image.new("RGB", (16, 16), (128, 128, 128))
