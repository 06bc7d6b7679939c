"""What a decode step costs, by counts: nodes of a layer, memory that Python takes."""

import tracemalloc
from collections import Counter

import numpy as np
import onnx
import pytest

from gap_runtime import Bundle
from gap_runtime.backends import open_backend
from gap_runtime.bundle.bundle import embedding_rows
from gap_runtime.bundle.manifest import DECODER

_SMALL_BYTES = 16 * 2**10
LAYER = "decoder.language_model.layers.2"
COMMON = {"Add": 2, "Mul": 2, "Sigmoid": 1, "RMSNormalization": 2}
STANDARD = COMMON | {"RotaryEmbedding": 2, "Attention": 1, "TensorScatter": 2, "Squeeze": 1}
STANDARD |= {"Reshape": 4, "Transpose": 4}
NODES = {
    # Seven linear layers; attention; and what puts the batch on and off where that is needed.
    ("cpu", None): COMMON | {"Gemm": 7, "GroupQueryAttention": 1, "Unsqueeze": 3, "Squeeze": 1},
    # Queries, keys and values are one product.
    ("cpu", "int4"): COMMON | {"MatMulNBits": 5, "GroupQueryAttention": 1},
    # One scale of an output becomes that of each of its blocks at load.
    ("cpu", "int8"): COMMON | {"MatMulNBits": 5, "Expand": 5, "GroupQueryAttention": 1},
    ("standard", None): STANDARD | {"Gemm": 7},
}


@pytest.mark.parametrize(("target", "weights"), NODES)
def test_a_layer_is_few_nodes(target, weights, export, tmp_path):
    settings = {"quantize__weights": weights} if weights else {}
    bundle = export("refshapes", tmp_path / "b", reference=False, target=target, **settings)
    graph = onnx.load(bundle / "decoder.onnx", load_external_data=False).graph
    found = Counter(node.op_type for node in graph.node if node.name.startswith(LAYER))
    assert found == NODES[target, weights]


def test_a_step_keeps_no_memory(refshapes_bundle):
    """All buffers are bound before: what Python makes for a step are small objects."""
    bundle = Bundle.open(refshapes_bundle)
    backend, device = open_backend("onnxruntime:cpu")
    decoder = backend.open_decoder(bundle, bundle.manifest.stage(DECODER), device)
    table = bundle.map_embedding()

    def step(slot):
        rows = embedding_rows(table, [1])[None]
        return int(np.argmax(decoder.run(rows, np.array([[slot]]), slot, np.array([0]))[0]))

    for slot in range(4):
        step(slot)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for slot in range(4, 24):
            step(slot)
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - before < _SMALL_BYTES
    assert after - before < _SMALL_BYTES
