"""The OpenVINO backend: with a made-up library everywhere, with the real one where it is."""

import dataclasses
import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from gap_runtime.backends import SlotSaver, open_backend, openvino
from gap_runtime.backends.openvino import session as openvino_session
from gap_runtime.backends.openvino.missing import find_missing
from gap_runtime.bundle.bundle import Bundle
from gap_runtime.bundle.manifest import DECODER, VISION, Quantization
from gap_runtime.cli.main import main
from gap_runtime.errors import BackendMissingError, EngineError
from gap_runtime.machines.target import load_target


class Tensor:
    """Memory that is shared with an array."""

    def __init__(self, array, *_, shared_memory=True):
        assert shared_memory
        self.data = array


class Request:
    """Computes a decoder whose logits are sums over what its cache holds up to a row."""

    def __init__(self, model):
        self.model = model
        self.tensors = {}

    def set_tensor(self, name, tensor):
        self.tensors[name] = tensor

    def get_tensor(self, name):
        return self.tensors[name]

    def infer(self, inputs=None, *, share_inputs=False):
        if inputs is not None:
            assert share_inputs
            self.tensors = {n: Tensor(np.full(2, len(inputs))) for n in ("a", "kept_index")}
            self.tensors |= {n: Tensor(np.ones(2)) for n in ("visual_tokens", "position_ids")}
            return
        data = {name: tensor.data for name, tensor in self.tensors.items()}
        slot, rows = int(data["write_slot"][0]), data["embeddings"].shape[1]
        for part, factor in (("key", 1), ("value", 2)):
            data[f"next_cache_{part}_00"][:] = data[f"cache_{part}_00"]
            data[f"next_cache_{part}_00"][0, 0, slot : slot + rows] = (
                factor * data["embeddings"][0]
            )
        for k, row in enumerate(data["logits_rows"]):
            total = sum(
                data[f"next_cache_{part}_00"][0, 0, : slot + row + 1].sum()
                for part in ("key", "value")
            )
            data["logits"][k] = total + data["position_ids"][0, row]


class Model(str):
    """A graph that was read: its path, and nothing that could be compared with a manifest."""

    __slots__ = ()
    inputs = outputs = ()


@pytest.fixture
def library(monkeypatch):
    """A made-up OpenVINO; what it was asked to compile, and how."""
    compiled = []

    class Core:
        available_devices = ("CPU", "GPU.0")
        capabilities = ("FP32", "FP16")

        def read_model(self, path):
            if "broken" in path:
                raise RuntimeError(
                    "Exception from src/core.cpp:1:\nCheck 'a' failed\nno such operator: Foo\n\n"
                )
            return Model(path)

        def get_property(self, device, name):
            assert (device in self.available_devices, name) == (True, "OPTIMIZATION_CAPABILITIES")
            return self.capabilities

        def compile_model(self, model, device, settings):
            compiled.append((model, device, settings))
            return SimpleNamespace(create_infer_request=lambda: Request(model))

    module = ModuleType("openvino")
    module.Core, module.Tensor, module.__version__ = Core, Tensor, "2026.4.1-123"
    module.Shape, module.Type = list, SimpleNamespace(bf16="bf16")
    monkeypatch.setitem(sys.modules, "openvino", module)
    monkeypatch.setattr(openvino_session, "require_interface", lambda *_: None)
    monkeypatch.delenv("GAP_RUNTIME_THREADS", raising=False)
    return SimpleNamespace(compiled=compiled, core=Core)


@pytest.fixture
def bundle(make_bundle, make_stages):
    target = load_target("openvino")
    return Bundle.open(make_bundle(stages=make_stages(), target=target))


def test_every_call_reads_what_all_before_it_wrote(library, bundle):
    decoder = openvino.open_decoder(bundle, bundle.manifest.stage(DECODER), "")
    written = 0.0
    for start, rows in ((0, 3), (3, 1), (4, 1), (5, 2), (7, 1), (8, 1)):
        assert decoder.fit(rows) == rows
        values = np.arange(2 * rows, dtype=np.float32).reshape(1, rows, 2) + start
        ids = np.arange(rows)[None] + 10 * start
        logits = decoder.run(values, ids, start, np.array([rows - 1]))
        written += 3 * float(values.sum())
        assert logits.shape == (1, 12)
        assert set(logits[0].tolist()) == {written + 10 * start + rows - 1}
    ((_, device, settings),) = library.compiled
    assert (device, settings["INFERENCE_PRECISION_HINT"]) == ("CPU", "f32")
    assert "CACHE_DIR" not in settings


@pytest.mark.usefixtures("library")
def test_slots_are_put_back(bundle):
    """At any side of the cache, whatever was written there meanwhile."""
    decoder = openvino.open_decoder(bundle, bundle.manifest.stage(DECODER), "")
    ones, ids = np.ones((1, 2, 2), np.float32), np.zeros((1, 2), int)
    decoder.run(ones, ids, 0, np.array([1]))
    saved = decoder.copy_slots(2)
    assert isinstance(decoder, SlotSaver)
    assert saved.size == sum(2 * 2 * 4 for _ in ("key", "value"))
    for others in range(1, 4):
        for _ in range(others):
            decoder.run(7 * ones, ids, 0, np.array([1]))
        decoder.put_slots(saved)
        found = decoder.run(ones[:, :1], ids[:, :1], 2, np.array([0]))
        assert found[0, 0] == 3 * 6


@pytest.mark.usefixtures("library")
def test_rows_of_a_refused_draft_are_written_over(bundle):
    decoder = openvino.open_decoder(bundle, bundle.manifest.stage(DECODER), "")
    ones = np.ones((1, 4, 2), np.float32)
    many = decoder.run(ones, np.zeros((1, 4), int), 0, np.arange(4)).copy()
    assert many[:, 0].tolist() == [6, 12, 18, 24]
    again = decoder.run(ones[:, :1] * 5, np.zeros((1, 1), int), 2, np.array([0]))
    assert again[0, 0] == 12 + 30


def test_vision_gives_copies_by_name(library, bundle):
    del library
    stage = bundle.manifest.stage(VISION, bundle.manifest.ratios[0])
    session = openvino.open_stage(bundle, stage, "cpu")
    first = session.run({"pixels": np.zeros(1)})
    assert set(first) == {spec.name for spec in stage.outputs}
    session.run({"pixels": np.zeros(1), "text_features": np.zeros(1)})
    assert first["kept_index"].tolist() == [1, 1]


def test_threads_are_those_of_the_environment(library, bundle, monkeypatch):
    monkeypatch.setenv("GAP_RUNTIME_THREADS", "3")
    openvino.open_decoder(bundle, bundle.manifest.stage(DECODER), "")
    assert library.compiled[0][2]["INFERENCE_NUM_THREADS"] == 3


@pytest.mark.parametrize(
    ("capabilities", "hint"), [(("FP32", "BF16"), "bf16"), (("FP32",), "f32")]
)
def test_fast_products_where_the_processor_has_them(
    library, bundle, monkeypatch, make_stages, capabilities, hint
):
    monkeypatch.setenv("GAP_RUNTIME_FASTMATH", "1")
    library.core.capabilities = capabilities
    stages = make_stages("float32")
    manifest = dataclasses.replace(bundle.manifest, dtype="float32", stages=stages)
    bundle = dataclasses.replace(bundle, manifest=manifest)
    openvino.open_decoder(bundle, manifest.stage(DECODER), "")
    assert library.compiled[0][2]["INFERENCE_PRECISION_HINT"] == hint


def test_other_devices_keep_what_they_compile(library, bundle):
    openvino.open_decoder(bundle, bundle.manifest.stage(DECODER), "gpu.0")
    ((_, device, settings),) = library.compiled
    assert device == "GPU.0"
    assert "openvino-gpu.0-" in settings["CACHE_DIR"]
    assert "INFERENCE_NUM_THREADS" not in settings


@pytest.mark.parametrize(
    ("dtype", "device", "capabilities", "hint"),
    [
        ("float32", "", ("FP32", "FP16", "BF16"), "f32"),
        # A CPU's float16 is not used, whatever it says of it.
        ("float16", "", ("FP32", "FP16"), "f32"),
        ("float16", "gpu.0", ("FP32", "FP16"), "f16"),
        ("float16", "gpu.0", ("FP32",), "f32"),
        ("bfloat16", "", ("FP32", "BF16"), "bf16"),
        ("bfloat16", "", ("FP32", "FP16"), "f32"),
    ],
)
def test_it_computes_in_the_bundles_dtype_where_it_can(
    library, bundle, make_stages, dtype, device, capabilities, hint
):
    library.core.capabilities = capabilities
    manifest = dataclasses.replace(bundle.manifest, dtype=dtype, stages=make_stages(dtype))
    changed = dataclasses.replace(bundle, manifest=manifest)
    openvino.open_decoder(changed, manifest.stage(DECODER), device)
    assert library.compiled[0][2]["INFERENCE_PRECISION_HINT"] == hint


PARTS = ("decoder", "head", "vision")


@pytest.mark.parametrize(
    ("dtype", "method", "parts", "cache", "block"),
    [
        ("float32", None, (), "f32", None),
        ("float16", None, (), "f16", None),
        ("float32", "nearest", PARTS, "f16", "128"),
        ("float32", "awq", PARTS[:1], "f16", "128"),
        # The decoder is as it was.
        ("float32", "nearest", PARTS[2:], "f32", "128"),
        # Its blocks are the checkpoint's, of whatever size.
        ("float32", "checkpoint", PARTS[:1], "f16", None),
        # A processor without bfloat16 computes in float32; keys may be beyond float16.
        ("bfloat16", "nearest", PARTS, "f32", "128"),
    ],
)
def test_rows_and_caches_are_rounded_as_weights_are(
    library, bundle, make_stages, dtype, method, parts, cache, block
):
    quantization = Quantization(weights="int4", method=method, parts=parts) if method else None
    manifest = dataclasses.replace(
        bundle.manifest, dtype=dtype, stages=make_stages(dtype), quantization=quantization
    )
    changed = dataclasses.replace(bundle, manifest=manifest)
    openvino.open_decoder(changed, manifest.stage(DECODER), "")
    settings = library.compiled[0][2]
    assert settings["INFERENCE_PRECISION_HINT"] == "f32"
    assert settings["KV_CACHE_PRECISION"] == cache
    assert settings.get("DYNAMIC_QUANTIZATION_GROUP_SIZE") == block


@pytest.mark.usefixtures("library")
def test_a_device_that_is_not_there_is_named(bundle):
    with pytest.raises(EngineError, match=r"finds no device NPU, only CPU, GPU\.0; install its"):
        openvino.open_decoder(bundle, bundle.manifest.stage(DECODER), "npu")


@pytest.mark.usefixtures("library")
def test_what_it_cannot_read_is_one_line(bundle):
    stage = dataclasses.replace(bundle.manifest.stage(DECODER), file="broken.onnx")
    (bundle.folder / stage.file).touch()
    with pytest.raises(EngineError) as told:
        openvino.open_decoder(bundle, stage, "")
    assert str(told.value).endswith(
        "broken.onnx: OpenVINO 2026.4.1 cannot load it on CPU: no such operator: Foo"
    )


@pytest.mark.usefixtures("library")
def test_a_decoder_of_opset_24_is_refused_and_its_vision_is_not(make_bundle, make_stages):
    bundle = Bundle.open(make_bundle(stages=make_stages(), target=load_target("standard")))
    openvino.open_stage(bundle, bundle.manifest.stage(VISION, bundle.manifest.ratios[0]), "")
    with pytest.raises(EngineError, match="opset 21 at most, found 24; export with --target open"):
        openvino.open_decoder(bundle, bundle.manifest.stage(DECODER), "")


def test_without_the_library_it_says_what_to_install(make_bundle, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "openvino", None)
    folder = make_bundle(target=load_target("openvino"))
    assert main(["bench", str(folder), "--backend", "ov"]) == BackendMissingError.exit_code == 5
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said == "error: openvino is not installed; pip install 'gap-runtime[openvino]'"


@pytest.mark.parametrize(
    ("engines", "found"),
    [({}, "none"), ({"openvino": "2024.6.0"}, "2024.6.0"), ({"openvino": "2026.4.1"}, None)],
)
def test_what_a_machine_misses(engines, found):
    machine = SimpleNamespace(engines=engines)
    missing = find_missing(machine, load_target("openvino"))
    assert missing == (
        []
        if found is None
        else [f"needs openvino >=2025.2, found {found}; pip install 'gap-runtime[openvino]'"]
    )


def test_it_is_found_by_its_names():
    assert open_backend("ov")[1] == ""
    assert open_backend("openvino:gpu.1")[1] == "gpu.1"


REPORTER = """
class Telemetry:
    def __init__(self, *_, **__): pass
    def send_event(self, *told): print("reported", *told)
"""


def test_openvino_reports_to_nobody(tmp_path):
    """Its own package for that is a made-up one here, which prints."""
    pytest.importorskip("openvino")
    package = tmp_path / "openvino_telemetry"
    (package / "backend").mkdir(parents=True)
    (package / "__init__.py").write_text(REPORTER)
    (package / "backend" / "__init__.py").write_text("backend_ga4 = None")
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])

    def run(code):
        command = [sys.executable, "-c", code]
        environment = os.environ | {"PYTHONPATH": path, "HOME": str(tmp_path)}
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        ).stdout

    assert "reported ov import" in run("import openvino")
    opened = """
from gap_runtime.backends.openvino.session import _import_openvino
print(_import_openvino().convert_model.__name__)
import openvino_telemetry
print(openvino_telemetry.Telemetry.__name__)
"""
    assert run(opened).split() == ["convert_model", "Telemetry"]
