"""Quantized weights: schemes, rounding, packing, smoothing, and what exports say of them."""

import math
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from gap_export.checkpoint.sources import TensorSource, make_tensor
from gap_export.config.load import load_config
from gap_export.interfaces.decoder import SmoothingGroup
from gap_export.interfaces.family import InputStatistics
from gap_export.pipeline.plan import plan_export
from gap_export.pipeline.request import make_request
from gap_export.quantization.awq import smooth_model
from gap_export.quantization.scheme import SCALES, VALUES, Scheme, choose_scheme
from gap_export.quantization.values import Smoothing, quantize_sources, round_weight
from gap_runtime.errors import ConfigError

INT8, INT4 = Scheme(dtype="int8", block=None), Scheme(dtype="int4", block=32)


def held(values):
    """A source of a tensor that lies in no file."""
    return TensorSource(shape=tuple(values.shape), inputs=(), make=values.clone)


def random_weight(outputs=24, inputs=64, seed=0):
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


def round_plainly(weight, scheme):
    """Values and scales of every block by the definition, in float64, one by one."""
    limit = 127 if scheme.dtype == "int8" else 7
    size = scheme.block or weight.shape[1]
    values, scales = np.zeros(weight.shape), []
    for row, line in enumerate(weight.double().numpy()):
        scales.append([])
        for start in range(0, len(line), size):
            block = line[start : start + size]
            scale = float(np.float32(max(abs(v) for v in block)) / np.float32(limit))
            scales[-1].append(scale)
            for k, value in enumerate(block):
                values[row, start + k] = math.floor(value / scale + 0.5)
    return values, np.array(scales)


@pytest.mark.parametrize(
    ("dtype", "shape", "expected"),
    [
        ("int8", (8, 64), Scheme(dtype="int8", block=None)),
        ("int4", (8, 4096), Scheme(dtype="int4", block=128)),
        ("int4", (8, 192), Scheme(dtype="int4", block=64)),
        ("int4", (8, 48), Scheme(dtype="int4", block=16)),
        ("int4", (8, 40), None),
        ("int8", (8, 40), None),
        ("int4", (64,), None),
        ("int8", (8, 3, 16, 16), None),
    ],
)
def test_schemes(dtype, shape, expected):
    assert choose_scheme(dtype, shape) == expected


@pytest.mark.parametrize(
    ("inputs", "block"), [(4096, 32), (64, 32), (96, 16), (352, 16), (48, 16), (40, None)]
)
def test_schemes_for_kernels_of_small_blocks(inputs, block):
    """They take two blocks at a time."""
    found = choose_scheme("int4", (8, inputs), block=32)
    assert (found and found.block) == block


@pytest.mark.parametrize("scheme", [INT8, INT4], ids=lambda s: s.dtype)
def test_rounding_is_to_the_nearest_of_the_largest_of_each_block(scheme):
    weight = random_weight()
    values, scales = round_weight(weight, scheme, "float32")
    wanted, wanted_scales = round_plainly(weight, scheme)
    np.testing.assert_allclose(scales.numpy(), wanted_scales, rtol=1e-6)
    # A value that lies in the middle may go either way.
    assert np.abs(values.numpy() - wanted).max() <= 1
    assert (values.numpy() == wanted).mean() > 0.999


def test_a_scale_is_the_one_that_is_stored():
    """Rounding the scale to the model's dtype afterwards would shift every value of the block."""
    weight = random_weight() * 1e-3
    values, scales = round_weight(weight, INT4, "float16")
    assert torch.equal(scales, scales.half().float())
    made = values.reshape(24, 2, 32) * scales[..., None]
    assert ((made.reshape(24, 64) - weight).abs() <= scales.repeat_interleave(32, 1) * 0.501).all()


def test_a_block_of_zeros_has_a_scale():
    values, scales = round_weight(torch.zeros(4, 32), INT4, "float16")
    assert values.abs().max() == 0
    assert (scales > 0).all()


def test_known_importance_loses_less_of_what_counts():
    weight = random_weight(64, 128)
    weight[:, 3] *= 12  # an outlier that widens every block and counts for little
    importance = torch.ones(128)
    importance[3] = 1e-3
    scheme = Scheme(dtype="int4", block=128)

    def loss(smoothing):
        values, scales = round_weight(weight, scheme, "float32", smoothing)
        return float(((values * scales - weight).square() * importance).sum())

    assert loss(Smoothing(importance=importance)) < 0.9 * loss(Smoothing())


@pytest.mark.parametrize("scheme", [INT8, INT4], ids=lambda s: s.dtype)
def test_stored_bytes_are_what_onnx_reads(scheme):
    weight = random_weight()
    made = quantize_sources({"w": held(weight)}, {"w": scheme}, {}, dtype="float16")
    values, scales = made["w" + VALUES], made["w" + SCALES]
    assert (values.dtype, values.shape, scales.shape) == (
        scheme.dtype,
        (64, 24),
        (24,) if scheme.block is None else (2, 24),
    )
    kind = onnx.TensorProto.INT8 if scheme.dtype == "int8" else onnx.TensorProto.INT4
    stored = onnx.TensorProto(data_type=kind, dims=[64, 24], raw_data=values.encode().tobytes())
    expected, expected_scales = round_weight(weight, scheme, "float16")
    assert np.array_equal(numpy_helper.to_array(stored).astype(np.float32), expected.T.numpy())
    found = np.frombuffer(scales.encode().tobytes(), np.float16).reshape(scales.shape)
    assert np.array_equal(found, expected_scales.T.half().numpy().reshape(scales.shape))


@pytest.mark.parametrize(("plain", "block", "blocks"), [(INT4, 16, 2), (INT8, 32, 1)])
def test_stored_bytes_are_what_the_fused_kernel_reads(plain, block, blocks):
    """By the operator's own formula: [out, block, byte], the first value in the lower half."""
    weight, scheme = random_weight(), replace(plain, is_fused=True)
    weight[0, 0] = -2 * weight.abs().max()
    made = quantize_sources({"w": held(weight)}, {"w": scheme}, {}, dtype="float16")
    values, scales = made["w" + VALUES], made["w" + SCALES]
    assert (values.dtype, values.shape, scales.shape) == ("uint8", (24, 2, block), (24, blocks))
    packed = values.encode().reshape(24, -1).astype(int)
    if plain is INT4:
        found = np.stack([packed & 15, packed >> 4], axis=-1).reshape(24, 64) - 8
    else:
        found = packed - 128
    expected, expected_scales = round_weight(weight, plain, "float16")
    assert np.array_equal(found, expected.numpy())
    stored = np.frombuffer(scales.encode().tobytes(), np.float16).reshape(24, blocks)
    assert np.array_equal(stored, expected_scales.half().numpy())


def test_both_tensors_can_be_had_in_any_order_and_again():
    weight = random_weight()
    made = quantize_sources({"w": held(weight)}, {"w": INT4}, {}, dtype="float32")
    scales, values = made["w" + SCALES].encode(), made["w" + VALUES].encode()
    assert np.array_equal(values, made["w" + VALUES].encode())
    assert np.array_equal(scales, made["w" + SCALES].encode())


@pytest.fixture
def smoothed():
    """A norm, two readers of it, and a layer that reads one of them; then what became of them."""
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "norm": torch.rand(64, generator=generator) + 0.5,
        "first": random_weight(32, 64, 2),
        "second": random_weight(48, 64, 3),
        "last": random_weight(16, 48, 4),
    }
    inputs = torch.randn(500, 64, generator=generator) * torch.logspace(-1, 1.5, 64)
    between = inputs @ tensors["second"].T
    statistics = {
        name: InputStatistics(
            mean_size=seen.abs().mean(0).double(), mean_square=seen.square().mean(0).double()
        )
        for name, seen in {"first": inputs, "second": inputs, "last": between}.items()
    }
    sources = {name: held(value) for name, value in tensors.items()}
    schemes = {name: choose_scheme("int4", tensors[name].shape) for name in statistics}
    groups = [
        SmoothingGroup(maker="norm", readers=("first", "second")),
        SmoothingGroup(maker="second", readers=("last",)),
    ]
    found = smooth_model(sources, schemes, groups, statistics, dtype="float32")
    return tensors, inputs, sources, schemes, found


def test_scaling_leaves_the_model_the_same(smoothed):
    tensors, _, _, _, found = smoothed
    norm = make_tensor(found.sources["norm"])
    first, second, last = (found.smoothings[name] for name in ("first", "second", "last"))
    assert torch.equal(first.columns, second.columns)
    torch.testing.assert_close(norm * first.columns, tensors["norm"])
    torch.testing.assert_close(second.rows * last.columns, torch.ones(48))
    assert first.rows is None
    assert last.rows is None


def test_scaling_loses_less_on_inputs_of_unlike_sizes(smoothed):
    tensors, inputs, _, schemes, found = smoothed
    weight = tensors["first"]

    def loss(smoothing):
        columns = torch.ones(64) if smoothing.columns is None else smoothing.columns
        values, scales = round_weight(weight * columns, schemes["first"], "float32", smoothing)
        made = values * scales.repeat_interleave(schemes["first"].block, 1) / columns
        return float((inputs @ (made - weight).T).square().mean())

    assert loss(found.smoothings["first"]) < 0.7 * loss(Smoothing())


def test_a_reader_that_stays_as_it_is_keeps_its_group_unscaled(smoothed):
    tensors, _, sources, schemes, _ = smoothed
    statistics = {
        name: InputStatistics(
            mean_size=torch.rand(tensors[name].shape[1]).double(),
            mean_square=torch.rand(tensors[name].shape[1]).double(),
        )
        for name in ("first", "second")
    }
    group = SmoothingGroup(maker="norm", readers=("first", "second"))
    del schemes["second"]
    found = smooth_model(sources, schemes, [group], statistics, dtype="float32")
    assert found.sources == {}
    assert found.smoothings["first"].columns is None


def test_a_layer_that_makes_an_input_and_stays_as_it_is_is_divided_by_rows():
    """A square one, so that nothing but the answer tells rows from columns."""
    generator = torch.Generator().manual_seed(5)
    maker, reader = random_weight(64, 64, 6), random_weight(32, 64, 7)
    inputs = torch.randn(200, 64, generator=generator)
    between = inputs @ maker.T * torch.logspace(-1, 1.5, 64)
    seen = InputStatistics(
        mean_size=between.abs().mean(0).double(), mean_square=between.square().mean(0).double()
    )
    found = smooth_model(
        {"maker": held(maker), "reader": held(reader)},
        {"reader": choose_scheme("int4", reader.shape)},
        [SmoothingGroup(maker="maker", readers=("reader",))],
        {"reader": seen},
        dtype="float32",
    )
    scaled = reader * found.smoothings["reader"].columns
    answer = inputs @ make_tensor(found.sources["maker"]).T @ scaled.T
    torch.testing.assert_close(answer, inputs @ maker.T @ reader.T, atol=1e-3, rtol=1e-3)


def refusal(target="cpu", *, reference=False, **overrides):
    settings = {key.replace("__", "."): value for key, value in overrides.items()}
    request = make_request("refshapes", settings=settings, target=target, reference=reference)
    with pytest.raises(ConfigError) as caught:
        plan_export(request)
    return str(caught.value)


def test_what_cannot_be_quantized_is_refused():
    assert "int4 weights need opset 21" in refusal("portable", quantize__weights="int4")
    assert "--quantize int8" in refusal("portable", quantize__weights="int4")
    awq = refusal(quantize__weights="int4", quantize__method="awq")
    assert "--no-reference leaves out" in awq
    off = dict.fromkeys(("quantize__decoder", "quantize__head", "quantize__vision"), False)
    assert "are all off" in refusal(quantize__weights="int8", **off)
    with pytest.raises(ConfigError, match=r"weights 'int3' is unknown; did you mean int8"):
        load_config("refshapes", {"quantize.weights": "int3"})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dtype_that_a_target_has_no_kernels_for_is_refused(dtype):
    assert refusal("cuda", dtype=dtype) == (
        f"target 'cuda' has no kernels for {dtype}; use --dtype float16, or --target standard"
    )


@pytest.mark.parametrize(
    ("weights", "reference", "method"),
    [("int8", True, "nearest"), ("int4", True, "awq"), ("int4", False, "nearest")],
)
def test_the_usual_method(weights, reference, method):
    plan = plan_export(make_request("refshapes", quantize=weights, reference=reference))
    assert plan.quantization.method == method
    assert plan.quantization.parts == ("decoder", "head")
