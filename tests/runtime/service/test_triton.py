"""The model repository for Triton, run against a stand-in of its Python backend."""

import dataclasses
import importlib.util
import io
import json
import re
import sys
import types

import numpy as np
import pytest
from PIL import Image

from gap_runtime.cli.main import main

RATIO = 0.48123456789
"""Keeps eight of sixteen too."""


class Tensor:
    def __init__(self, name, values):
        self.name, self.values = name, values

    def as_numpy(self):
        return self.values


class Response:
    def __init__(self, output_tensors=(), error=None):
        self.outputs = {each.name: each.values for each in output_tensors}
        self.error = error


@pytest.fixture
def repository(make_bundle, manifest, answer_with, monkeypatch, tmp_path, capsys):
    """The folder of a model, and the model as Triton would load it."""
    answer_with(11)
    utils = types.ModuleType("triton_python_backend_utils")
    utils.Tensor, utils.InferenceResponse, utils.TritonError = Tensor, Response, str
    utils.get_input_tensor_by_name = lambda request, name: request.get(name)
    monkeypatch.setitem(sys.modules, utils.__name__, utils)
    first, second = manifest.ratios
    bundle = make_bundle(
        ratios=(dataclasses.replace(first, ratio=RATIO), second),
        stages=[
            dataclasses.replace(stage, ratio=RATIO) if stage.ratio == first.ratio else stage
            for stage in manifest.stages
        ],
    )
    assert main(["triton", str(bundle), "--out", str(tmp_path / "models")]) == 0
    folder = tmp_path / "models" / "bundle"
    assert capsys.readouterr().out == f"{folder}\n"
    spec = importlib.util.spec_from_file_location("model", folder / "1" / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    parameters = {"backend": {"string_value": "onnxruntime"}}
    model.initialize({"model_config": json.dumps({"parameters": parameters})})
    return folder, model


def make_request(**more):
    file = io.BytesIO()
    Image.new("RGB", (40, 20), (200, 200, 200)).save(file, "png")
    return {
        "IMAGE": Tensor("IMAGE", np.frombuffer(file.getvalue(), np.uint8)),
        "PHRASE": Tensor("PHRASE", np.array([b"the mug"], object)),
        **{name: Tensor(name, np.array(value)) for name, value in more.items()},
    }


def test_the_model_answers_as_its_config_says(repository):
    folder, model = repository
    config = (folder / "config.pbtxt").read_text(encoding="utf-8")
    outputs = re.search(r"output \[(.*?)\n\]", config, re.DOTALL)[1]
    names = re.findall(r'name: "(\w+)"', outputs)
    good, bad, other = model.execute(
        [
            make_request(),
            make_request(RATIO=np.array([0.3], np.float32)),
            make_request(RATIO=np.array([0.75], np.float32)),
        ]
    )
    assert list(good.outputs) == names == ["BOXES", "SCORE", "ANSWER"]
    assert good.outputs["BOXES"].tolist() == [[10, 0, 30, 10]]
    assert good.outputs["ANSWER"][0] == b"[0.25,0.25,0.75,0.50]"
    assert "no ratio 0.3" in bad.error
    assert other.error is None
    model.finalize()


def test_a_ratio_that_a_float32_holds_less_exactly(repository):
    _, model = repository
    (answer,) = model.execute([make_request(RATIO=np.array([RATIO], np.float32))])
    assert answer.error is None
    assert float(np.float32(RATIO)) != RATIO


def test_a_model_that_is_there_is_not_written_over(repository, tmp_path, capsys):
    folder, _ = repository
    bundle = str(tmp_path / "bundle")
    for out, said in ((folder.parent, "exists"), (tmp_path / "bundle" / "x", "which is read")):
        assert main(["triton", bundle, "--out", str(out)]) == 2
        assert said in capsys.readouterr().err
    assert (folder / "1" / "bundle" / "manifest.json").is_file()
