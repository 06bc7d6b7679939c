"""Engines whose attention reads the slots in use: built by a real TensorRT-RTX, grouped or not."""

import pytest
import tensorrt_rtx as trt
from makers.families import export, find_family
from tools.engines import build_bundle

from gap_runtime import Bundle
from gap_runtime.backends.tensorrt.builder import parse
from gap_runtime.backends.tensorrt.library import make_builder, make_log
from gap_runtime.backends.tensorrt.slots import attend_to_used_slots
from gap_runtime.bundle.manifest import DECODER

HEAD_DIM = 16


@pytest.fixture(
    scope="module",
    # Both are grouped, in other numbers.
    params=[pytest.param("llava", marks=pytest.mark.matrix), "llava-next-mistral"],
)
def bundle(request, tmp_path_factory):
    """float16, native; the second has fewer heads in its cache than queries."""
    out = tmp_path_factory.mktemp("slots") / "b"
    case = find_family(request.param, tmp_path_factory, head_dim=HEAD_DIM)
    export(case.plan(out, target="rtx", dtype="float16", prune__ratios=[0.5]))
    return Bundle.open(out)


def read_decoder(bundle):
    log = make_log(trt)
    builder = make_builder(trt, log)
    path = bundle.folder / bundle.manifest.stage(DECODER).file
    network, parser = parse(trt, log, builder, path)
    return network, (builder, parser)


def list_attention(network):
    found = []
    for k in range(network.num_layers):
        layer = network.get_layer(k)
        if layer.type == trt.LayerType.ATTENTION_OUTPUT:
            layer.__class__ = trt.IAttentionOutputLayer
            found.append(layer.attention)
    return found


def test_every_masked_attention_gets_the_lengths(bundle):
    network, _alive = read_decoder(bundle)
    before, count = list_attention(network), bundle.manifest.cache.layers
    assert all(each.mask is not None for each in before)
    assert attend_to_used_slots(trt, network) == len(before) == count
    after = list_attention(network)[count:]
    assert len(after) == count
    for old, new in zip(before, after, strict=True):
        assert new.mask is None
        assert new.causal_kind == trt.CausalMaskKind.LOWER_RIGHT
        lengths = new.key_value_lengths
        assert (tuple(lengths.shape), lengths.dtype) == ((1,), trt.int32)
        for k in range(3):
            assert new.get_input(k).name == old.get_input(k).name
    # What read the old ones reads the new ones.
    given = {each.get_output(0).name for each in before}
    layers = [network.get_layer(k) for k in range(network.num_layers)]
    read = {
        layer.get_input(k).name
        for layer in layers
        for k in range(layer.num_inputs)
        if layer.get_input(k) is not None
    }
    assert not given & read


def test_heads_of_the_cache_are_not_multiplied_out(bundle):
    network, _alive = read_decoder(bundle)
    cache = bundle.manifest.stage(DECODER).inputs[-1].shape
    attend_to_used_slots(trt, network)
    for each in list_attention(network):
        assert tuple(each.get_input(1).shape) == cache
        assert tuple(each.get_input(2).shape) == cache


def test_such_an_engine_is_built(bundle):
    record = build_bundle(bundle)["decoder"]
    assert record.layers["ATTENTION_OUTPUT"] == bundle.manifest.cache.layers
    assert record.is_cache_in_place
