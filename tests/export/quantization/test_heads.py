"""One product for queries, keys and values: the same bits, and only where they are alike."""

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import numpy_helper, parser

from gap_export.checkpoint.sources import TensorSource
from gap_export.quantization.heads import pack_heads
from gap_export.quantization.joined import find_sources
from gap_export.tracing.graph import Traced

# Two query heads on one of keys and values, 16 wide; inputs of 32 in blocks of 16.
ROWS, WIDTH, HEAD, SLOTS = 3, 32, 16, 8
PRODUCT = "MatMulNBits <K = 32, N = {n}, bits = 4, block_size = {block}, accuracy_level = 4>"
GRAPH = """
<ir_version: 11, opset_import: ["" : 24, "com.microsoft" : 1]>
g (float[1, S, 32] x, float[1, 1, 8, 16] key, float[1, 1, 8, 16] value)
  => (float[1, S, 32] y, float[1, 1, 8, 16] next_key, float[1, 1, 8, 16] next_value)
  <float[1, S, 32] q, float[1, S, 16] k, float[1, S, 16] v,
   int32[1] last = {2}, int32 total = {3}, int64[32] order = {%s}, float[16] b = {%s}>
{
%s
}
"""
OUTPUTS = {"q": 2 * HEAD, "k": HEAD, "v": HEAD}
PARTS = ("values", "scales")


def make(change=None):
    """Such attention with random weights; `change` is what is not alike."""
    blocks = {"q": 16, "k": 16, "v": 32 if change == "blocks" else 16}
    reads = {"q": "x", "k": "z" if change == "order" else "x", "v": "x"}
    lines = ["z = Gather <axis = 2> (x, order)"] if change == "order" else []
    for name, count in OUTPUTS.items():
        product = PRODUCT.format(n=count, block=blocks[name])
        given = ", ".join([reads[name], *(f'"m.l.{name}.weight.{part}"' for part in PARTS)])
        lines.append(f"{name} = com.microsoft.{product} ({given})")
    heads = "q, k, v"
    if change == "bias":
        lines.append("kb = Add (k, b)")
        heads = "q, kb, v"
    attention = "GroupQueryAttention <num_heads = 2, kv_num_heads = 1>"
    called = f"com.microsoft.{attention} ({heads}, key, value, last, total)"
    lines.append(f"m, next_key, next_value = {called}")
    lines.append("y = Add (m, q)" if change == "another reader" else "y = Identity (m)")
    order = ", ".join(map(str, reversed(range(WIDTH))))
    text = GRAPH % (order, ", ".join(["1"] * HEAD), "\n".join(lines))
    model = parser.parse_model(text)
    rng = np.random.default_rng(3)
    for name, count in OUTPUTS.items():
        block = blocks[name]
        values = rng.integers(0, 256, (count, WIDTH // block, block // 2), dtype=np.uint8)
        scales = rng.uniform(0.01, 0.1, (count, WIDTH // block)).astype(np.float32)
        for part, array in zip(PARTS, (values, scales), strict=True):
            tensor = numpy_helper.from_array(array, f"m.l.{name}.weight.{part}")
            model.graph.initializer.append(tensor)
    return model


def run(model):
    session = onnxruntime.InferenceSession(model.SerializeToString())
    rows = np.random.default_rng(4).standard_normal((1, ROWS, WIDTH)).astype(np.float32)
    empty = np.zeros((1, 1, SLOTS, HEAD), np.float32)
    return session.run(None, {"x": rows, "key": empty, "value": empty})


def pack(model, *, joins):
    """The packed graph, with values from the sources of those that it was packed of."""
    stored = {each.name: each for each in model.graph.initializer if "weight" in each.name}
    traced = Traced(
        model=ir.from_proto(model), inputs=(), outputs=(), parameters=frozenset(stored)
    )
    packed = pack_heads(traced, joins=joins)
    sources = {
        name: TensorSource(
            shape=tuple(each.dims),
            inputs=(),
            encode=lambda data=each.raw_data: np.frombuffer(data, np.uint8),
        )
        for name, each in stored.items()
    }
    for name, source in find_sources(sorted(packed.parameters), sources).items():
        value = packed.model.graph.initializers[name]
        assert tuple(value.shape) == source.shape
        raw = source.encode().tobytes()
        made = onnx.helper.make_tensor(name, value.dtype.value, source.shape, raw, raw=True)
        value.const_value = ir.from_proto(made)
    return ir.to_proto(packed.model)


@pytest.mark.parametrize("joins", [True, False])
def test_the_same_bits_from_one_product(joins):
    model = make()
    expected = run(model)
    packed = pack(model, joins=joins)
    kinds = Counter(node.op_type for node in packed.graph.node)
    assert (kinds["MatMulNBits"], kinds["Concat"]) == (1, 0 if joins else 2)
    weights = {each.name for each in packed.graph.initializer if "weight" in each.name}
    assert len(weights) == (2 if joins else 6)
    (attention,) = [n for n in packed.graph.node if n.op_type == "GroupQueryAttention"]
    assert list(attention.input[1:3]) == ["", ""]
    for found, wanted in zip(run(packed), expected, strict=True):
        assert np.array_equal(found, wanted)
        assert np.abs(wanted).max() > 0


@pytest.mark.parametrize("joins", [True, False])
@pytest.mark.parametrize("change", ["blocks", "order", "bias", "another reader"])
def test_what_is_not_alike_stays_as_it_is(change, joins):
    model = make(change)
    run(model)
    names = [node.op_type for node in model.graph.node]
    packed = pack(model, joins=joins)
    assert [node.op_type for node in packed.graph.node] == names
