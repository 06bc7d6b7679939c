"""Engines run through a made-up CUDA: buffers, profiles, cache, graphs, refusals."""

import dataclasses
import json
import os
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from gap_runtime.backends import tensorrt as backend
from gap_runtime.bundle.bundle import Bundle
from gap_runtime.cli.main import main
from gap_runtime.errors import EngineError
from gap_runtime.grounding import grounder
from gap_runtime.machines.target import load_target

CAPACITY = 21


def compute(path, inputs):
    """A decoder whose logits show what is in the cache, a vision graph that counts."""
    if "pixels" in inputs:
        kept = 8 if "vision-8" in path else 4
        total = inputs["pixels"].sum(dtype=np.float32)
        return {
            "visual_tokens": np.full((1, kept, 2), total, np.float32),
            "kept_index": np.arange(kept)[None],
            "position_ids": np.arange(kept + 8)[None],
        }
    start, wanted = int(inputs["write_slot"][0]), inputs["logits_rows"]
    key, value = inputs["cache_key_00"].copy(), inputs["cache_value_00"].copy()
    rows = inputs["embeddings"].shape[1]
    written = inputs["embeddings"][0].astype(np.float16)
    key[0, 0, start : start + rows] = written.astype(key.dtype)
    value[0, 0, start : start + rows] = inputs["position_ids"][0, :, None].astype(value.dtype)
    logits = np.zeros((len(wanted), 12), np.float32)
    for k, row in enumerate(wanted):
        seen = slice(0, start + row + 1)
        logits[k, :4] = (
            key[0, 0, seen].astype(np.float32).sum(),
            value[0, 0, seen].astype(np.float32).sum(),
            start,
            np.abs(key[0, 0, start + rows :].astype(np.float32)).sum(),
        )
    return {"logits": logits, "next_cache_key_00": key, "next_cache_value_00": value}


@pytest.fixture
def open_bundle(make_bundle, make_stages, manifest, fakes, monkeypatch):
    """A function that makes a bundle with engines; the bundle, the library and the device."""

    def make(
        *, dtype="float16", is_in_place=True, can_capture=True, ratios=(), package="tensorrt"
    ):
        stages = make_stages(dtype)
        files = {
            stage.file: fakes.encode_onnx(
                inputs=[each.name for each in stage.inputs],
                outputs=[each.name for each in stage.outputs],
            )
            for stage in stages
        }
        folder = make_bundle(
            target=load_target("rtx"),
            stages=stages,
            cache=dataclasses.replace(manifest.cache, dtype=dtype),
            more=files,
        )
        bundle = Bundle.open(folder)
        gpu = fakes.FakeCuda(can_capture=can_capture)
        version = "1.7.1.116" if package == "tensorrt_rtx" else "10.16.1"
        trt = fakes.FakeTensorrt(package, version, gpu, compute)
        trt.add_bundle(bundle, is_in_place=is_in_place)
        for name in ("tensorrt", "tensorrt_rtx"):
            monkeypatch.setitem(sys.modules, name, trt if name == package else None)
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", gpu)
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
        arguments = [word for ratio in ratios for word in ("--ratio", str(ratio))]
        assert main(["build", str(folder), *arguments]) == 0
        return bundle, trt, gpu

    return make


def feed(decoder, answer=4):
    """A prompt and some steps; the logits of each."""
    generator = np.random.default_rng(0)
    prompt = generator.integers(-8, 8, (1, 16, 2)).astype(np.float32)
    seen = [decoder.run(prompt, np.arange(16)[None], 0, np.array([13]))[0].copy()]
    for k in range(answer):
        row = generator.integers(-8, 8, (1, 1, 2)).astype(np.float32)
        seen.append(decoder.run(row, np.array([[30 + k]]), 14 + k, np.array([0]))[0].copy())
    return np.array(seen)


def expected(dtype, answer=4):
    """The same on plain arrays."""
    cache = {f"cache_{part}_00": np.zeros((1, 1, CAPACITY, 2), dtype) for part in ("key", "value")}

    class Plain:
        def run(self, embeddings, position_ids, write_slot, logits_rows):
            inputs = {
                "embeddings": embeddings,
                "position_ids": position_ids,
                "write_slot": np.array([write_slot]),
                "logits_rows": logits_rows,
                **cache,
            }
            outputs = compute("decoder.onnx", inputs)
            cache.update({name: outputs[f"next_{name}"] for name in cache})
            return outputs["logits"]

    return feed(Plain(), answer)


@pytest.mark.parametrize("is_in_place", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_cache_lives_on_from_run_to_run(open_bundle, dtype, is_in_place):
    bundle, _, _ = open_bundle(dtype=dtype, is_in_place=is_in_place)
    decoder = backend.open_decoder(bundle, bundle.manifest.stage("decoder"), "")
    # The made-up engine holds bfloat16 in 16 bits without a sign or fraction.
    plain = {"bfloat16": "uint16"}.get(dtype, dtype)
    assert np.array_equal(feed(decoder), expected(plain))
    # A second prompt finds the first one's rows behind its own, and is not to look at them.
    assert np.array_equal(feed(decoder)[:, :3], expected(plain)[:, :3])


@pytest.mark.parametrize(("is_in_place", "graphs"), [(True, 1), (False, 2)])
def test_steps_are_captured_once_and_launched_after(open_bundle, is_in_place, graphs):
    bundle, _, gpu = open_bundle(is_in_place=is_in_place)
    decoder = backend.open_decoder(bundle, bundle.manifest.stage("decoder"), "")
    assert np.array_equal(feed(decoder, 6), expected("float16", 6))
    # Two runs of the step come before; one graph for each cache that is read.
    assert len(gpu.graphs) == graphs
    assert gpu.counts["launch"] == 4
    allocated = gpu.counts["malloc"]
    feed(decoder, 6)
    assert gpu.counts["malloc"] == allocated


def test_what_cannot_be_captured_is_run_one_by_one(open_bundle, caplog):
    bundle, _, gpu = open_bundle(can_capture=False)
    decoder = backend.open_decoder(bundle, bundle.manifest.stage("decoder"), "")
    assert np.array_equal(feed(decoder, 6), expected("float16", 6))
    assert gpu.counts["launch"] == 0
    # It is said once, and no error stays set for the next that asks CUDA.
    (record,) = caplog.records
    assert "which is slower than one CUDA graph: CUDA: cudaStreamEndCapture" in record.getMessage()
    assert gpu.last_error == 0


def test_rtx_compiles_before_it_runs_and_keeps_what_it_compiled(open_bundle):
    """By default it would serve slow kernels first, and a captured step would keep them."""
    bundle, trt, gpu = open_bundle(package="tensorrt_rtx")
    decoder = backend.open_decoder(bundle, bundle.manifest.stage("decoder"), "")
    assert np.array_equal(feed(decoder, 6), expected("float16", 6))
    assert gpu.counts["launch"] == 4
    assert len(trt.compiled) == 1
    (kept,) = bundle.folder.glob("engines/tensorrt-rtx-*/decoder.kernels")
    # The next process compiles nothing.
    again = backend.open_decoder(bundle, bundle.manifest.stage("decoder"), "")
    assert np.array_equal(feed(again), expected("float16"))
    assert len(trt.compiled) == 1
    # What is not for this machine is compiled again, and replaced.
    kept.write_bytes(b"of another driver")
    feed(backend.open_decoder(bundle, bundle.manifest.stage("decoder"), ""))
    assert len(trt.compiled) == 2
    assert kept.read_bytes().startswith(b"kernels:")
    assert not list(kept.parent.glob(".*"))
    # Nobody waits for what is no file.
    kept.unlink()
    os.mkfifo(kept)
    feed(backend.open_decoder(bundle, bundle.manifest.stage("decoder"), ""))
    assert kept.read_bytes().startswith(b"kernels:")


def test_kernels_that_cannot_be_kept(open_bundle, monkeypatch):
    bundle, _, _ = open_bundle(package="tensorrt_rtx")
    monkeypatch.setattr("gap_runtime.backends.tensorrt.kernels.provider_cache", lambda *_: None)
    decoder = backend.open_decoder(bundle, bundle.manifest.stage("decoder"), "")
    assert np.array_equal(feed(decoder), expected("float16"))
    assert not list(bundle.folder.glob("engines/*/*.kernels"))


def test_rtx_says_itself_what_cannot_be_captured(open_bundle, caplog):
    bundle, trt, gpu = open_bundle(package="tensorrt_rtx")
    trt.is_capturable = False
    decoder = backend.open_decoder(bundle, bundle.manifest.stage("decoder"), "")
    assert np.array_equal(feed(decoder, 6), expected("float16", 6))
    assert (gpu.counts["launch"], gpu.graphs) == (0, [])
    (record,) = caplog.records
    assert "tensorrt_rtx says that they cannot be captured" in record.getMessage()


def test_all_memory_is_given_back(open_bundle):
    bundle, _, gpu = open_bundle()
    decoder = backend.open_decoder(bundle, bundle.manifest.stage("decoder"), "")
    logits = decoder.run(
        np.zeros((1, 1, 2), np.float32), np.zeros((1, 1), np.int64), 0, np.array([0])
    )
    assert gpu.blocks
    del decoder, logits
    assert not gpu.blocks


LARGE = 54_321


def test_stages_share_one_scratch_memory_as_large_as_the_largest_needs(open_bundle):
    bundle, trt, gpu = open_bundle()
    vision, other, decoder = bundle.manifest.stages
    trt.scratch[vision.file] = LARGE
    sessions = [backend.open_stage(bundle, vision, ""), backend.open_stage(bundle, other, "")]
    sessions.append(backend.open_decoder(bundle, decoder, ""))
    for session in sessions[:2]:
        session.run({"pixels": np.ones((1, 3, 8, 8), np.float32)})
    assert np.array_equal(feed(sessions[2], 6), expected("float16", 6))
    used = {context().scratch for context in trt.contexts}
    assert len(used) == 1
    sizes = [len(block) for block in gpu.blocks.values()]
    assert (sizes.count(LARGE), sizes.count(4096)) == (1, 0)
    # It goes with the last of them.
    del sessions, session
    assert not gpu.blocks


def test_steps_that_are_recorded_follow_scratch_memory_that_moves(open_bundle):
    bundle, trt, gpu = open_bundle()
    decoder = backend.open_decoder(bundle, bundle.manifest.stage("decoder"), "")
    assert np.array_equal(feed(decoder, 6), expected("float16", 6))
    assert (len(gpu.graphs), gpu.counts["launch"]) == (1, 4)
    trt.scratch[bundle.manifest.stages[0].file] = LARGE
    vision = backend.open_stage(bundle, bundle.manifest.stages[0], "")
    assert 4096 not in [len(block) for block in gpu.blocks.values()]
    # The fake asserts of every launch that its scratch memory is there.
    assert np.array_equal(feed(decoder, 6)[:, :3], expected("float16", 6)[:, :3])
    assert (len(gpu.graphs), gpu.counts["launch"]) == (2, 9)
    vision.run({"pixels": np.ones((1, 3, 8, 8), np.float32)})
    feed(decoder, 2)
    assert (len(gpu.graphs), gpu.counts["launch"]) == (2, 11)


def test_scratch_memory_that_does_not_fit_leaves_the_others_theirs(open_bundle):
    bundle, trt, gpu = open_bundle()
    decoder = backend.open_decoder(bundle, bundle.manifest.stage("decoder"), "")
    trt.scratch[bundle.manifest.stages[0].file] = LARGE
    plain = gpu.cudaMalloc
    gpu.cudaMalloc = lambda size: (2, None) if size == LARGE else plain(size)
    with pytest.raises(EngineError, match="cudaMalloc"):
        backend.open_stage(bundle, bundle.manifest.stages[0], "")
    assert np.array_equal(feed(decoder), expected("float16"))


def test_engines_that_share_memory_never_run_at_once(open_bundle):
    """Whatever threads run them; those that another thread opens have memory of their own."""
    bundle, trt, _ = open_bundle()
    running, most, both = [], [], threading.Barrier(2)

    def watch(path, inputs):
        running.append(path)
        most.append(len(running))
        time.sleep(0.02)
        running.remove(path)
        return compute(path, inputs)

    trt.compute = watch
    stages, pixels = bundle.manifest.stages, {"pixels": np.ones((1, 3, 8, 8), np.float32)}

    def run(session):
        both.wait()
        session.run(pixels)

    with ThreadPoolExecutor(2) as pool:
        shared = [backend.open_stage(bundle, stage, "") for stage in stages[:2]]
        list(pool.map(run, shared))
        assert max(most) == 1
        own = [
            pool.submit(backend.open_stage, bundle, stages[0], "").result(),
            backend.open_stage(bundle, stages[1], ""),
        ]
        list(pool.map(run, own))
    assert max(most) == 2
    assert len({context().scratch for context in trt.contexts if context()}) == 2


def test_vision_engines_give_what_the_manifest_promises(open_bundle):
    bundle, _, _ = open_bundle()
    for stage, kept in zip(bundle.manifest.stages[:2], (8, 4), strict=True):
        session = backend.open_stage(bundle, stage, "")
        first = session.run({"pixels": np.ones((1, 3, 8, 8), np.float32)})
        second = session.run({"pixels": np.zeros((1, 3, 8, 8), np.float32)})
        assert first["visual_tokens"].tolist() == [[[192.0, 192.0]] * kept]
        assert second["visual_tokens"].tolist() == [[[0.0, 0.0]] * kept]
        assert first["kept_index"].dtype == np.int64
        with pytest.raises(EngineError, match=r"input of shape \(1, 3, 9, 8\)"):
            session.run({"pixels": np.ones((1, 3, 9, 8), np.float32)})


def test_rows_outside_the_cache_are_refused(open_bundle):
    bundle, _, _ = open_bundle()
    decoder = backend.open_decoder(bundle, bundle.manifest.stage("decoder"), "")
    with pytest.raises(EngineError, match="rows 21 to 21 do not fit the cache of 21 slots"):
        decoder.run(np.zeros((1, 1, 2), np.float32), np.zeros((1, 1), np.int64), 21, 0)


def test_a_ratio_that_was_not_built(open_bundle):
    bundle, _, _ = open_bundle(ratios=[0.75])
    decoder = backend.open_decoder(bundle, bundle.manifest.stage("decoder"), "")
    with pytest.raises(EngineError, match="profiles for 8, 12, 1 rows, 16 are wanted; build it"):
        decoder.run(np.zeros((1, 16, 2), np.float32), np.zeros((1, 16), np.int64), 0, 0)
    with pytest.raises(EngineError, match=r"vision-8\.engine: there is no record"):
        backend.open_stage(bundle, bundle.manifest.stages[0], "")


def test_a_grounder_takes_the_backend_by_name_and_folder(open_bundle):
    bundle, _, _ = open_bundle()
    for name in ("tensorrt", "tensorrt:rtx"):
        found = grounder.Grounder(bundle, name)
        assert found._open_cache().session.run(
            np.zeros((1, 1, 2), np.float32), np.zeros((1, 1), np.int64), 0, np.array([0])
        ).shape == (1, 12)


def refuse(bundle, *texts, folder=""):
    with pytest.raises(EngineError) as caught:
        backend.open_decoder(bundle, bundle.manifest.stage("decoder"), folder)
    message = str(caught.value)
    assert "\n" not in message
    for text in (*texts, f"gap-runtime build {bundle.folder} --target rtx"):
        assert text in message


def test_no_engines(open_bundle):
    bundle, _, _ = open_bundle()
    refuse(bundle, "rtx-sm86: no engines there; have rtx, to be chosen", folder="rtx-sm86")
    for path in (bundle.folder / "engines/rtx").iterdir():
        path.unlink()
    refuse(bundle, "engines/rtx: no engines there; build them")


@pytest.mark.parametrize(
    ("own", "advice"),
    [
        ("cpu", "export for a target that builds: gap-export MODEL --target "),
        ("standard", "target 'standard' builds none; build them for a machine that does: "),
    ],
)
def test_a_bundle_whose_target_builds_no_engines(open_bundle, own, advice):
    """Nobody is sent to `build --target cpu`, which has nothing to build."""
    bundle, _, _ = open_bundle()
    shutil.rmtree(bundle.folder / "engines")
    manifest = dataclasses.replace(bundle.manifest, target=load_target(own))
    other = dataclasses.replace(bundle, manifest=manifest)
    with pytest.raises(EngineError) as caught:
        backend.open_decoder(other, manifest.stage("decoder"), "")
    assert advice in str(caught.value)
    assert f"--target {own}" not in str(caught.value)


@pytest.mark.parametrize(("content", "size"), [(b"", 0), (b"half", 4)])
def test_an_engine_that_is_not_whole(open_bundle, content, size):
    bundle, _, _ = open_bundle()
    (bundle.folder / "engines/rtx/decoder.engine").write_bytes(content)
    refuse(bundle, f"decoder.engine: the file has {size} bytes, expected")


def test_an_engine_whose_bytes_changed(open_bundle):
    bundle, _, _ = open_bundle()
    path = bundle.folder / "engines/rtx/decoder.engine"
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    refuse(bundle, "its bytes have changed since it was built")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": "float32"}, "is float32 ["),
        ({"shape": (1, 3, 5)}, "[1, 3, 5], the manifest says"),
        ({"name": "other"}, "alone; build it again"),
    ],
)
@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_an_engine_that_takes_or_gives_something_else(open_bundle, side, change, said):
    """Its record is made again by whoever makes the engine."""
    bundle, trt, _ = open_bundle()
    stage = bundle.manifest.stage("decoder")
    *others, last = getattr(stage, side)
    other = dataclasses.replace(stage, **{side: (*others, dataclasses.replace(last, **change))})
    trt.graphs[stage.file].stage = other
    refuse(bundle, "decoder.engine: ", side[:-1], said)


def test_an_engine_for_another_gpu(open_bundle):
    bundle, _, gpu = open_bundle()
    gpu.capability = (8, 6)
    refuse(bundle, "built for GPUs of compute capability 8.9, found 8.6; build it again")


def test_an_engine_of_another_version(open_bundle):
    bundle, trt, _ = open_bundle()
    trt.__version__ = "10.17.0"
    refuse(bundle, "built with tensorrt 10.16.1, found tensorrt 10.17.0; build it again")


def test_an_engine_of_another_graph(open_bundle, edit_record):
    bundle, _, _ = open_bundle()
    edit_record(bundle, graph_blake3="0" * 64)
    refuse(bundle, "decoder.onnx is another graph than the one that it was built from")


def test_an_engine_of_other_weights(open_bundle, edit_record):
    bundle, _, _ = open_bundle()
    edit_record(bundle, weights_blake3="0" * 64)
    refuse(bundle, "the bundle's weights are other ones")


def test_an_engine_from_another_platform(open_bundle, edit_record):
    bundle, _, _ = open_bundle()
    edit_record(bundle, platform="Windows-AMD64")
    refuse(bundle, "it was built on Windows-AMD64, this is")


def test_a_record_that_is_wrong_about_the_cache(open_bundle, edit_record):
    bundle, _, _ = open_bundle()
    edit_record(bundle, is_cache_in_place=False)
    refuse(bundle, "its record does not say how it writes 'cache_key_00'", "--force")


def test_no_gpu(open_bundle):
    bundle, _, gpu = open_bundle()
    gpu.devices = 0
    with pytest.raises(EngineError, match=r"no GPU that CUDA can use .*--backend onnxruntime"):
        backend.open_decoder(bundle, bundle.manifest.stage("decoder"), "")


def test_a_machine_of_one_memory_without_room(open_bundle, monkeypatch):
    """On a Jetson the system ends a process that takes too much; a card of its own refuses."""
    bundle, _, gpu = open_bundle()
    monkeypatch.setattr("gap_runtime.backends.tensorrt.session.free_memory", lambda: 7)
    backend.open_decoder(bundle, bundle.manifest.stage("decoder"), "")
    gpu.is_integrated = True
    with pytest.raises(EngineError, match=r"0.0 GB of memory free, it takes about .*int4$"):
        backend.open_decoder(bundle, bundle.manifest.stage("decoder"), "")


def test_the_library_is_gone(open_bundle, monkeypatch):
    bundle, _, _ = open_bundle()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EngineError, match="tensorrt is not installed, with which the engine"):
        backend.open_decoder(bundle, bundle.manifest.stage("decoder"), "")


@pytest.fixture
def edit_record():
    """A function that changes keys of the decoder's record."""

    def edit(bundle, **changes):
        path = bundle.folder / "engines/rtx/decoder.engine.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit
