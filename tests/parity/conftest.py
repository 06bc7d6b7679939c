"""Bundles that several parity tests read; made once."""

import gc
import json
import shutil
import sys

import onnxruntime
import pytest
from tools.once import make_once
from tools.places import load_runtime_helper
from tools.sockets import watched

import gap_export
from gap_export.cli import main as cli
from gap_runtime import Bundle
from gap_runtime.cli.main import main


def export_bundle(
    model, out, *, reference=True, checkpoint=None, bring="copy", target="cpu", **overrides
):
    """Export as a script would; overrides are dotted keys with `__` for the dot."""
    return gap_export.export(
        model,
        settings={key.replace("__", "."): value for key, value in overrides.items()},
        out=out,
        reference=reference,
        checkpoint=checkpoint,
        bring=bring,
        target=target,
    ).folder


@pytest.fixture(scope="session", autouse=True)
def trace_once(graphs_traced_once):
    """Tests here look at what graphs answer, not at how they were traced."""


@pytest.fixture(scope="session", name="export")
def export_fixture():
    return export_bundle


@pytest.fixture(scope="session")
def refshapes_export(tmp_path_factory):
    """That export's folder, and the sockets that were opened for it."""

    def make(home):
        with watched() as opened:
            export_bundle("refshapes", home / "gap", prune__ratios=[0.0, 0.25, 0.5, 0.75])
        (home / "sockets.json").write_text(json.dumps(opened), encoding="utf-8")

    home = make_once(tmp_path_factory, "refshapes", make)
    return home / "gap", json.loads((home / "sockets.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def refshapes_bundle(refshapes_export):
    """refshapes unpruned and at three ratios, GAP, with PyTorch's answers."""
    return refshapes_export[0]


SWEEP = (
    *("sweep", "refshapes", "--data", "refshapes:test", "--limit", "6", "--ratios", "0", "0.5"),
    *("0.75", "--positions", "gap", "compact", "--pytorch", "--protocol", "frame"),
    *("--protocol", "shikra", "--gallery", "2", "--backend", "onnxruntime:cpu"),
    *("--within", "100"),
)


@pytest.fixture(scope="session")
def sweep_arguments():
    """A small sweep of refshapes but for its folder."""
    return SWEEP


@pytest.fixture(scope="session")
def swept(tmp_path_factory):
    """The folder of that sweep. Read only."""

    def make(home):
        assert cli.main([*SWEEP, "--out", str(home / "whole")]) == 0

    return make_once(tmp_path_factory, "sweeps", make) / "whole"


@pytest.fixture(scope="session")
def pages():
    """The module page_reader.py of the runtime's tests."""
    return load_runtime_helper("page_reader")


@pytest.fixture
def build_computed(monkeypatch, tmp_path):
    """A function that builds engines of a copy of a bundle, which onnxruntime computes.

    It gives the copy and the made-up device.
    """

    def put(folder, *, is_in_place):
        sessions = {}

        def compute(path, inputs):
            if path not in sessions:
                providers = ["CPUExecutionProvider"]
                sessions[path] = onnxruntime.InferenceSession(path, providers=providers)
            names = [each.name for each in sessions[path].get_outputs()]
            return dict(zip(names, sessions[path].run(names, inputs), strict=True))

        # Engines that nobody uses any more share scratch memory of another made-up GPU.
        gc.collect()
        shutil.copytree(folder, tmp_path / "built")
        bundle = Bundle.open(tmp_path / "built")
        fakes = load_runtime_helper("fake_tensorrt")
        gpu = fakes.FakeCuda()
        trt = fakes.FakeTensorrt("tensorrt", "10.16.1", gpu, compute)
        trt.add_bundle(bundle, is_in_place=is_in_place)
        monkeypatch.setitem(sys.modules, "tensorrt", trt)
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", gpu)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        assert main(["build", str(bundle.folder), "--target", "rtx"]) == 0
        return bundle, gpu

    return put
