"""Farthest points as one operator of torch against the loop, traced operator by operator."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from gap_export.tracing import trace as tracing
from gap_export.tracing.farthest import choose_farthest
from gap_export.tracing.tidy import tidy
from gap_export.tracing.trace import trace
from gap_runtime.bundle.tensors import TensorSpec
from gap_runtime.registry import load_plugin

POINTS = 9


class Chooser(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.count = count

    def forward(self, distance, first):
        return choose_farthest(distance, first, self.count)


class Loop(Chooser):
    def forward(self, distance, first):
        chosen = [first]
        for step in range(1, self.count):
            row = nn.functional.embedding(chosen[-1], distance)
            nearest = row if step == 1 else torch.minimum(nearest, row)  # noqa: F821
            chosen.append(nearest.argmax(dim=-1))
        return torch.cat(chosen, dim=1)


def trace_it(kind, count):
    return trace(
        lambda: kind(count),
        dtype="float32",
        dialect=load_plugin("gap_export.dialects", "native", "dialect"),
        opset=24,
        inputs=[
            TensorSpec(name="distance", dtype="float32", shape=(POINTS, POINTS), meaning=""),
            TensorSpec(name="first", dtype="int64", shape=(1, 1), meaning=""),
        ],
        outputs=[TensorSpec(name="order", dtype="int64", shape=(1, count), meaning="")],
    )


@pytest.mark.parametrize("count", [2, 7])
def test_nodes_and_answers_are_those_of_the_loop(count, tmp_path):
    made, loop = trace_it(Chooser, count), trace_it(Loop, count)
    assert [node.op_type for node in made.model.graph] == [
        node.op_type for node in loop.model.graph
    ]
    points = np.random.default_rng(3).standard_normal((POINTS, 4)).astype(np.float32)
    distance = np.linalg.norm(points[:, None] - points, axis=-1)
    np.fill_diagonal(distance, -1)
    ir.save(made.model, tmp_path / "made.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "made.onnx")
    (order,) = session.run(None, {"distance": distance, "first": np.array([[4]])})

    expected = [4]
    while len(expected) < count:
        rest = [k for k in range(POINTS) if k not in expected]
        expected.append(max(rest, key=lambda k: distance[k, expected].min()))
    assert order.tolist() == [expected]
    eager = Chooser(count)(torch.from_numpy(distance), torch.tensor([[4]]))
    assert eager.tolist() == [expected]


def test_no_pass_sees_a_choice_written_out(monkeypatch):
    seen = []

    def look(traced):
        seen.extend(node.op_type for node in traced.model.graph)
        return tidy(traced)

    monkeypatch.setattr(tracing, "tidy", look)
    made = trace_it(Chooser, 7)
    assert seen.count("ChooseFarthest") == 1
    assert "ArgMax" not in seen
    assert [node.op_type for node in made.model.graph].count("ArgMax") == 6
    # Its own domain is gone with it, and nodes are called after their module.
    assert set(made.model.opset_imports) == {""}
