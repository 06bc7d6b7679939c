"""Graphs that are captured once are those that torch.onnx makes by capturing them twice."""

from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx.defs import get_schema
from onnx_ir.schemas import OpSignature
from onnxscript import values
from torch import nn
from torch.onnx._internal._lazy_import import onnxscript_apis
from torch.onnx._internal.exporter import _fx_passes
from torch.onnx._internal.exporter._registration import ONNXRegistry

from gap_export.tracing import converter
from gap_export.tracing.trace import trace
from gap_runtime.bundle.tensors import TensorSpec
from gap_runtime.registry import load_plugin


class Known(nn.Module):
    """What the families' modules hold that the converter has no translation for, or a long one."""

    def forward(self, x_SHd):
        rows, heads, width = x_SHd.shape
        flat_SE = x_SHd.transpose(0, 1).transpose(0, 1).flatten(1)
        flat_SE = flat_SE.reshape(rows, -1, width).flatten(1)
        table = torch.tensor([2.0, 3.0])
        mask = (flat_SE > 0) & (flat_SE.to(torch.float64) < 1)
        same = flat_SE.to(torch.float32).reshape(rows, heads * width).view(rows, heads * width)
        return 1.5 - torch.where(mask, same, 0.5).T.T * table[0] + table[1]


class Unknown(nn.Module):
    """An operator that the converter has no translation for."""

    def forward(self, x_SHd):
        return torch.special.entr(x_SHd.abs()).flatten(1)


class InPlace(nn.Module):
    """A value that is written into."""

    def forward(self, x_SHd):
        copy = x_SHd.clone()
        copy[:, 0] = 7.0
        copy.mul_(2.0)
        return copy.flatten(1)


@pytest.fixture
def decomposed(monkeypatch):
    """The programs that were captured a second time."""
    programs, decompose = [], _fx_passes.decompose_with_registry

    def count(program, registry):
        programs.append(program)
        return decompose(program, registry)

    monkeypatch.setattr(_fx_passes, "decompose_with_registry", count)
    return programs


def trace_it(kind):
    return trace(
        kind,
        dtype="float32",
        dialect=load_plugin("gap_export.dialects", "native", "dialect"),
        opset=24,
        inputs=[TensorSpec(name="x", dtype="float32", shape=("rows", 2, 3), meaning="")],
        outputs=[TensorSpec(name="y", dtype="float32", shape=("rows", 6), meaning="")],
    )


def answer(traced, x, path):
    ir.save(traced.model, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize(("kind", "captures"), [(Known, 1), (Unknown, 2), (InPlace, 2)])
def test_answers_are_torchs(kind, captures, decomposed, tmp_path):
    traced = trace_it(kind)
    assert len(decomposed) == captures - 1
    for rows in (1, 5):
        x = np.random.default_rng(rows).standard_normal((rows, 2, 3)).astype(np.float32)
        wanted = kind()(torch.from_numpy(x)).numpy()
        found = answer(traced, x, tmp_path / "graph.onnx")
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


def test_the_list_of_translations_is_the_librarys(monkeypatch):
    # Its list also has facts that take seconds to read from the source of each.
    facts = SimpleNamespace(domain="", name="")
    for kind in (values.TracedOnnxFunction, values.OnnxFunction):
        monkeypatch.setattr(kind, "function_ir", property(lambda _: facts), raising=False)
    library = onnxscript_apis.get_torchlib_ops()
    told = [(each.qualified_name, each.function, each.is_complex) for each in library]
    ours = converter._list_translations()
    assert [(each.qualified_name, each.function, each.is_complex) for each in ours] == told
    assert len(told) > 400


def test_signatures_are_read_once_and_as_the_library_reads_them():
    trace_it(Known)
    assert {"Reshape", "Sub"} <= {name for _, name, _ in converter._signatures}
    for (domain, name, version), found in converter._signatures.items():
        read = OpSignature.from_op_schema(get_schema(name, version, domain))
        assert (str(found), found.since_version) == (str(read), version)


def test_nothing_stays_replaced():
    before = [vars(ONNXRegistry)["from_torchlib"], vars(OpSignature)["from_op_schema"]]
    trace_it(Known)
    assert [vars(ONNXRegistry)["from_torchlib"], vars(OpSignature)["from_op_schema"]] == before
    assert "get_torchlib_ops" not in vars(onnxscript_apis)


def test_nodes_are_those_of_a_second_capture(monkeypatch):
    once = trace_it(Known)
    monkeypatch.setattr(converter, "rewrite", lambda _: None)
    monkeypatch.setattr(converter, "find_untranslated", lambda *_: {"all of them"})
    twice = trace_it(Known)
    assert [node.op_type for node in once.model.graph] == [
        node.op_type for node in twice.model.graph
    ]
    # Where an engine's parser would have to find a size beside a free one, the number is said.
    joined = [
        value.const_value.numpy().tolist()
        for node in once.model.graph
        if node.op_type == "Concat"
        for value in node.inputs
        if value.const_value is not None
    ]
    assert [2] in joined
    assert [-1] not in joined
