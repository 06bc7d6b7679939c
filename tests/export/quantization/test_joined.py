"""Products of the same rows as one: the same bits, its weights side by side, only where alike."""

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, parser

from gap_export.checkpoint.sources import TensorSource
from gap_export.quantization.joined import find_sources, join_products, list_parts
from gap_export.tracing.graph import Traced

# Three layers of 64 inputs in blocks of 32.
INPUTS = 64
GRAPH = """
<ir_version: 11, opset_import: ["" : 21]>
g (float[S, 64] x) => (float[S, %d] a, float[S, 16] b, float[S, 16] c)
{
  wa = DequantizeLinear <axis = 0, block_size = 32> ("m.l.q.weight.values", "m.l.q.weight.scales")
  wb = DequantizeLinear <axis = 0, block_size = 32> ("m.l.k.weight.values", "m.l.k.weight.scales")
  wc = DequantizeLinear <axis = 0, block_size = %d>
    ("m.%s.v.weight.values", "m.%s.v.weight.scales")
  z = Neg (x)
  a = MatMul (x, wa)
  kept = MatMul (x, wb)
  b = Relu (kept)
  %s
}
"""


def pack(values):
    """Two numbers in a byte, the first one in the lower half: ONNX's INT4."""
    flat = values.reshape(-1).astype(np.uint8) & 15
    return flat[::2] | flat[1::2] << 4


def make(*, first=24, block=32, parent="l", last="c = MatMul (x, wc)"):
    """The graph with random weights, and the bytes of its tensors; what may not be alike."""
    rng = np.random.default_rng(7)
    model = parser.parse_model(GRAPH % (first, block, parent, parent, last))
    tensors = {}
    for layer, count, size in (("l.q", first, 32), ("l.k", 16, 32), (f"{parent}.v", 16, block)):
        values = rng.integers(-8, 8, (INPUTS, count))
        scales = rng.uniform(0.01, 0.1, (INPUTS // size, count)).astype(np.float32)
        packed = pack(np.pad(values.reshape(-1), (0, values.size % 2)))
        tensors[f"m.{layer}.weight.values"] = (TensorProto.INT4, values.shape, packed)
        tensors[f"m.{layer}.weight.scales"] = (TensorProto.FLOAT, scales.shape, scales)
    for name, (kind, shape, array) in tensors.items():
        model.graph.initializer.append(
            onnx.helper.make_tensor(name, kind, shape, array.tobytes(), raw=True)
        )
    return onnx.shape_inference.infer_shapes(model), tensors


def join(model, tensors):
    """The joined graph with values, by the sources of the tensors that it was joined of."""
    traced = join_products(
        Traced(model=ir.from_proto(model), inputs=(), outputs=(), parameters=frozenset(tensors))
    )
    sources = {
        name: TensorSource(shape=shape, inputs=(), encode=lambda array=array: array)
        for name, (_, shape, array) in tensors.items()
    }
    for name, source in find_sources(sorted(traced.parameters), sources, axis=-1).items():
        value = traced.model.graph.initializers[name]
        assert tuple(value.shape) == source.shape
        kind, raw = value.dtype.value, source.encode().tobytes()
        made = onnx.helper.make_tensor(name, kind, source.shape, raw, raw=True)
        value.const_value = ir.from_proto(made)
    return traced, ir.to_proto(traced.model)


def run(model):
    rows = np.random.default_rng(4).standard_normal((3, INPUTS)).astype(np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return session.run(None, {"x": rows})


def test_the_same_bits_from_one_product():
    model, tensors = make()
    traced, joined = join(model, tensors)
    kinds = Counter(node.op_type for node in joined.graph.node)
    assert kinds == {"DequantizeLinear": 1, "MatMul": 1, "Split": 1, "Relu": 1}
    assert traced.parameters == {"m.l.q+k+v.weight.values", "m.l.q+k+v.weight.scales"}
    # What was joined is no longer there.
    assert {*traced.model.graph.initializers} == traced.parameters | {"m.l.q+k+v.sizes"}
    for found, wanted in zip(run(joined), run(model), strict=True):
        assert np.array_equal(found, wanted)
        assert np.abs(wanted).max() > 0
    onnx.checker.check_model(joined, full_check=True)


def test_numbers_of_eight_bits_have_one_scale_for_each_output():
    """A row of scales [N] is joined like a table of them; what is added behind stays."""
    rng = np.random.default_rng(11)
    text = """
    <ir_version: 11, opset_import: ["" : 21]>
    g (float[S, 64] x) => (float[S, 7] a, float[S, 5] b)
    {
      wa = DequantizeLinear <axis = 1> ("l.q.weight.values", "l.q.weight.scales")
      wb = DequantizeLinear <axis = 1> ("l.k.weight.values", "l.k.weight.scales")
      p = MatMul (x, wa)
      a = Add (p, bias)
      b = MatMul (x, wb)
    }
    """
    model, tensors = parser.parse_model(text), {}
    for layer, count in (("q", 7), ("k", 5)):
        values = rng.integers(-127, 128, (INPUTS, count)).astype(np.int8)
        scales = rng.uniform(0.01, 0.1, count).astype(np.float32)
        tensors[f"l.{layer}.weight.values"] = (TensorProto.INT8, values.shape, values)
        tensors[f"l.{layer}.weight.scales"] = (TensorProto.FLOAT, scales.shape, scales)
    bias = (TensorProto.FLOAT, (7,), rng.standard_normal(7).astype(np.float32))
    for name, (kind, shape, array) in (tensors | {"bias": bias}).items():
        made = onnx.helper.make_tensor(name, kind, shape, array.tobytes(), raw=True)
        model.graph.initializer.append(made)
    model = onnx.shape_inference.infer_shapes(model)
    traced, joined = join(model, tensors)
    assert traced.parameters == {"l.q+k.weight.values", "l.q+k.weight.scales"}
    for found, wanted in zip(run(joined), run(model), strict=True):
        assert np.array_equal(found, wanted)


def test_a_name_tells_its_parts():
    assert list_parts("a.b.q+k.weight.scales") == ["a.b.q.weight.scales", "a.b.k.weight.scales"]


@pytest.mark.parametrize(
    "change",
    [
        {"block": 64},
        {"parent": "o"},
        # Other rows, and a weight of two products.
        {"last": "c = MatMul (z, wc)"},
        {"last": "d = MatMul (x, wc)\n  e = MatMul (z, wc)\n  c = Sub (d, e)"},
    ],
    ids=["block", "module", "rows", "readers"],
)
def test_what_is_not_alike_stays_apart(change):
    model, tensors = make(**change)
    traced, joined = join(model, tensors)
    apart = {name for name in tensors if ".v." in name}
    assert len(apart) == 2
    assert traced.parameters == apart | {"m.l.q+k.weight.values", "m.l.q+k.weight.scales"}
    for found, wanted in zip(run(joined), run(model), strict=True):
        assert np.array_equal(found, wanted)


def test_numbers_that_do_not_fill_bytes_stay_apart():
    """Rows of an odd number of 4-bit values begin within a byte."""
    traced, _ = join(*make(first=23))
    assert {"m.l.q.weight.values", "m.l.k+v.weight.values"} < traced.parameters
