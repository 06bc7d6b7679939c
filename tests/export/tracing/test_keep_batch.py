"""Taking the batch along: fewer nodes, the same numbers."""

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from makers.families import find_family
from onnx import parser
from onnx.reference import ReferenceEvaluator

from gap_export.pipeline import stages
from gap_export.tracing.graph import Traced
from gap_export.tracing.keep_batch import keep_batch

HEAD = '<ir_version: 11, opset_import: ["" : 24]>'
SIGNATURE = """
    (float[1, S, 4] x, int64[1] row, float[S, 4] other) => (float[1, 4] y)
    <int64[1] zero = {0}, int64[4] order = {2, 0, 3, 1},
     float[4, 4] w = {1, 2, 0, 1, 0, 1, 3, 2, 1, 1, 0, 0, 2, 0, 1, 1}, float[4] g = {1, 2, 3, 4}>
"""
GRAPHS = {
    # Name: the lines between the first Squeeze and y, and how many Squeezes and others are left.
    "through": (
        """
        n = RMSNormalization <axis = -1> (h, g)
        m = MatMul (n, w)
        u = Unsqueeze (m, zero)
        a = Neg (u)
        s = Squeeze (a, zero)
        o = Gather <axis = 1> (s, order)
        t = Sigmoid (o)
        p = Mul (t, o)
        r = Add (h, p)
        y = Gather <axis = 0> (r, row)
        """,
        {"Squeeze": 1},
    ),
    "a product that needs two dimensions": (
        """
        n = Mul (h, h)
        m = Gemm <transB = 1> (n, w)
        k = Add (m, h)
        y = Gather <axis = 0> (k, row)
        """,
        {"Squeeze": 2},
    ),
    "with another value without a batch": (
        """
        k = Add (other, h)
        y = Gather <axis = 0> (k, row)
        """,
        {"Squeeze": 1},
    ),
    "against a third dimension": (
        """
        k = Add (h, x)
        q = Squeeze (k, zero)
        y = Gather <axis = 0> (q, row)
        """,
        {"Squeeze": 2},
    ),
    "a product and a half-precision neighbour": (
        """
        c = Cast <to = 10> (h)
        d = Cast <to = 1> (c)
        m = MatMul (d, w)
        e = Gemm (d, w)
        k = Add (m, e)
        y = Gather <axis = 0> (k, row)
        """,
        {"Squeeze": 2},
    ),
    "used with and without it": (
        """
        u = Unsqueeze (h, zero)
        v = Add (u, x)
        q = Squeeze (v, zero)
        m = Gemm (h, w)
        k = Add (m, q)
        y = Gather <axis = 0> (k, row)
        """,
        {"Squeeze": 2},
    ),
    "nothing can take it": (
        """
        m = Gemm (h, w)
        y = Gather <axis = 0> (m, row)
        """,
        {"Squeeze": 1},
    ),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_the_numbers_stay_and_nodes_go(name):
    lines, left = GRAPHS[name]
    text = f"{HEAD} graph {SIGNATURE} {{ h = Squeeze (x, zero) {lines} }}"
    before = onnx.shape_inference.infer_shapes(parser.parse_model(text), strict_mode=True)
    model = ir.from_proto(before)
    traced = Traced(model=model, inputs=(), outputs=(), parameters=frozenset())
    after = ir.to_proto(keep_batch(traced).model)
    onnx.checker.check_model(after, full_check=True)

    rng = np.random.default_rng(0)
    rows = rng.normal(size=(2, 5, 4)).astype(np.float32)
    given = {"x": rows[:1], "row": np.array([3]), "other": rows[1]}
    expected = ReferenceEvaluator(before).run(None, given)[0]
    found = ReferenceEvaluator(after).run(None, given)[0]
    assert np.array_equal(found, expected)
    counts = Counter(node.op_type for node in after.graph.node)
    assert {key: counts[key] for key in ("Squeeze", "Unsqueeze")} == {"Unsqueeze": 0} | left
    assert [output.name for output in after.graph.output] == ["y"]


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_a_quantized_decoder_takes_its_batch_to_the_end(weights, tmp_path, tmp_path_factory):
    family = find_family("llava-next-vicuna", tmp_path_factory, head_dim=16)
    plan = family.plan(tmp_path / "out", target="cpu", quantize__weights=weights)
    decoder = stages.trace_decoder(plan)
    graphs = stages.Graphs(visions=(), decoder=decoder, text=None)
    quantized = stages.quantize_graphs(plan, graphs)
    graph = quantized.decoder.model.graph
    counts = Counter(node.op_type for node in graph)
    # Of the number of rows, and of the logits.
    assert (counts["Squeeze"], counts["Unsqueeze"]) == (2, 0)
    assert graph.outputs[0].producer().op_type == "Squeeze"
