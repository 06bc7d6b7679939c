"""Every graph is parsed and built by a real TensorRT (TensorRT-RTX builds without a GPU)."""

from collections import Counter

import pytest
import tensorrt_rtx as trt

from gap_runtime import Bundle


def build(path, profiles):
    """Layers of the parsed network and the built engine's size; fails with parser errors."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    flag = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flag)
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(path))
    assert parsed, [parser.get_error(k).desc() for k in range(parser.num_errors)]
    inputs = [network.get_input(k).name for k in range(network.num_inputs)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for name, shape in shapes.items():
            profile.set_shape(name, shape, shape, shape)
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None
    layers = (network.get_layer(k).type for k in range(network.num_layers))
    return Counter(str(kind).rpartition(".")[2] for kind in layers), inputs, engine.nbytes


@pytest.fixture(scope="module")
def bundle(export, tmp_path_factory):
    out = tmp_path_factory.mktemp("trt") / "b"
    return Bundle.open(
        export("refshapes", out, reference=False, dtype="float16", prune__ratios=[0.5])
    )


def test_the_vision_graph_builds(bundle):
    stage = bundle.manifest.stage("vision", bundle.manifest.ratios[0])
    layers, inputs, size = build(bundle.folder / stage.file, [])
    assert inputs == ["pixels"]
    assert layers["TOPK"] == 2
    assert layers["ATTENTION_OUTPUT"] == 2
    assert size > 1_000_000


def test_the_decoder_builds_with_a_prefill_and_a_step_profile(bundle):
    manifest = bundle.manifest
    stage = manifest.stage("decoder")
    width = manifest.embedding.shape[1]
    profiles = [
        {"embeddings": (1, rows, width), "position_ids": (1, rows)}
        for rows in (manifest.layout.at(manifest.ratios[0]).prompt, 1)
    ]
    layers, inputs, size = build(bundle.folder / stage.file, profiles)
    assert set(inputs) == {spec.name for spec in stage.inputs}
    assert layers["KV_CACHE_UPDATE"] == 2 * manifest.cache.layers
    assert layers["ROTARY_EMBEDDING"] == 2 * manifest.cache.layers
    assert layers["ATTENTION_OUTPUT"] == manifest.cache.layers
    assert size > 3_000_000
