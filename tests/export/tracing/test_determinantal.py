"""The determinantal choice as one operator of torch against the loop and against determinants."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from gap_export.tracing.determinantal import choose_determinantal
from gap_export.tracing.trace import trace
from gap_runtime.bundle.tensors import TensorSpec
from gap_runtime.registry import load_plugin

POINTS = 11
LEAST = 1e-5


class Chooser(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.count = count

    def forward(self, cosine, left, weight):
        return choose_determinantal(cosine, left, weight, self.count, LEAST)


class Loop(Chooser):
    """Operator by operator, as torch traces it."""

    def forward(self, cosine, left, weight):
        index, factor = torch.arange(POINTS), None
        chosen = [(weight * left).argmax(dim=-1)]
        while len(chosen) < self.count:
            row = nn.functional.embedding(chosen[-1], cosine)
            root = torch.index_select(left, 1, chosen[-1]).sqrt()
            if factor is not None:
                own = torch.index_select(factor, 1, chosen[-1])
                row = torch.addmm(row, own.T, factor, alpha=-1)
            row = (row / root).clamp(-1.0, 1.0)
            factor = row if factor is None else torch.cat([factor, row])
            left = (left - row * row).clamp(min=LEAST)
            weight = torch.where(index == chosen[-1], -1.0, weight)
            chosen.append((weight * left).argmax(dim=-1))
        return torch.stack(chosen, dim=1)


def trace_it(kind, count, path):
    """The nodes of a module, and what runs it on (cosine, left, weight)."""
    shapes = {"cosine": (POINTS, POINTS), "left": (1, POINTS), "weight": (1, POINTS)}
    traced = trace(
        lambda: kind(count),
        dtype="float32",
        dialect=load_plugin("gap_export.dialects", "native", "dialect"),
        opset=24,
        inputs=[
            TensorSpec(name=name, dtype="float32", shape=shape, meaning="")
            for name, shape in shapes.items()
        ],
        outputs=[TensorSpec(name="order", dtype="int64", shape=(1, count), meaning="")],
    )
    ir.save(traced.model, path)
    session = onnxruntime.InferenceSession(path)

    def run(*values):
        return session.run(None, dict(zip(shapes, values, strict=True)))[0]

    return list(traced.model.graph), run


def draw(seed, width=POINTS):
    """Cosines of random directions, what is left of each, and weights."""
    generator = np.random.default_rng(seed)
    points = generator.standard_normal((POINTS, width))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    weight = generator.random((1, POINTS)) ** 2
    values = points @ points.T, np.ones((1, POINTS)), weight
    return tuple(value.astype(np.float32) for value in values)


def find_largest(values, count):
    """Points one after another, each that makes the determinant of all largest, in float64."""
    cosine, _, weight = values
    strength = np.sqrt(weight[0].astype(np.float64))
    kernel = strength[:, None] * cosine * strength
    order = []
    while len(order) < count:
        rest = [k for k in range(POINTS) if k not in order]
        sets = [np.array([*order, k]) for k in rest]
        sizes = [np.linalg.det(kernel[np.ix_(each, each)]) for each in sets]
        order.append(rest[int(np.argmax(sizes))])
    return order


@pytest.mark.parametrize("count", [2, 7])
def test_answers_are_those_of_the_loop_with_fewer_nodes(count, tmp_path):
    nodes, made = trace_it(Chooser, count, tmp_path / "made.onnx")
    loop_nodes, loop = trace_it(Loop, count, tmp_path / "loop.onnx")
    assert len(nodes) <= len(loop_nodes)
    assert {node.op_type for node in nodes} <= {*(n.op_type for n in loop_nodes), "Reshape"}
    for seed, width in enumerate((POINTS, POINTS, POINTS, 5, 2)):
        values = draw(seed, width)
        order = made(*values)
        assert order.tolist() == loop(*values).tolist()
        assert order.tolist() == Chooser(count)(*map(torch.from_numpy, values)).tolist()
        if width == POINTS:
            assert order.tolist() == [find_largest(values, count)]
