"""A KV cache of int8 beside numpy in float64: scales, stored values, attention, refusals."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from gap_export.dialects import onnxruntime as onnxruntime_dialect
from gap_export.pipeline.precision import require_answers, require_cacheable
from gap_export.pipeline.request import make_request
from gap_export.quantization.cache import CacheRange, quantize_cache
from gap_export.tracing.graph import Traced
from gap_runtime.bundle.tensors import TensorSpec
from gap_runtime.errors import ConfigError
from gap_runtime.machines.target import load_target

# H query heads, G key/value heads, L cache slots, d head width, S rows.
H, G, L, D, LAYERS = 4, 2, 40, 16, 2
CACHES = [f"cache_{part}_{k:02d}" for k in range(LAYERS) for part in ("key", "value")]


def make_decoder():
    """Attention of two layers on the same queries, as the dialect writes it, with its caches."""
    float32, shape = TensorProto.FLOAT, (1, G, L, D)
    rows = {"query": H * D, "key": G * D, "value": G * D}
    given = [helper.make_tensor_value_info(n, float32, [1, "S", w]) for n, w in rows.items()]
    given += [
        helper.make_tensor_value_info("last", TensorProto.INT32, [1]),
        helper.make_tensor_value_info("total", TensorProto.INT32, []),
        *(helper.make_tensor_value_info(name, float32, shape) for name in CACHES),
    ]
    gives, nodes = [], []
    for k in range(LAYERS):
        key, value = CACHES[2 * k : 2 * k + 2]
        outputs = [f"mixed_{k}", f"next_{key}", f"next_{value}"]
        nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                [*rows, key, value, "last", "total"],
                outputs,
                domain="com.microsoft",
                num_heads=H,
                kv_num_heads=G,
                scale=D**-0.5,
            )
        )
        gives.append(helper.make_tensor_value_info(outputs[0], float32, [1, "S", H * D]))
        gives += [helper.make_tensor_value_info(name, float32, shape) for name in outputs[1:]]
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(
        helper.make_graph(nodes, "decoder", given, gives), opset_imports=opsets, ir_version=10
    )

    def specs(values):
        return tuple(
            TensorSpec(
                name=value.name,
                dtype="float32",
                shape=tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim),
                meaning="",
            )
            for value in values
        )

    return Traced(
        model=ir.from_proto(model),
        inputs=specs(given),
        outputs=specs(gives),
        parameters=frozenset(),
    )


def attend(query, key, value, stored, scales, past):
    """What one layer gives and stores, in float64: rows are rounded, written, and read back."""
    rows = query.shape[1]

    def split(x):
        return x[0].reshape(rows, -1, D).transpose(1, 0, 2).astype(np.float64)

    for array, new, scale in zip(stored, (split(key), split(value)), scales, strict=True):
        array[:, past : past + rows] = np.clip(np.rint(new / scale[0]), -128, 127)
    keys, values = (array * scale[0] for array, scale in zip(stored, scales, strict=True))
    mixed = np.zeros((rows, H, D))
    for head in range(H):
        group = head // (H // G)
        for row in range(rows):
            seen = slice(past + row + 1)
            scores = keys[group, seen] @ split(query)[head, row] / np.sqrt(D)
            weights = np.exp(scores - scores.max())
            mixed[row, head] = weights / weights.sum() @ values[group, seen]
    return mixed.reshape(1, rows, -1)


def test_a_cache_of_int8_is_attention_on_rounded_keys_and_values():
    """A prompt, steps, a draft and the text behind a known picture, on the kernel of the CPU."""
    rng = np.random.default_rng(5)
    # Some values lie beyond what the scales reach, and are clipped.
    scales = [rng.uniform(0.01, 0.04, (1, G, 1, D)).astype(np.float32) for _ in CACHES]
    traced = quantize_cache(make_decoder(), scales)
    told = {spec.name: spec.dtype for spec in (*traced.inputs, *traced.outputs)}
    assert {told[name] for cache in CACHES for name in (cache, f"next_{cache}")} == {"int8"}
    assert {told[name] for name in ("query", "mixed_0")} == {"float32"}
    model = ir.to_proto(traced.model)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    # The memory that is read is the one that is written, as in the runtime.
    memory = {name: np.zeros((1, G, L, D), np.int8) for name in CACHES}
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(a) for name, a in memory.items()}
    stored = {name: np.zeros((G, L, D)) for name in CACHES}
    past = 0
    for rows in (13, 1, 8, 5, 1):
        given = {
            "query": rng.standard_normal((1, rows, H * D), np.float32),
            "key": rng.standard_normal((1, rows, G * D), np.float32),
            "value": rng.standard_normal((1, rows, G * D), np.float32),
        }
        binding = session.io_binding()
        for name, array in given.items():
            binding.bind_cpu_input(name, array)
        binding.bind_cpu_input("last", np.array([past + rows - 1], np.int32))
        binding.bind_cpu_input("total", np.array(past + rows, np.int32))
        for k in range(LAYERS):
            binding.bind_output(f"mixed_{k}", "cpu")
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(f"next_{name}", value)
        session.run_with_iobinding(binding)
        found = binding.get_outputs()
        for k in range(LAYERS):
            pair = CACHES[2 * k : 2 * k + 2]
            expected = attend(
                *given.values(),
                [stored[name] for name in pair],
                scales[2 * k : 2 * k + 2],
                past,
            )
            assert np.abs(found[k].numpy() - expected).max() < 2e-6
        for name in CACHES:
            assert np.array_equal(memory[name][0], stored[name])
        past += rows
    assert {127, -128} <= set(np.unique(memory[CACHES[0]]))


def test_scales_are_the_largest_magnitudes_of_all_answers_by_channel():
    torch.manual_seed(2)
    cached = CacheRange()
    answers = [
        [tuple(torch.randn(G, length, D) for _ in range(2)) for _ in range(LAYERS)]
        for length in (7, 3, 9)
    ]
    answers[1][0][0][1, 2, 5] = -40.0
    # A channel that is always 0 has a scale that is not.
    for answer in answers:
        answer[1][1][0, :, 3] = 0
        cached.see(answer)
    scales = cached.scales()
    assert len(scales) == len(CACHES)
    for k, scale in enumerate(scales):
        rows = np.concatenate([a[k // 2][k % 2].numpy() for a in answers], axis=1)
        expected = np.abs(rows.astype(np.float64)).max(axis=1) / 127
        expected[expected == 0] = expected.max() / 1000
        assert scale.dtype == np.float32
        assert scale.shape == (1, G, 1, D)
        np.testing.assert_allclose(scale[0, :, 0], expected, rtol=1e-6)
    assert scales[0][0, 1, 0, 5] == np.float32(40 / 127)


@pytest.mark.parametrize("target", ["standard", "portable", "jetson-orin-jp7", "rtx"])
def test_targets_whose_attention_has_no_scales_refuse(make_plan, tiny_llava, tmp_path, target):
    with pytest.raises(ConfigError) as caught:
        make_plan(tiny_llava, tmp_path / "b", target=target, kv_cache="int8")
    assert "no attention on a KV cache of int8" in str(caught.value)
    assert f"target '{target}'" in str(caught.value)


def test_heads_that_the_operator_does_not_take_are_refused():
    target = load_target("cpu")
    with pytest.raises(ConfigError, match="multiples of 8 values, the decoder's have 20"):
        require_cacheable("int8", target, onnxruntime_dialect, 20)
    require_cacheable("int8", target, onnxruntime_dialect, 24)
    require_cacheable(None, target, onnxruntime_dialect, 20)


def test_without_answers_nothing_tells_the_scales(tiny_llava):
    request = make_request(tiny_llava, kv_cache="int8", reference=False)
    with pytest.raises(ConfigError, match="not asked for with --no-reference"):
        require_answers(request)
    require_answers(make_request(tiny_llava, kv_cache="int8"))
    require_answers(make_request(tiny_llava, reference=False))
