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
def probe(tmp_path_factory):
    """A function that gives what probe.py found of a form, which is exported and run once."""
    site, libraries = fake_cuda.prepare()
    home, found = tmp_path_factory.mktemp("forms"), {}

    def look(form):
        if form not in found:
            settings = dict(FORMS[form])
            bundle = gap_export.export(
                "refshapes",
                ratios=0.5,
                target=settings.pop("target"),
                settings=settings,
                out=home / form.replace(" ", "-"),
                # Scales of the cache come from PyTorch's answers.
                reference="kv_cache" in settings,
            ).folder
            log = home / f"{bundle.name}.log"
            log.touch()
            done = subprocess.run(
                [sys.executable, Path(__file__).with_name("probe.py"), bundle],
                env=os.environ
                | {
                    "PYTHONPATH": f"{site}:{ROOT / 'runtime'}",
                    "LD_LIBRARY_PATH": str(libraries),
                    "FAKE_CUDA_LOG": str(log),
                },
                capture_output=True,
                text=True,
                check=False,
                timeout=120,
            )
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
