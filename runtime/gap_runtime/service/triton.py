"""A bundle as a model repository of NVIDIA's Triton Inference Server, for its Python backend.

DIR/NAME/config.pbtxt      inputs and outputs
DIR/NAME/1/model.py        what Triton runs; it imports gap_runtime
DIR/NAME/1/bundle/         the bundle, by hard links where that can be
"""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Final

from gap_runtime.bundle.bundle import Bundle
from gap_runtime.bundle.files import require_apart
from gap_runtime.errors import ConfigError

_CONFIG: Final = """\
# Written by `gap-runtime triton` for the bundle {name}.
name: {quoted}
backend: "python"
max_batch_size: 0

input [
  {{ name: "IMAGE", data_type: TYPE_UINT8, dims: [ -1 ] }},
  {{ name: "PHRASE", data_type: TYPE_STRING, dims: [ 1 ] }},
  {{ name: "RATIO", data_type: TYPE_FP32, dims: [ 1 ], optional: true }}
]
output [
  {{ name: "BOXES", data_type: TYPE_FP32, dims: [ -1, 4 ] }},
  {{ name: "SCORE", data_type: TYPE_FP32, dims: [ 1 ] }},
  {{ name: "ANSWER", data_type: TYPE_STRING, dims: [ 1 ] }}
]
# One model answers one question at a time; more instances need as many times its memory.
instance_group [ {{ count: 1, kind: KIND_CPU }} ]
parameters: {{ key: "backend", value: {{ string_value: {backend} }} }}
"""
_MODEL: Final = '''\
"""Grounds phrases in Triton's Python backend. IMAGE are the bytes of a picture file."""

import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

from gap_runtime import Bundle, GapError, Grounder


class TritonPythonModel:
    """What Triton loads."""

    def initialize(self, args):
        """Open the bundle beside this file."""
        parameters = json.loads(args["model_config"])["parameters"]
        bundle = Bundle.open(Path(__file__).with_name("bundle"))
        # RATIO is a float32, which holds a third, say, less exactly than the bundle does.
        self.ratios = {np.float32(each.ratio): each.ratio for each in bundle.manifest.ratios}
        self.grounder = Grounder(bundle, parameters["backend"]["string_value"])

    def execute(self, requests):
        """An answer for every request, in order; what cannot be used is an error of its own."""
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        def read(name):
            tensor = pb_utils.get_input_tensor_by_name(request, name)
            return None if tensor is None else tensor.as_numpy()

        ratio = read("RATIO")
        if ratio is not None:
            given = np.float32(ratio.ravel()[0])
            ratio = self.ratios.get(given, float(given))
        try:
            found = self.grounder.ground(
                read("IMAGE").tobytes(),
                read("PHRASE").ravel()[0].decode("utf-8"),
                ratio=ratio,
            )
        except (GapError, UnicodeDecodeError) as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
        boxes = np.array(found.boxes, np.float32).reshape(-1, 4)
        return pb_utils.InferenceResponse(
            output_tensors=[
                pb_utils.Tensor("BOXES", boxes),
                pb_utils.Tensor("SCORE", np.array([found.score], np.float32)),
                pb_utils.Tensor("ANSWER", np.array([found.answer.encode("utf-8")], object)),
            ]
        )

    def finalize(self):
        """Give the model up."""
        self.grounder.close()
'''


def write_repository(bundle: Bundle, out: Path, backend: str) -> Path:
    """Write the model of a bundle into a repository; its folder.

    Args:
        bundle: To be served.
        out: Folder of the repository, which may hold other models.
        backend: As in Grounder.

    Raises:
        ConfigError: A model of that name is there, or the folder cannot be written.
        InputError: It lies in the bundle.
    """
    name = bundle.folder.resolve().name
    folder = out / name
    if folder.exists():
        raise ConfigError(f"{folder}: exists; remove it, or give another --out")
    require_apart(out, [bundle.folder], "--out")
    try:
        version = folder / "1"
        version.mkdir(parents=True)
        shutil.copytree(bundle.folder, version / "bundle", copy_function=_bring)
        (version / "model.py").write_text(_MODEL, encoding="utf-8")
        config = _CONFIG.format(name=name, quoted=json.dumps(name), backend=json.dumps(backend))
        (folder / "config.pbtxt").write_text(config, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error.strerror or error})") from error
    return folder


def _bring(source: str, target: str) -> None:
    """Link a file, or copy it where links cannot be had."""
    with contextlib.suppress(OSError):
        Path(target).hardlink_to(source)
        return
    shutil.copy2(source, target)
