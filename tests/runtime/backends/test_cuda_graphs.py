"""A decoder whose steps are one CUDA graph: what is copied, bound, recorded and refused.

CUDA is the fake of tests/runtime/fake_tensorrt.py, on host memory; onnxruntime a fake that writes
down what is bound and computes nothing. tests/parity/test_cuda_target.py computes.
"""

import ctypes
import dataclasses
import logging
from types import SimpleNamespace

import numpy as np
import pytest

from gap_runtime.backends._cuda import Device
from gap_runtime.backends.onnxruntime import cudart, graphs
from gap_runtime.backends.onnxruntime import session as backend
from gap_runtime.bundle.bundle import Bundle
from gap_runtime.bundle.manifest import DECODER
from gap_runtime.errors import EngineError
from gap_runtime.machines.target import load_target

CUDA = "CUDAExecutionProvider"
VOCABULARY = 12


class Binding:
    """Places by name: (type, shape, address)."""

    def __init__(self):
        self.inputs, self.outputs = {}, {}

    def bind_input(self, name, device, device_id, dtype, shape, address):
        assert (device, device_id) == ("cuda", 0)
        self.inputs[name] = dtype, tuple(shape), address

    def bind_output(self, name, device, device_id, dtype, shape, address):
        assert (device, device_id) == ("cuda", 0)
        self.outputs[name] = dtype, tuple(shape), address


class RunOptions:
    def __init__(self):
        self.entries = {}

    def add_run_config_entry(self, key, value):
        self.entries[key] = value


class Session:
    """Writes down what it reads, and gives each wanted row's number as its logits."""

    def __init__(self):
        self.runs = []

    def io_binding(self):
        return Binding()

    def run_with_iobinding(self, binding, options):
        seen = {
            name: look(*place).copy()
            for name, place in binding.inputs.items()
            if not name.startswith("cache_")
        }
        self.runs.append((binding, options.entries, seen))
        logits = look(*binding.outputs["logits"])
        logits[:] = seen["logits_rows"][:, None]


def look(dtype, shape, address):
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer((ctypes.c_ubyte * size).from_address(address), dtype).reshape(shape)


@pytest.fixture
def bundle(make_bundle, make_stages, manifest):
    folder = make_bundle(
        stages=make_stages("float16"),
        target=dataclasses.replace(load_target("cuda"), dtypes=()),
        cache=dataclasses.replace(manifest.cache, dtype="float16"),
    )
    return Bundle.open(folder)


@pytest.fixture
def here(monkeypatch, fakes):
    """A machine with a GPU: `cuda`, `session`, and the settings that sessions are opened with."""
    found = SimpleNamespace(cuda=fakes.FakeCuda(), session=Session(), settings=[], error=None)

    def open_session(_ort, _bundle, _stage, device, *, settings):
        found.settings.append((device, settings))
        if found.error:
            raise found.error
        return found.session

    found.ort = SimpleNamespace(
        get_available_providers=lambda: [CUDA],
        RunOptions=RunOptions,
        cuda_version="13.0",
        capi=SimpleNamespace(onnxruntime_pybind11_state=SimpleNamespace()),
    )
    monkeypatch.setattr(backend, "import_onnxruntime", lambda: found.ort)
    monkeypatch.setattr(graphs, "find_cudart", lambda _ort: found.cuda)
    monkeypatch.setattr(graphs, "open_session", open_session)
    monkeypatch.setattr(backend, "OnnxDecoder", lambda *_: "kernel by kernel")
    return found


def open_decoder(bundle, device="cuda"):
    return backend.open_decoder(bundle, bundle.manifest.stage(DECODER), device)


def run(decoder, rows, slot, wanted=None):
    wanted = [rows - 1] if wanted is None else wanted
    embeddings = np.full((1, rows, 2), slot + 1, np.float32)
    positions = np.arange(slot, slot + rows)[None]
    return decoder.run(embeddings, positions, slot, np.array(wanted))


@pytest.mark.parametrize("device", ["", "cuda"])
def test_steps_and_drafts_are_recorded_and_prompts_are_not(bundle, here, device):
    decoder = open_decoder(bundle, device)
    for rows, slot in ((10, 0), (1, 10), (8, 11), (1, 14), (8, 13)):
        run(decoder, rows, slot)
    assert [entries["gpu_graph_id"] for _, entries, _ in here.session.runs] == [
        *("-1", "1", "8", "1", "8")
    ]
    # All that is waited for is the copy of the logits.
    assert all(
        entries["disable_synchronize_execution_providers"] == "1"
        for _, entries, _ in here.session.runs
    )
    ((device, settings),) = here.settings
    assert device == "cuda"
    assert settings == {"enable_cuda_graph": "1", "user_compute_stream": "7"}


def test_a_recorded_call_is_bound_once_at_fixed_addresses(bundle, here):
    decoder = open_decoder(bundle)
    for slot in (0, 1, 2):
        run(decoder, 1, slot)
    bindings = {id(binding) for binding, _, _ in here.session.runs}
    assert len(bindings) == 1
    binding = here.session.runs[0][0]
    for name in ("cache_key_00", "cache_value_00"):
        assert binding.inputs[name] == binding.outputs[f"next_{name}"]
        assert binding.inputs[name][0] is np.float16
    seen = [values for _, _, values in here.session.runs]
    assert [int(each["write_slot"][0]) for each in seen] == [0, 1, 2]
    assert [int(each["position_ids"][0, 0]) for each in seen] == [0, 1, 2]
    assert [float(each["embeddings"][0, 0, 0]) for each in seen] == [1, 2, 3]


def test_a_step_is_two_copies_and_one_wait(bundle, here, monkeypatch):
    decoder, calls = open_decoder(bundle), []
    run(decoder, 1, 0)
    for name in ("cudaMemcpyAsync", "cudaStreamSynchronize"):
        plain = getattr(here.cuda, name)
        monkeypatch.setattr(
            here.cuda, name, lambda *a, plain=plain, name=name: (calls.append(name), plain(*a))[1]
        )
    allocated = here.cuda.counts["malloc"]
    run(decoder, 1, 1)
    assert calls == ["cudaMemcpyAsync", "cudaMemcpyAsync", "cudaStreamSynchronize"]
    assert here.cuda.counts["malloc"] == allocated


def test_logits_of_the_wanted_rows_alone_come_back(bundle, here):
    decoder = open_decoder(bundle)
    logits = run(decoder, 8, 0, wanted=[2, 3, 4])
    assert logits.shape == (3, VOCABULARY)
    assert logits[:, 0].tolist() == [2, 3, 4]
    # The rest of the recorded call's rows are asked for as the last one.
    assert here.session.runs[0][2]["logits_rows"].tolist() == [2, 3, 4, 4, 4, 4, 4, 4]
    assert run(decoder, 10, 8)[:, 0].tolist() == [9]


def test_numbers_of_rows(bundle, here):
    del here
    decoder = open_decoder(bundle)
    assert [decoder.fit(rows) for rows in (1, 2, 7, 8, 9, 30)] == [1, 8, 8, 8, 9, 30]


@pytest.mark.parametrize("slot", [-1, 10_000])
def test_rows_that_the_cache_has_no_room_for(bundle, here, slot):
    decoder = open_decoder(bundle)
    with pytest.raises(EngineError, match=r"rows .* do not fit the cache of \d+ slots"):
        run(decoder, 1, slot)
    assert not here.session.runs


def test_slots_are_saved_and_put_back(bundle, here):
    decoder = open_decoder(bundle)
    run(decoder, 4, 0)
    binding = here.session.runs[0][0]
    caches = [look(*binding.inputs[name]) for name in ("cache_key_00", "cache_value_00")]
    for k, cache in enumerate(caches):
        cache[:] = k + 1
    saved = decoder.copy_slots(3)
    assert saved.size == sum(cache[:, :, :3].nbytes for cache in caches)
    for cache in caches:
        cache[:] = 9
    decoder.put_slots(saved)
    for k, cache in enumerate(caches):
        assert (cache[:, :, :3] == k + 1).all()
        assert (cache[:, :, 3:] == 9).all()


def test_where_nothing_is_recorded_that_is_said(bundle, here, caplog):
    here.error = EngineError("x: this session cannot use the graph capture feature")
    with caplog.at_level(logging.WARNING):
        assert open_decoder(bundle) == "kernel by kernel"
    (record,) = caplog.records
    assert "slower than one CUDA graph: x: this session cannot" in record.getMessage()


def test_where_cuda_does_not_start_nothing_is_said_of_graphs(bundle, here, caplog, fakes):
    """The other way of opening says it."""
    here.error = EngineError("could not start CUDAExecutionProvider")
    assert open_decoder(bundle) == "kernel by kernel"
    here.error, here.cuda = None, fakes.FakeCuda(devices=0)
    assert open_decoder(bundle) == "kernel by kernel"
    assert not caplog.records


def test_a_cuda_runtime_that_is_not_found_is_said(bundle, here, caplog):
    here.cuda = None
    assert open_decoder(bundle) == "kernel by kernel"
    assert "is not found by its name" in caplog.text


def test_a_cache_that_does_not_fit(bundle, here):
    here.cuda.cudaMalloc = lambda _size: (2, None)
    with pytest.raises(EngineError, match=r"no room for the KV cache .*cudaMalloc"):
        open_decoder(bundle)


@pytest.mark.parametrize("target", ["cpu", "portable"])
def test_graphs_that_compute_on_the_cpu_are_not_tried(bundle, here, target):
    manifest = dataclasses.replace(bundle.manifest, target=load_target(target))
    assert open_decoder(dataclasses.replace(bundle, manifest=manifest)) == "kernel by kernel"
    assert not here.settings


def test_other_devices_are_not_recorded(bundle, here):
    assert open_decoder(bundle, "cpu") == "kernel by kernel"
    here.ort.get_available_providers = lambda: ["CPUExecutionProvider"]
    assert open_decoder(bundle, "") == "kernel by kernel"
    assert not here.settings


class Library:
    """A CUDA runtime that ctypes would have loaded; memory is a counter."""

    def __init__(self):
        for name in (*cudart._SIGNATURES, *cudart._GIVING, "cudaGetErrorString"):
            setattr(self, name, Function(name))


class Function:
    def __init__(self, name):
        self.name, self.calls = name, []

    def __call__(self, *arguments):
        self.calls.append(arguments)
        if self.name == "cudaGetErrorString":
            return b"out of memory"
        if self.name in cudart._GIVING:
            arguments[0]._obj.value = 64
        return 2 if self.name == "cudaFree" else 0


def test_functions_of_the_library_in_cuda_pythons_form():
    library = Library()
    cuda = cudart.Cudart(library)
    assert cuda.cudaMalloc(16) == (0, 64)
    assert cuda.cudaStreamCreateWithFlags(1) == (0, 64)
    assert cuda.cudaMemcpyAsync(1, 2, 3, 1, 7) == (0,)
    assert cuda.cudaFree(64) == (2,)
    assert Device(cuda).compute_capability == "64.64"
    assert [attribute for _, attribute, _ in library.cudaDeviceGetAttribute.calls] == [75, 76]
    assert cuda.cudaGetErrorString(2) == (0, b"out of memory")
    assert library.cudaMalloc.argtypes[1:] == (ctypes.c_size_t,)
    assert not hasattr(cuda, "cudaNothing")


def test_the_library_is_found_by_onnxruntimes_version_of_cuda(monkeypatch):
    asked = []

    def load(name):
        asked.append(name)
        return Library()

    monkeypatch.setattr(cudart.ctypes, "CDLL", load)
    assert cudart.find_cudart(SimpleNamespace(cuda_version="12.8")) is not None
    monkeypatch.setattr(cudart.sys, "platform", "win32")
    cudart.find_cudart(SimpleNamespace(cuda_version="13.0"))
    assert asked == ["libcudart.so.12", "cudart64_13.dll"]
    assert cudart.find_cudart(SimpleNamespace()) is None
    monkeypatch.setattr(cudart.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    assert cudart.find_cudart(SimpleNamespace(cuda_version="13.0")) is None
