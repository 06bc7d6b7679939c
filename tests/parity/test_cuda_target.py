"""Bundles for onnxruntime's CUDA: right answers, on kernels of the CPU and on memory that is not.

The decoder with recorded steps runs here on the real onnxruntime and a CUDA whose memory is the
host's: its buffers, paddings and copies are real, the kernels are the CPU provider's.
"""

from collections import Counter

import onnx
import pytest
from tools.places import load_runtime_helper

from gap_runtime import Bundle
from gap_runtime.backends.onnxruntime import graphs, session
from gap_runtime.backends.onnxruntime.loading import open_session
from gap_runtime.grounding.check import check_bundle


@pytest.fixture(scope="module")
def bundle(export, tmp_path_factory):
    """One ratio in float16, which is the target's own, proved on the CPU by the export."""
    out = tmp_path_factory.mktemp("cuda") / "b"
    return Bundle.open(export("refshapes", out, target="cuda", prune__ratios=[0.5]))


def test_no_node_of_a_step_is_about_shapes(bundle):
    """Those would run on the CPU, and a step that needs it cannot be recorded."""
    graph = onnx.load(bundle.folder / "decoder.onnx", load_external_data=False).graph
    kinds = Counter(node.op_type for node in graph.node)
    assert kinds["GroupQueryAttention"] == bundle.manifest.cache.layers
    assert not {"Shape", "Size", "ConstantOfShape", "Range"} & set(kinds)
    made = {output: node for node in graph.node for output in node.output}
    known = {each.name for each in graph.initializer}
    for node in graph.node:
        if node.op_type == "GroupQueryAttention":
            total = node.input[6]
            while total not in known and made[total].op_type != "Constant":
                (total,) = made[total].input
    assert bundle.manifest.dtype == "float16"


def test_weights_in_four_bits_have_the_blocks_that_its_kernels_take(export, tmp_path):
    out = export(
        "refshapes", tmp_path / "b", target="cuda", reference=False, quantize__weights="int4"
    )
    graph = onnx.load(out / "decoder.onnx", load_external_data=False).graph
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert {node.name.rpartition("/")[0].rpartition(".")[2] for node in products} >= {"q_proj"}
    for node in products:
        values = {each.name: each.i for each in node.attribute}
        # Its fast kernels take two blocks at a time; the rest run on those for small blocks.
        expected = 32 if values["K"] % 64 == 0 else 16
        assert (values["bits"], values["block_size"]) == (4, expected)
        # Values and scales; those kernels take no zero points and no bias.
        assert len(node.input) == 3


class OnHost:
    """A session of the CPU provider that takes the addresses of a device which is the host."""

    def __init__(self, real):
        self.real, self.graphs = real, Counter()

    def __getattr__(self, name):
        return getattr(self.real, name)

    def io_binding(self):
        binding = self.real.io_binding()
        for name in ("bind_input", "bind_output"):
            plain = getattr(binding, name)
            setattr(
                binding, name, lambda each, _device, *rest, plain=plain: plain(each, "cpu", *rest)
            )
        return binding

    def run_with_iobinding(self, binding, options):
        self.graphs[options.get_run_config_entry("gpu_graph_id")] += 1
        self.real.run_with_iobinding(binding, options)


def test_recorded_steps_give_the_answers_of_the_reference(bundle, monkeypatch):
    cuda, opened = load_runtime_helper("fake_tensorrt").FakeCuda(), []

    def open_on_host(ort, found, stage, _device, *, settings):
        assert settings["enable_cuda_graph"] == "1"
        opened.append(OnHost(open_session(ort, found, stage, "cpu")))
        return opened[-1]

    def open_decoder(found, stage, _device):
        ort = session.import_onnxruntime()
        return graphs.open_graph_decoder(ort, found, stage)

    monkeypatch.setattr(graphs, "find_cudart", lambda _ort: cuda)
    monkeypatch.setattr(graphs, "open_session", open_on_host)
    monkeypatch.setattr("gap_runtime.backends.onnxruntime.open_decoder", open_decoder)
    plain = session.open_stage
    monkeypatch.setattr(
        "gap_runtime.backends.onnxruntime.open_stage",
        lambda found, stage, _device: plain(found, stage, "cpu"),
    )
    report = check_bundle(bundle, "onnxruntime:cuda")
    assert report.passed
    counts = sum((each.graphs for each in opened), Counter())
    # Prompts; steps without drafts; drafts, and the text behind a known picture.
    assert set(counts) == {"-1", "1", "8"}
    assert counts["1"] > counts["8"] > 0
