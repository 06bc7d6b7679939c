"""onnxruntime's providers by name: options, refusals, and a decoder on a device that is not here.

onnxruntime is a fake one throughout: it writes down what it is asked for.
"""

import dataclasses
import logging
import os
import sys
from importlib import metadata
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from gap_runtime.backends.onnxruntime import loading, providers
from gap_runtime.backends.onnxruntime import session as backend
from gap_runtime.bundle import engines
from gap_runtime.bundle.manifest import DECODER, VISION
from gap_runtime.errors import BackendMissingError, ConfigError, EngineError
from gap_runtime.machines.target import load_target

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
TENSORRT, RTX = "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider"
PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
VOCABULARY = 12


def with_target(bundle, name):
    manifest = dataclasses.replace(bundle.manifest, target=load_target(name))
    return dataclasses.replace(bundle, manifest=manifest)


def open_decoder(bundle, device):
    return backend.open_decoder(bundle, bundle.manifest.stage(DECODER), device)


def open_vision(bundle, device):
    return backend.open_stage(bundle, bundle.manifest.stage(VISION), device)


def run_rows(decoder, rows, slot):
    embeddings = np.full((1, rows, 2), float(slot + 1), np.float32)
    positions = np.arange(slot, slot + rows)[None]
    return decoder.run(embeddings, positions, write_slot=slot, logits_rows=np.array([rows - 1]))[0]


@pytest.mark.parametrize(
    ("device", "available", "asked"),
    [
        ("", [CPU], [(CPU, {})]),
        ("", [CUDA, CPU], [(CUDA, {"use_tf32": "0"})]),
        ("cpu", [CUDA, CPU], [(CPU, {})]),
        ("cuda", [TENSORRT, CUDA, CPU], [(CUDA, {"use_tf32": "0"})]),
    ],
)
def test_what_is_asked_for(ort, decoder_bundle, device, available, asked):
    ort.available = available
    open_vision(decoder_bundle, device)
    (session,) = ort.sessions
    assert session.providers == asked


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_stdout_stays_that_of_all_threads(ort, decoder_bundle, device, capsys):
    """A thread that answers meanwhile prints to where it did; what the library prints is lost."""
    ort.available = [CUDA, CPU]
    code = "def preload_dlls():\n    seen.append(sys.stdout)\n    print('no cudnn')\n"
    vars(ort).update(seen=ort.stdouts, sys=sys)
    exec(code, vars(ort))
    open_vision(decoder_bundle, device)
    assert set(ort.stdouts) == {sys.stdout}
    assert len(ort.stdouts) == 1 + (device == "cuda")
    assert capsys.readouterr().out == ""
    assert "print" not in vars(ort)


def test_tensorrt_has_cuda_behind_it(ort, decoder_bundle):
    ort.available = [TENSORRT, CUDA, CPU]
    open_decoder(decoder_bundle, "tensorrt")
    (first, options), (second, _) = ort.sessions[0].providers
    assert (first, second) == (TENSORRT, CUDA)
    assert options["trt_fp16_enable"] == "0"
    assert options["trt_profile_min_shapes"] == ("embeddings:1x1x2,position_ids:1x1,logits_rows:1")
    assert options["trt_profile_opt_shapes"] == (
        "embeddings:1x16x2,position_ids:1x16,logits_rows:8"
    )
    assert options["trt_profile_max_shapes"] == options["trt_profile_opt_shapes"]
    folder = decoder_bundle.folder.resolve() / "engines"
    assert options["trt_engine_cache_path"].startswith(f"{folder}/onnxruntime-tensorrt-")
    assert options["trt_timing_cache_path"] == options["trt_engine_cache_path"]
    assert options["trt_engine_cache_prefix"] == "decoder"
    assert options["trt_load_user_initializer"] == "1"
    assert all(isinstance(value, str) for value in options.values())


def test_older_onnxruntimes_do_not_know_every_option(decoder_bundle):
    stage = decoder_bundle.manifest.stage(DECODER)
    options = providers.choose_options("tensorrt", decoder_bundle, stage, (1, 22))
    assert "trt_load_user_initializer" not in options


def test_only_the_decoder_has_a_profile(decoder_bundle):
    stage = decoder_bundle.manifest.stage(VISION)
    options = providers.choose_options("tensorrt", decoder_bundle, stage, (1, 31))
    assert not any("profile" in key for key in options)


def test_the_targets_scratch_memory_is_kept_to(decoder_bundle):
    bundle = with_target(decoder_bundle, "jetson-orin-jp7")
    for device, key in (("tensorrt", "trt"), ("nvtensorrtrtx", "nv")):
        options = providers.choose_options(device, bundle, bundle.manifest.stage(VISION), (1, 31))
        assert options[f"{key}_max_workspace_size"] == str(1024 * 2**20)


def test_engines_go_to_the_users_cache_where_the_bundle_is_read_only(
    decoder_bundle, monkeypatch, tmp_path
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (decoder_bundle.folder / "engines").write_text("in the way", encoding="utf-8")
    folder = engines.provider_cache(decoder_bundle, "onnxruntime-tensorrt")
    assert folder.parent == tmp_path / "home" / "gap-runtime" / "tiny-8of16"
    (tmp_path / "home" / "gap-runtime" / "tiny-8of16").rename(tmp_path / "moved")
    (tmp_path / "home" / "gap-runtime").rmdir()
    (tmp_path / "home" / "gap-runtime").write_text("in the way", encoding="utf-8")
    assert engines.provider_cache(decoder_bundle, "onnxruntime-tensorrt") is None
    stage = decoder_bundle.manifest.stage(DECODER)
    options = providers.choose_options("tensorrt", decoder_bundle, stage, (1, 31))
    assert "trt_engine_cache_enable" not in options


def test_what_a_library_would_wait_for_goes_from_its_cache(decoder_bundle):
    folder = engines.provider_cache(decoder_bundle, "openvino-gpu")
    (folder / "models").mkdir()
    (folder / "models" / "1.blob").write_bytes(b"x")
    assert engines.provider_cache(decoder_bundle, "openvino-gpu") == folder
    os.mkfifo(folder / "models" / "2.blob")
    assert engines.provider_cache(decoder_bundle, "openvino-gpu") == folder
    assert [path.name for path in folder.rglob("*")] == ["models", "1.blob"]


def test_what_changed_in_a_cache_since_it_was_sealed_goes(tmp_path):
    for name in ("same", "flipped", "cut", "emptied"):
        (tmp_path / name).write_bytes(bytes(100))
    engines.prove_cache(tmp_path)
    assert not list(tmp_path.iterdir())
    for name in ("same", "flipped", "cut", "emptied"):
        (tmp_path / name).write_bytes(bytes(100))
    engines.seal_cache(tmp_path)
    (tmp_path / "flipped").write_bytes(bytes(99) + b"\x01")
    (tmp_path / "cut").write_bytes(bytes(99))
    (tmp_path / "emptied").write_bytes(b"")
    (tmp_path / "of a killed process").write_bytes(bytes(100))
    engines.prove_cache(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"same", "sealed.json"}
    (tmp_path / "sealed.json").write_text('{"files": {"same": [1]}}', encoding="utf-8")
    engines.prove_cache(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["sealed.json"]


def test_engines_of_another_bundle_are_not_used(decoder_bundle):
    before = engines.provider_cache(decoder_bundle, "onnxruntime-tensorrt")
    files = dict(decoder_bundle.manifest.files)
    files["weights.bin"] = dataclasses.replace(files["weights.bin"], blake3="0" * 64)
    manifest = dataclasses.replace(decoder_bundle.manifest, files=files)
    changed = dataclasses.replace(decoder_bundle, manifest=manifest)
    assert engines.provider_cache(changed, "onnxruntime-tensorrt") != before
    assert engines.provider_cache(decoder_bundle, "onnxruntime-tensorrt") == before


@pytest.mark.parametrize(
    ("device", "parts"),
    [
        ("cuda", [CUDA, "pip uninstall onnxruntime, then pip install 'gap-runtime[gpu]'"]),
        ("tensorrt", [TENSORRT, "'gap-runtime[gpu]'", "'tensorrt-cu13>=10.16,<11'"]),
        ("nvtensorrtrtx", [RTX, "pip install onnxruntime-ep-nv-tensorrt-rtx"]),
    ],
)
@pytest.mark.usefixtures("ort")
def test_a_provider_that_is_not_in_the_build(decoder_bundle, device, parts):
    with pytest.raises(BackendMissingError) as caught:
        open_vision(decoder_bundle, device)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("ort")
def test_an_unknown_device(decoder_bundle):
    with pytest.raises(ConfigError, match="'gpu'; have cpu, cuda, tensorrt, nvtensorrtrtx"):
        open_vision(decoder_bundle, "gpu")


def test_a_provider_that_does_not_start(ort, decoder_bundle):
    """Somebody with another CUDA reads which one it is made for, and where the libraries are."""
    ort.available, ort.broken, ort.cuda_version = [CUDA, CPU], {CUDA}, "13.0"
    with pytest.raises(EngineError) as caught:
        open_vision(decoder_bundle, "cuda")
    for part in (
        "could not start CUDAExecutionProvider (it is made for CUDA 13.0, which the driver has",
        "pip install 'onnxruntime-gpu[cuda,cudnn]'; gap-runtime doctor says what is here)",
        "without :cuda it runs on the CPU",
    ):
        assert part in str(caught.value)


def test_falling_back_to_the_cpu_is_said(ort, decoder_bundle, caplog):
    """Where no device was asked for, the CPU will do; but not silently."""
    ort.available, ort.broken = [CUDA, CPU], {CUDA}
    with caplog.at_level(logging.WARNING):
        open_vision(decoder_bundle, "")
    (record,) = caplog.records
    assert "could not start CUDAExecutionProvider" in record.getMessage()
    assert record.getMessage().endswith("it runs on the CPU")


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        ("[ONNXRuntimeError] Load model failed:no kernel\nx", "no kernel"),
        (
            "/onnxruntime_src/a.cc:7 void f(const Options&) Please install it.\n",
            "Please install it",
        ),
        ("out of memory", "out of memory"),
    ],
)
def test_a_graph_that_cannot_be_loaded(ort, decoder_bundle, failure, reason):
    ort.available, ort.failure = [CUDA, CPU], failure
    with pytest.raises(EngineError) as caught:
        open_vision(decoder_bundle, "cuda")
    assert str(caught.value).endswith(f" cannot load it: {reason}")


def test_two_packages_that_overwrite_each_other(ort, decoder_bundle, monkeypatch):
    del ort
    found = SimpleNamespace(name="onnxruntime", version="1.31.1")
    monkeypatch.setattr(metadata, "distributions", lambda name: [found])  # noqa: ARG005
    with pytest.raises(BackendMissingError, match="pip uninstall onnxruntime onnxruntime-gpu"):
        open_vision(decoder_bundle, "cuda")


def test_operators_that_run_elsewhere_are_said(ort, decoder_bundle, caplog):
    ort.available = [CUDA, CPU]
    ort.parts = [(CUDA, ["Gemm", "Attention"]), (CPU, ["Shape", "Gather", "Shape"])]
    with caplog.at_level(logging.WARNING):
        open_decoder(decoder_bundle, "cuda")
    (record,) = caplog.records
    assert record.getMessage().endswith(
        f"decoder.onnx: 3 of 5 nodes run on {CPU} (Gather, Shape x2), not on {CUDA}"
    )
    entries = ort.sessions[0].options.entries
    assert entries["session.record_ep_graph_assignment_info"] == "1"
    assert entries["session.intra_op.allow_spinning"] == "0"


@pytest.mark.parametrize("parts", [None, [(CUDA, ["Gemm"])]])
def test_nothing_is_said_where_all_runs_where_it_should(ort, decoder_bundle, caplog, parts):
    ort.available, ort.parts = [CUDA, CPU], parts
    with caplog.at_level(logging.WARNING):
        open_decoder(decoder_bundle, "cuda")
    assert not caplog.records


@pytest.mark.parametrize("is_there", [True, False])
def test_a_convolution_on_cuda_needs_cudnn_before_the_first_picture(
    ort, decoder_bundle, monkeypatch, is_there
):
    asked = []

    def load(name):
        asked.append(name)
        if not is_there:
            raise OSError(name)

    monkeypatch.setattr(loading.ctypes, "CDLL", load)
    ort.available, ort.parts = [CUDA, CPU], [(CUDA, ["Conv", "Gemm"])]
    if is_there:
        open_vision(decoder_bundle, "cuda")
    else:
        with pytest.raises(EngineError, match=r"needs cuDNN on CUDA, .*nvidia-cudnn-cu13$"):
            open_vision(decoder_bundle, "cuda")
    assert asked == ["libcudnn.so.9"]
    # A convolution elsewhere does not.
    ort.parts = [(CUDA, ["Gemm"]), (CPU, ["Conv"])]
    open_vision(decoder_bundle, "cuda")
    assert len(asked) == 1


def test_two_other_providers_are_both_named():
    nodes = [(TENSORRT, "Gemm"), (CUDA, "TopK"), (CPU, "Shape")]
    assert providers.describe_strangers(nodes, TENSORRT) == (
        f"1 of 3 nodes run on {CPU} (Shape); 1 of 3 nodes run on {CUDA} (TopK), not on {TENSORRT}"
    )
    assert providers.describe_strangers([], CUDA) == ""


@pytest.fixture
def plugin(monkeypatch, ort):
    """TensorRT-RTX's provider as the package of its own that it is."""
    module = ModuleType(PLUGIN)
    module.get_ep_name = lambda: "nv_tensorrt_rtx"
    module.get_library_path = lambda: "librtx.so"
    monkeypatch.setitem(sys.modules, PLUGIN, module)
    ort.devices = [SimpleNamespace(ep_name=CPU), SimpleNamespace(ep_name="nv_tensorrt_rtx")]
    return ort


def test_a_provider_that_is_a_package_of_its_own(plugin, decoder_bundle):
    decoder = open_decoder(decoder_bundle, "nvtensorrtrtx")
    assert plugin.registered == [("nv_tensorrt_rtx", "librtx.so")]
    (session,) = plugin.sessions
    assert session.providers is None
    ((name, options),) = session.options.added
    assert name == "nv_tensorrt_rtx"
    assert options["nv_profile_max_shapes"] == (
        "embeddings:1x16x2,position_ids:1x16,logits_rows:8"
    )
    assert "onnxruntime-nvtensorrtrtx-" in options["nv_runtime_cache_path"]
    run_rows(decoder, 3, 0)
    cache = session.runs[0][0].inputs["cache_key_00"]
    assert (cache.device, cache.vendor) == ("gpu", 0x10DE)
    # A second stage must not register it again.
    open_vision(decoder_bundle, "nvtensorrtrtx")
    assert len(plugin.registered) == 1


def test_a_plugin_that_finds_no_gpu(plugin, decoder_bundle):
    plugin.devices = [SimpleNamespace(ep_name=CPU)]
    with pytest.raises(EngineError, match=rf"{RTX} finds no GPU .* gap-runtime doctor"):
        open_vision(decoder_bundle, "nvtensorrtrtx")


def test_a_plugin_that_does_not_start(plugin, decoder_bundle, fake_onnxruntime):
    """As it is where there is no driver."""

    def refuse(*_):
        raise fake_onnxruntime.FakeError(
            "[ONNXRuntimeError] : 1 : Failed to load x.so with error: no libcuda.so.1"
        )

    plugin.register_execution_provider_library = refuse
    with pytest.raises(EngineError, match=r"does not start \(no libcuda.so.1\); it needs NVIDIA"):
        open_vision(decoder_bundle, "nvtensorrtrtx")
    assert not (decoder_bundle.folder / "engines").exists()


def test_the_cache_stays_on_the_device_and_is_bound_once(ort, decoder_bundle):
    ort.available, ort.on_host = [CUDA, CPU], {"write_slot", "logits_rows"}
    decoder = open_decoder(decoder_bundle, "cuda")
    (session,) = ort.sessions
    assert run_rows(decoder, 4, 0).shape == (VOCABULARY,)
    for slot in (4, 5, 6):
        run_rows(decoder, 1, slot)
    prefill, *steps = [binding for binding, _ in session.runs]
    assert len({id(binding) for binding in steps}) == 1
    for binding in (prefill, steps[0]):
        for name in ("cache_key_00", "cache_value_00"):
            assert binding.inputs[name].device == "cuda"
            assert binding.inputs[name] is binding.outputs[f"next_{name}"]
        assert binding.copies == []
    assert prefill.inputs["cache_key_00"] is steps[0].inputs["cache_key_00"]
    places = {name: value.device for name, value in steps[0].inputs.items()}
    assert (places["embeddings"], places["position_ids"]) == ("cuda", "cuda")
    assert (places["write_slot"], places["logits_rows"]) == ("cpu", "cpu")
    assert [int(seen["write_slot"][0]) for _, seen in session.runs] == [0, 4, 5, 6]
    assert [int(seen["position_ids"][0, -1]) for _, seen in session.runs] == [3, 4, 5, 6]
    assert [float(seen["embeddings"][0, 0, 0]) for _, seen in session.runs] == [1, 5, 6, 7]


def test_a_cache_that_is_read_on_the_host_lies_there(ort, decoder_bundle):
    """As onnxruntime 1.31 has it for grouped attention in float32, of which CUDA has no kernel.

    A cache on the device would be copied when it is bound, and never again.
    """
    ort.available = [CUDA, CPU]
    ort.on_host = {"cache_key_00", "cache_value_00", "write_slot"}
    decoder = open_decoder(decoder_bundle, "cuda")
    run_rows(decoder, 4, 0)
    run_rows(decoder, 1, 4)
    (session,) = ort.sessions
    for binding, _ in session.runs:
        for name in ("cache_key_00", "cache_value_00"):
            assert binding.inputs[name].device == "cpu"
            assert binding.inputs[name] is binding.outputs[f"next_{name}"]
        assert binding.inputs["embeddings"].device == "cuda"


def test_a_cache_that_does_not_fit_the_device(ort, decoder_bundle):
    ort.available = [CUDA, CPU]

    def refuse(*_):
        raise RuntimeError("out of memory\nat some place")

    ort.OrtValue = SimpleNamespace(ortvalue_from_numpy=refuse)
    with pytest.raises(EngineError, match=r"no room for the KV cache .* out of memory$"):
        open_decoder(decoder_bundle, "cuda")


def test_where_nobody_tells_the_places_inputs_are_bound_at_every_run(ort, decoder_bundle):
    """An input that lies on the wrong side would be copied once and never again."""
    ort.available, ort.tells_places = [CUDA, CPU], False
    decoder = open_decoder(decoder_bundle, "cuda")
    (session,) = ort.sessions
    for slot in (0, 1):
        run_rows(decoder, 1, slot)
    binding = session.runs[0][0]
    assert binding.copies == ["embeddings", "position_ids", "write_slot", "logits_rows"] * 2
    assert [int(seen["write_slot"][0]) for _, seen in session.runs] == [0, 1]


def test_on_the_cpu_nothing_is_copied(ort, decoder_bundle):
    decoder = open_decoder(decoder_bundle, "cpu")
    (session,) = ort.sessions
    for slot in (0, 1, 2):
        run_rows(decoder, 1, slot)
    binding = session.runs[0][0]
    assert binding.copies == []
    assert all(value.updates == 0 for value in binding.inputs.values())
    assert [int(seen["write_slot"][0]) for _, seen in session.runs] == [0, 1, 2]


def test_tensorrt_writes_plain_graphs_into_a_second_cache(ort, decoder_bundle):
    """Only from opset 24 on is writing in place promised."""
    ort.available = [TENSORRT, CUDA, CPU]
    decoder = open_decoder(with_target(decoder_bundle, "jetson-orin-jp6"), "tensorrt")
    (session,) = ort.sessions
    for rows, slot in ((3, 0), (1, 3), (1, 4), (1, 5)):
        run_rows(decoder, rows, slot)
    written = None
    for binding, _ in session.runs:
        read, into = binding.inputs["cache_key_00"], binding.outputs["next_cache_key_00"]
        assert read is not into
        assert written is None or read is written
        written = into


@pytest.mark.parametrize(
    ("device", "opset", "in_place"),
    [
        ("", 20, True),
        ("cpu", 20, True),
        ("cuda", 20, True),
        ("tensorrt", 20, False),
        ("tensorrt", 24, True),
        ("nvtensorrtrtx", 24, True),
    ],
)
def test_where_the_cache_is_written_in_place(device, opset, in_place):
    assert providers.writes_in_place(device, opset) == in_place


@pytest.mark.parametrize(("text", "threads"), [("", 0), ("3", 3)])
def test_threads_of_a_session(ort, decoder_bundle, monkeypatch, text, threads):
    monkeypatch.setenv("GAP_RUNTIME_THREADS", text)
    open_decoder(decoder_bundle, "cpu")
    assert ort.sessions[0].options.intra_op_num_threads == threads


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "1025", "10000", "9" * 50, "9" * 5000])
def test_no_number_of_threads(ort, decoder_bundle, monkeypatch, text):
    del ort
    monkeypatch.setenv("GAP_RUNTIME_THREADS", text)
    with pytest.raises(ConfigError, match=f"GAP_RUNTIME_THREADS={text[:60]}: expected a"):
        open_decoder(decoder_bundle, "cpu")


_FASTMATH = "mlas.enable_gemm_fastmath_arm64_bfloat16"


@pytest.mark.parametrize(("text", "entry"), [("1", "1"), ("0", None), ("", None)])
def test_products_in_bfloat16_are_asked_for(ort, decoder_bundle, monkeypatch, text, entry):
    monkeypatch.setenv("GAP_RUNTIME_FASTMATH", text)
    open_decoder(decoder_bundle, "cpu")
    assert ort.sessions[0].options.entries.get(_FASTMATH) == entry


def test_a_wish_for_fast_products_is_0_or_1(ort, decoder_bundle, monkeypatch):
    del ort
    monkeypatch.setenv("GAP_RUNTIME_FASTMATH", "yes")
    with pytest.raises(ConfigError, match="GAP_RUNTIME_FASTMATH=yes: expected 1, or 0"):
        open_decoder(decoder_bundle, "cpu")


def test_a_cache_of_int8_needs_an_onnxruntime_that_can_run_it(ort, decoder_bundle):
    """1.26 loads such a graph and fails at the first prompt; a line before that says so."""
    manifest = decoder_bundle.manifest
    cache = dataclasses.replace(manifest.cache, dtype="int8")
    bundle = dataclasses.replace(
        decoder_bundle, manifest=dataclasses.replace(manifest, cache=cache)
    )
    ort.__version__ = "1.26.0"
    with pytest.raises(
        EngineError, match=r"its KV cache of int8 needs onnxruntime 1\.27 or newer"
    ):
        open_decoder(bundle, "cpu")
    open_decoder(decoder_bundle, "cpu")
    ort.__version__ = "1.27.0"
    open_decoder(bundle, "cpu")
