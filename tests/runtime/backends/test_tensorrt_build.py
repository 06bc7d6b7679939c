"""Building engines with a TensorRT that is made up: what is asked of it, kept, refused."""

import dataclasses
import errno
import importlib
import io
import json
import signal
import sys
import threading
import time
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from gap_runtime.backends.tensorrt.library import make_log, write_engine
from gap_runtime.backends.tensorrt.rules import estimate_build
from gap_runtime.bundle.bundle import Bundle
from gap_runtime.bundle.engines import (
    identify_weights,
    list_profiles,
    read_engine_record,
)
from gap_runtime.bundle.onnx_file import read_onnx
from gap_runtime.cli.main import main
from gap_runtime.errors import BundleError
from gap_runtime.machines.target import load_target

WEIGHTS = b"\x01\x02" * 500
STAGES = ("vision-8", "vision-4", "decoder")


@pytest.fixture
def stages(make_stages):
    return make_stages()


@pytest.fixture
def write_bundle(make_bundle, stages, fakes):
    """A function that writes a bundle with ONNX files, changed by graph, and opens it."""

    def write(target="rtx", graphs=None):
        files = {"w.safetensors": WEIGHTS}
        for stage in stages:
            told = {
                "inputs": [each.name for each in stage.inputs],
                "outputs": [each.name for each in stage.outputs],
                "weights": [("w", "w.safetensors", 8, 900)],
                "opset": load_target(target).opset,
            }
            files[stage.file] = fakes.encode_onnx(**told | (graphs or {}).get(stage.name, {}))
        return Bundle.open(make_bundle(target=load_target(target), stages=stages, more=files))

    return write


@pytest.fixture
def install(monkeypatch, fakes):
    """A function that puts a made-up TensorRT and a made-up GPU in place."""

    def put(bundle, name="tensorrt", version="10.16.1", **cuda):
        gpu = fakes.FakeCuda(**cuda)
        trt = fakes.FakeTensorrt(name, version, gpu)
        trt.add_bundle(bundle)
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
        monkeypatch.setitem(sys.modules, name, trt)
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", gpu)
        monkeypatch.setenv("XDG_CACHE_HOME", str(bundle.folder.parent / "cache"))
        return trt

    return put


@pytest.fixture
def build(capsys):
    """A function that runs `gap-runtime build --json`: exit code, result, what people see."""

    def run(bundle, *arguments):
        capsys.readouterr()
        code = main(["build", str(bundle.folder), "--json", *arguments])
        said = capsys.readouterr()
        return code, json.loads(said.out), said.err

    return run


def refused(done, kind, *texts):
    """Assert that a build was refused with one line that says all this."""
    code, result, _ = done
    message = result["error"]["message"]
    assert (result["error"]["kind"], "\n" in message) == (kind, False)
    for text in texts:
        assert text in message
    return code


def test_engines_and_records_are_made(write_bundle, install, build):
    bundle = write_bundle()
    trt = install(bundle)
    code, result, said = build(bundle)
    assert code == 0
    folder = bundle.folder / "engines" / "rtx"
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        f"{stage}.engine{more}" for stage in STAGES for more in ("", ".json")
    )
    assert "building decoder" in said
    assert [engine["is_reused"] for engine in result["engines"]] == [False] * 3
    record = read_engine_record(folder, "decoder")
    assert (record.package, record.version) == ("tensorrt", "10.16.1")
    assert record.compute_capabilities == ("8.9",)
    assert record.profiles == (8, 12, 16, 1)
    assert record.is_cache_in_place
    assert record.device_memory_bytes == 4096
    assert record.precision == "float32"
    assert record.graph_blake3 == bundle.manifest.files["decoder.onnx"].blake3
    assert record.weights_blake3 == identify_weights(bundle)
    assert record.size == (folder / "decoder.engine").stat().st_size
    config = trt.configs[-1]
    assert config.pools == {"workspace": 2048 * 2**20}
    assert [profile.shapes["embeddings"] for profile in config.profiles] == [
        [1, rows, 2] for rows in (8, 12, 16, 1)
    ]
    # Plain TensorRT builds for the GPU that is there.
    assert config.capabilities == {}


def test_rtx_builds_for_named_gpus_without_one(write_bundle, install, build):
    bundle = write_bundle()
    trt = install(bundle, "tensorrt_rtx", "1.7.1", devices=0)
    named = ["--compute-capability", "8.9", "--compute-capability", "12.0"]
    code, result, _ = build(bundle, *named)
    assert code == 0
    assert result["folder"].endswith("engines/rtx-sm89-sm120")
    assert trt.configs[-1].capabilities == {0: 89, 1: 120}
    assert trt.configs[-1].num_compute_capabilities == 2
    assert read_engine_record(bundle.folder / "engines/rtx-sm89-sm120", "decoder").platform


def test_tensorrt_is_preferred_and_a_setting_chooses(write_bundle, install, build, monkeypatch):
    bundle = write_bundle()
    rtx = install(bundle, "tensorrt_rtx", "1.7.1")
    plain = install(bundle)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", rtx)
    assert build(bundle)[1]["package"] == plain.__name__
    assert build(bundle, "--set", "tensorrt.package=tensorrt_rtx")[1]["package"] == rtx.__name__


def test_a_good_engine_is_kept_and_the_checks_are_quick(write_bundle, install, build):
    bundle = write_bundle()
    install(bundle)
    build(bundle)
    began = time.perf_counter()
    code, result, _ = build(bundle)
    assert time.perf_counter() - began < 1
    assert (code, [engine["is_reused"] for engine in result["engines"]]) == (0, [True] * 3)
    assert [e["is_reused"] for e in build(bundle, "--force")[1]["engines"]] == [False] * 3


def test_ratios_can_be_built_one_after_the_other(write_bundle, install, build):
    bundle = write_bundle()
    install(bundle)
    first = build(bundle, "--ratio", "0.5")[1]["engines"]
    assert [engine["record"]["profiles"] for engine in first] == [[], [8, 16, 1]]
    both = build(bundle, "--ratio", "0.75")[1]["engines"]
    assert [engine["record"]["profiles"] for engine in both] == [[], [8, 12, 16, 1]]
    assert all(engine["is_reused"] for engine in build(bundle)[1]["engines"])


@pytest.mark.parametrize("damage", [b"", b"half"])
def test_a_damaged_engine_is_built_again(write_bundle, install, build, damage):
    bundle = write_bundle()
    install(bundle)
    build(bundle)
    path = bundle.folder / "engines/rtx/decoder.engine"
    whole = path.read_bytes()
    path.write_bytes(damage)
    code, result, said = build(bundle)
    assert [engine["is_reused"] for engine in result["engines"]] == [True, True, False]
    assert f"decoder.engine: the file has {len(damage)} bytes, expected {len(whole)}" in said
    assert (code, path.read_bytes()) == (0, whole)


def test_another_version_or_gpu_builds_again(write_bundle, install, build):
    bundle = write_bundle()
    install(bundle)
    build(bundle)
    install(bundle, version="10.17.0")
    assert "built with tensorrt 10.16.1, found tensorrt 10.17.0; it is built" in build(bundle)[2]
    install(bundle, version="10.17.0", capability=(8, 6))
    assert "compute capability 8.9, found 8.6; it is built again" in build(bundle)[2]


def test_a_changed_graph_builds_again(write_bundle, install, build, edit_manifest, fakes):
    bundle = write_bundle()
    install(bundle)
    build(bundle)
    stage = bundle.manifest.stages[0]
    changed = fakes.encode_onnx(inputs=["pixels"], outputs=["y"])
    (bundle.folder / stage.file).write_bytes(changed)
    edit_manifest(bundle.folder, files=describe_all(bundle))
    code, result, said = build(bundle)
    assert f"{stage.file} is another graph than the one that it was built from" in said
    assert (code, [engine["is_reused"] for engine in result["engines"]]) == (
        0,
        [False, True, True],
    )


def describe_all(bundle):
    from gap_runtime.bundle.hashes import describe_file

    entries = {name: describe_file(bundle.folder / name) for name in bundle.manifest.files}
    return {name: {"size": e.size, "blake3": e.blake3} for name, e in entries.items()}


def test_no_tensorrt(write_bundle, build, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    done = build(write_bundle())
    text = "needs tensorrt>=10.16,<12 or tensorrt_rtx>=1.3,<2, none is installed"
    assert refused(done, "backend-missing", text, "pip install 'gap-runtime[rtx]'") == 5


def test_another_tensorrt_than_the_targets(write_bundle, install, build):
    bundle = write_bundle()
    install(bundle, version="10.3.0")
    assert (
        refused(build(bundle), "engine", "needs tensorrt>=10.16,<12", "found tensorrt 10.3.0") == 5
    )


def test_no_gpu(write_bundle, install, build):
    bundle = write_bundle()
    install(bundle, devices=0)
    done = build(bundle)
    assert refused(done, "engine", "no GPU that CUDA can use", "builds on the device") == 5
    done = build(bundle, "--compute-capability", "8.9")
    assert refused(done, "config", "tensorrt builds for the GPU of this machine alone") == 2
    install(bundle, "tensorrt_rtx", "1.7.1", devices=0)
    assert refused(build(bundle), "engine", "no GPU", "--compute-capability 7.5 or 8.0") == 5


def test_no_cuda_python(write_bundle, install, build, monkeypatch):
    bundle = write_bundle()
    install(bundle)
    for name in ("cuda.bindings.runtime", "cuda.cudart"):
        monkeypatch.setitem(sys.modules, name, None)
    assert refused(build(bundle), "backend-missing", "pip install 'cuda-python>=12'") == 5


def test_a_gpu_that_the_target_is_not_for(write_bundle, install, build):
    bundle = write_bundle()
    install(bundle, capability=(9, 0))
    assert refused(build(bundle), "config", "'rtx' is for", "found 9.0", "another --target") == 2
    install(bundle, "tensorrt_rtx", "1.7.1", devices=0)
    done = build(bundle, "--compute-capability", "12.1")
    assert refused(done, "config", "does not build for compute capability 12.1", "SM120") == 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--target", "jetson"], "unknown target 'jetson'; did you mean jetson-thor"),
        (["--target", "cpu"], "runs the graphs as they are with onnxruntime"),
        (["--target", "jetson-orin-jp6"], "reads opset 19 at most (portable); export again"),
        (["--ratio", "0.1"], "no ratio 0.1; have 0.5, 0.75"),
        (["--compute-capability", "sm89"], "expected major.minor, for example 8.9"),
        (["--set", "tensorrt"], "expected KEY=VALUE, as tensorrt.package=NAME"),
        (["--set", "torch.package=x"], "the target's backend is tensorrt"),
        (["--set", "tensorrt.level=5"], "unknown setting 'tensorrt.level'"),
        (["--set", "tensorrt.package=torch"], "has no package 'torch'; have tensorrt, tensorrt_"),
        (["--timing-cache", "nowhere/timings"], "its folder does not exist; make it"),
    ],
)
def test_wrong_settings(write_bundle, install, build, arguments, text):
    bundle = write_bundle()
    install(bundle)
    done = build(bundle, *arguments)
    assert done[0] == 2
    assert text in done[1]["error"]["message"]
    assert not (bundle.folder / "engines").exists()


def test_float32_is_not_tf32_and_rtx_allocates_nothing_while_it_runs(write_bundle, install, build):
    bundle = write_bundle()
    trt = install(bundle)
    build(bundle)
    assert [config.flags for config in trt.configs] == [set()] * 3
    trt = install(bundle, "tensorrt_rtx", "1.7.1")
    build(bundle, "--force")
    assert [config.flags for config in trt.configs] == [{"require-user-allocation"}] * 3


def test_a_library_that_does_not_start(write_bundle, install, build):
    """Its bindings raise a TypeError then, as where the driver is too old for it."""
    bundle = write_bundle()
    install(bundle).starts = False
    done = build(bundle)
    text = "tensorrt 10.16.1 does not start: CUDA initialization failure with error: 35"
    assert refused(done, "engine", text, "gap-runtime doctor") == 5


def test_a_driver_that_cannot_be_loaded(write_bundle, install, build):
    """cuda-python 12.6 raises a RuntimeError where later versions give an error code."""
    bundle = write_bundle()
    install(bundle).cuda.loads_driver = False
    assert refused(build(bundle), "engine", "(Failed to dlopen libcuda.so.1)", "driver") == 5


@pytest.mark.parametrize("error", [ImportError, FileNotFoundError])
def test_a_library_that_is_installed_and_does_not_load(
    write_bundle, install, build, monkeypatch, error
):
    bundle = write_bundle()
    install(bundle)

    def load(name):
        if name == "tensorrt":
            raise error("libnvinfer.so.10: cannot open shared object file")
        return importlib.import_module(name)

    monkeypatch.setattr("gap_runtime.backends.tensorrt.library.import_module", load)
    done = build(bundle)
    text = "tensorrt is installed and does not load (libnvinfer.so.10: cannot open shared object"
    assert refused(done, "engine", text, "pip install 'gap-runtime[tensorrt]'") == 5


def test_memory_that_the_gpu_shares_with_the_machine(write_bundle, install, build, monkeypatch):
    """A Jetson's: CUDA does not count what the system would give back, and both needs add up."""
    bundle = write_bundle()
    trt = install(bundle, free=10)
    trt.cuda.is_integrated = True
    assert build(bundle)[0] == 0
    needs = estimate_build(read_onnx(bundle.folder / "decoder.onnx"), load_target("rtx"))
    free = needs.memory + needs.device // 2
    monkeypatch.setattr("gap_runtime.backends.tensorrt.rules.free_memory", lambda **_: free)
    done = build(bundle, "--force")
    assert refused(done, "engine", "of memory free, its build needs about") == 5
    trt.cuda.is_integrated, trt.cuda.free = False, 2**33
    assert build(bundle, "--force")[0] == 0


def test_too_little_disk(write_bundle, install, build, monkeypatch):
    bundle = write_bundle()
    install(bundle)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("Usage", (), {"free": 2_000_000}))
    assert refused(build(bundle), "engine", "2.0 MB free", "needs about 16.8 MB", "make room") == 5
    assert not (bundle.folder / "engines").exists()


@pytest.mark.parametrize("version", ["10.3.0", "10.16.1"])
def test_an_engine_is_written_whole_or_the_disk_says_why(fakes, version):
    """In one piece by the old version, in several by the new one, which hears no exceptions."""

    class Disk(io.BytesIO):
        room = 1000

        def write(self, data):
            if self.tell() + len(data) > self.room:
                raise OSError(errno.ENOSPC, "no space left")
            return super().write(data)

    trt = fakes.FakeTensorrt("tensorrt", version, fakes.FakeCuda())
    trt.graphs["g.onnx"] = fakes.FakeGraph(None)
    asked = (
        trt.Builder(make_log(trt)),
        SimpleNamespace(path="g.onnx"),
        SimpleNamespace(progress_monitor=Mock(), profiles=[]),
    )
    disk = Disk()
    assert write_engine(trt, *asked, disk)
    assert json.loads(disk.getvalue()) == {"path": "g.onnx", "profiles": []}
    full = Disk()
    full.room = 30
    with pytest.raises(OSError, match="no space left"):
        write_engine(trt, *asked, full)


def test_too_little_memory(write_bundle, install, build, monkeypatch):
    bundle = write_bundle()
    install(bundle)
    monkeypatch.setattr("gap_runtime.backends.tensorrt.rules.free_memory", lambda **_: 10**8)
    done = build(bundle)
    assert refused(done, "engine", "100.0 MB of memory free", "needs about 536.9 MB") == 5
    monkeypatch.undo()
    install(bundle, free=10**8)
    assert refused(build(bundle), "engine", "100.0 MB of GPU memory free") == 5


def test_estimates_grow_with_the_weights_of_the_graph(write_bundle):
    bundle = write_bundle(graphs={"decoder": {"weights": [("w", "w.safetensors", 0, 10**9)] * 2}})
    needs = estimate_build(read_onnx(bundle.folder / "decoder.onnx"), load_target("rtx"))
    assert 2.2e9 < needs.disk < 2.3e9
    assert 4.2e9 < needs.memory < 5e9


def test_profiles_are_drafts_distinct_prompts_and_the_step(manifest):
    assert list_profiles(manifest.layout, manifest.ratios) == (8, 12, 16, 1)
    assert list_profiles(manifest.layout, manifest.ratios[:1] * 2) == (8, 16, 1)


@pytest.mark.parametrize(
    ("change", "kind", "texts"),
    [
        (
            {"inputs": ["pixels", "spare"], "nodes": [("n", "Relu", "", ["pixels"])]},
            "engine",
            ["nothing reads the input 'spare'"],
        ),
        (
            {"nodes": [("where", "NonZero", "", ["pixels"])]},
            "engine",
            ["node 'where' is NonZero, whose output has no fixed size"],
        ),
        (
            {"nodes": [("own", "Norm", "com.example", ["pixels"])]},
            "engine",
            ["node 'own' is Norm, of the domain 'com.example'"],
        ),
        (
            {"nodes": [("a", "Attention", "", ["pixels", "", "", "", "", "", "pixels"])]},
            "engine",
            ["node 'a' is Attention, with the input nonpad_kv_seqlen, which TensorRT ignores"],
        ),
        ({"opset": 25}, "engine", ["opset 25, target 'rtx' reads 24 at most"]),
        (
            {"weights": [("w", "lost.safetensors", 0, 8)]},
            "bundle",
            ["lost.safetensors: missing, vision-8.onnx has its weights there"],
        ),
        (
            {"weights": [("w", "w.safetensors", 900, 200)]},
            "bundle",
            ["1000 bytes, weight 'w' ends at 1100"],
        ),
    ],
)
def test_graphs_that_are_refused_unparsed(write_bundle, install, build, change, kind, texts):
    bundle = write_bundle(graphs={"vision-8": change})
    install(bundle)
    refused(build(bundle), kind, "vision-8.onnx" if kind == "engine" else "", *texts)
    assert not (bundle.folder / "engines").exists()


def test_an_unfit_decoder_is_refused_before_any_stage_is_built(write_bundle, install, build):
    """It comes last, behind the vision engines, which take minutes."""
    bundle = write_bundle(graphs={"decoder": {"opset": 25}})
    install(bundle)
    refused(build(bundle), "engine", "decoder.onnx", "opset 25, target 'rtx' reads 24 at most")
    assert not (bundle.folder / "engines").exists()


def test_an_operator_of_a_later_opset_than_the_target_reads(write_bundle, install, build):
    node = ("attend", "Attention", "", ["pixels"])
    bundle = write_bundle("jetson-orin-jp6", graphs={"vision-8": {"nodes": [node]}})
    install(bundle, version="10.3.0", capability=(8, 7))
    text = "node 'attend' is Attention, of opset 23, target 'jetson-orin-jp6' reads 19"
    refused(build(bundle), "engine", text, "gap-export MODEL --target jetson-orin-jp6")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"dtype": "float16"}, "input 'pixels' is float16, the manifest says float32"),
        ({"shape": (1, 3, "height", 8)}, "input 'pixels' has an open dimension [1, 3, -1, 8]"),
        ({"shape": (1, 3, 9, 8)}, "input 'pixels' has the shape [1, 3, 9, 8]"),
        ({"name": "image"}, "has no input 'pixels'"),
    ],
)
def test_networks_that_are_not_the_manifests(write_bundle, install, build, change, text):
    bundle = write_bundle()
    trt = install(bundle)
    stage = bundle.manifest.stages[0]
    changed = dataclasses.replace(stage.inputs[0], **change)
    trt.graphs[stage.file].stage = dataclasses.replace(stage, inputs=(changed,))
    refused(build(bundle), "engine", "vision-8.onnx", text, "export again")
    assert not (bundle.folder / "engines").exists()


def test_parser_errors_name_node_and_operator(write_bundle, install, build):
    bundle = write_bundle()
    trt = install(bundle)
    trt.graphs["vision-8.onnx"].errors = (("a", "Det", "false"), ("b", "Foo", "no\nplugin"))
    text = "node 'a' (Det): UNSUPPORTED_NODE false; node 'b' (Foo): UNSUPPORTED_NODE no plugin"
    refused(build(bundle), "engine", "tensorrt 10.16.1 cannot read it", text)


def test_an_input_of_a_node_that_is_ignored(write_bundle, install, build):
    bundle = write_bundle()
    trt = install(bundle)
    trt.graphs["decoder.onnx"].warnings = ("Unused Input: nonpad_kv_seqlen",)
    refused(build(bundle), "engine", "ignores a part of it: Unused Input: nonpad_kv_seqlen")


def test_a_builder_error_leaves_the_old_engine_alone(write_bundle, install, build):
    bundle = write_bundle()
    trt = install(bundle)
    build(bundle)
    before = {path.name: path.read_bytes() for path in (bundle.folder / "engines/rtx").iterdir()}
    trt.build_error = "Attention operation was not\nsupported"
    done = build(bundle, "--force")
    refused(done, "engine", "could not build it: Attention operation was not supported", "float16")
    after = {path.name: path.read_bytes() for path in (bundle.folder / "engines/rtx").iterdir()}
    assert before == after


def test_ctrl_c_stops_the_build_and_leaves_nothing(write_bundle, install, capsys):
    bundle = write_bundle()
    trt = install(bundle)
    sent = []

    def interrupt(monitor):
        # Once: a second signal could come late and stop another test.
        if not sent:
            sent.append(True)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        deadline = time.monotonic() + 10
        while monitor.step_complete("Building", 0) and time.monotonic() < deadline:
            time.sleep(0.01)

    trt.stop_at = interrupt
    # Whoever started the tests in the background may have had the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["build", str(bundle.folder)]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "stopped" in capsys.readouterr().err
    assert not (bundle.folder / "engines").exists()


def test_timings_are_kept_by_device_and_version(write_bundle, install, build, tmp_path):
    bundle = write_bundle()
    install(bundle)
    build(bundle)
    path = tmp_path / "cache/gap-runtime/timing-tensorrt-10.16.1-sm89.cache"
    assert path.read_bytes() == b"timings:" * 3
    own = tmp_path / "own.cache"
    own.write_bytes(b"foreign")
    said = build(bundle, "--force", "--timing-cache", str(own))[2]
    assert "own.cache: timings of another device or version; they are measured again" in said
    assert own.read_bytes() == b"timings:" * 3


@pytest.mark.parametrize("content", [b"", b"no graph at all", b"\x3a\xff\x01", b"\xff" * 20])
def test_what_is_no_onnx_file(tmp_path, content):
    path = tmp_path / "x.onnx"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"x\.onnx: not an ONNX file"):
        read_onnx(path)


def test_an_onnx_file_is_read_without_its_package(tmp_path, fakes):
    path = tmp_path / "x.onnx"
    path.write_bytes(
        fakes.encode_onnx(
            inputs=["a", "b", "c"],
            outputs=["c"],
            nodes=[("first", "Relu", "", ["a", "w"])],
            weights=[("w", "w.safetensors", 70000, 300)],
            opset=18,
        )
    )
    found = read_onnx(path)
    assert found.opsets == {"": 18}
    assert [(node.name, node.operator) for node in found.nodes] == [("first", "Relu")]
    assert (found.inputs, found.unused) == (("a", "b", "c"), ("b",))
    weight = found.weights[0]
    assert (weight.file, weight.offset, weight.length) == ("w.safetensors", 70000, 300)
    assert found.weight_bytes == 300
