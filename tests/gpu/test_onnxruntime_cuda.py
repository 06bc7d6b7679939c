"""onnxruntime-gpu's real CUDA provider and every form of graph, without a GPU.

See fake_cuda.py for what is real. The counts are the contract: a step of a bundle for CUDA is one
copy in, one launch of a recorded graph, one copy out and one wait.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from tools import fake_cuda
from tools.places import ROOT

import gap_export
from gap_runtime.machines.fat_binary import ONNXRUNTIME_CUDA, list_kernels

pytestmark = pytest.mark.gpu_contract

FORMS = {
    "cuda float16": {"target": "cuda"},
    "cuda int4": {"target": "cuda", "quantize.weights": "int4"},
    "cuda int8": {"target": "cuda", "quantize.weights": "int8"},
    "cuda int8 cache": {"target": "cuda", "kv_cache": "int8"},
    "standard float16": {"target": "standard", "dtype": "float16"},
    "standard float32": {"target": "standard"},
    "cpu float16": {"target": "cpu", "dtype": "float16"},
    "cpu float32": {"target": "cpu"},
    "portable float32": {"target": "portable"},
}
RECORDED = [name for name in FORMS if name.startswith(("cuda", "standard"))]


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """A function that exports a form once and runs probe.py of it, on a GPU of some capability."""
    site, libraries = fake_cuda.prepare()
    home, bundles = tmp_path_factory.mktemp("forms"), {}

    def run(form, capability="89"):
        if form not in bundles:
            settings = dict(FORMS[form])
            bundles[form] = gap_export.export(
                "refshapes",
                ratios=0.5,
                target=settings.pop("target"),
                settings=settings,
                out=home / form.replace(" ", "-"),
                # Scales of the cache come from PyTorch's answers.
                reference="kv_cache" in settings,
            ).folder
        log = home / f"{bundles[form].name}.log"
        log.write_text("")
        return subprocess.run(
            [sys.executable, Path(__file__).with_name("probe.py"), bundles[form]],
            env=os.environ
            | {
                "PYTHONPATH": f"{site}:{ROOT / 'runtime'}",
                "LD_LIBRARY_PATH": str(libraries),
                "FAKE_CUDA_LOG": str(log),
                "FAKE_CUDA_CAPABILITY": capability,
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    return run


@pytest.fixture(scope="session")
def probe(start):
    """A function that gives what probe.py found of a form, which is run once."""
    found = {}

    def look(form):
        if form not in found:
            done = start(form)
            assert done.returncode == 0, done.stderr[-3000:]
            found[form] = json.loads(done.stdout)
        return found[form]

    return look


def count(lines):
    """How often each kind of line is there; of copies, from where to where."""
    kinds = Counter()
    for line in lines:
        kind, *rest = line.split()
        kinds[" ".join([kind, *rest[:2]]) if kind == "copy" else kind] += 1
        kinds["wait"] += "waits" in rest
    return +kinds


@pytest.mark.parametrize("form", RECORDED)
@pytest.mark.parametrize("what", ["step", "draft"])
def test_a_step_and_a_draft_are_one_launch_each(probe, form, what):
    found = probe(form)
    assert found["decoder"] == "GraphDecoder"
    for part in ("second", "third"):
        assert count(found[f"{part} {what}"]) == {
            "copy device pinned": 1,
            "launch": 1,
            "copy pinned device": 1,
            "wait": 1,
        }


@pytest.mark.parametrize("form", RECORDED)
def test_nothing_but_inputs_and_logits_is_copied(probe, form):
    found = probe(form)
    into, out = (line for line in found["third step"] if line.startswith("copy"))
    # Three small inputs lie in front of the row, each in a place of 256 bytes.
    padded = -(-found["sizes"]["embeddings"] // 256) * 256
    assert int(into.split()[3]) == padded + 3 * 256
    assert int(out.split()[3]) == found["sizes"]["logits"]
    # A prompt: no copy of a cache from one place on the device to another.
    copies = [line.split() for line in found["prefill"] if line.startswith("copy device device")]
    assert not [each for each in copies if int(each[3]) >= found["sizes"]["cache"]]


@pytest.mark.parametrize("form", RECORDED)
def test_a_graph_is_recorded_for_each_of_both_and_no_other(probe, form):
    found = probe(form)
    assert count(found["first step"])["capture"] == 1
    assert count(found["first draft"])["capture"] == 1
    assert "capture" not in count(found["prefill"])
    # What is wanted of five rows is the graph of eight.
    assert count(found["first again"])["launch"] == 1
    assert "capture" not in count(found["first again"])


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_done_that_a_device_would_refuse(probe, form):
    found = probe(form)
    for lines in (value for value in found.values() if isinstance(value, list)):
        assert not [line for line in lines if line.startswith("fault")]


@pytest.mark.parametrize("form", [name for name in FORMS if name.startswith("cuda")])
def test_no_node_of_a_bundle_for_cuda_is_on_the_cpu(probe, form):
    found = probe(form)
    assert found["elsewhere"] == []
    assert found["on_host"] == []
    assert found["said"] == []


def test_attention_for_cuda_reads_the_slots_in_use(probe):
    kernels = " ".join(probe("cuda float16")["first step"])
    assert "flash" in kernels
    assert "softmax_warp" not in kernels


def test_weights_in_four_bits_run_the_kernels_of_their_layout(probe):
    """Eight rows as well: without them the weights would be widened at every draft."""
    found = probe("cuda int4")
    for part in ("first step", "first draft"):
        kernels = " ".join(found[part])
        assert "fpA_intB_gemv" in kernels
        assert "Dequantize" not in kernels


def test_a_cache_of_int8_is_widened_at_every_call(probe):
    """Scales by channel are not what the kernel takes that would read it as it is."""
    for part in ("prefill", "first step", "first draft"):
        kernels = " ".join(probe("cuda int8 cache")[part])
        assert "DequantizeKVPair" in kernels
        assert "flash_fwd_kernel" in kernels


def test_grouped_attention_in_float32_has_its_cache_on_the_host(probe):
    """CUDA has no kernel of it: a cache on the device would be copied once and never again."""
    found = probe("cpu float32")
    assert found["decoder"] == "OnnxDecoder"
    caches = [name for name in found["on_host"] if name.startswith("cache_")]
    assert len(caches) == 10
    assert found["elsewhere"].count("GroupQueryAttention") == 1


def test_graphs_for_the_cpu_run_kernel_by_kernel(probe):
    found = probe("cpu float16")
    assert found["decoder"] == "OnnxDecoder"
    assert count(found["third step"])["kernel"] > 50
    assert any("nodes run on CPUExecutionProvider" in line for line in found["said"])


def test_the_gpus_that_the_wheel_has_kernels_for():
    """What docs/targets.md says of the wheel for x86-64."""
    site, _ = fake_cuda.prepare()
    kernels = list_kernels(site / "onnxruntime" / ONNXRUNTIME_CUDA)
    assert kernels == ("7.5", "8.0", "8.6", "8.9", "9.0a", "12.0a")


def test_another_gpu_is_refused_before_its_first_kernel(start):
    done = start("cuda float16", "100")
    assert done.returncode
    assert "7.5, 8.0, 8.6, 8.9, 9.0 and 12.0 alone, the GPU here is of 10.0" in done.stderr
