"""Engines built by a real TensorRT (TensorRT-RTX builds without a GPU)."""

from collections import Counter

import tensorrt_rtx as trt

from gap_runtime.backends import tensorrt as backend
from gap_runtime.bundle.engines import BuildRequest
from gap_runtime.display import Display
from gap_runtime.machines.target import load_target


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


def build_bundle(bundle, *capabilities, target="rtx"):
    """Engines of a bundle, built as `gap-runtime build` does; their records by stage."""
    request = BuildRequest(
        target=load_target(target),
        entries=bundle.manifest.ratios,
        compute_capabilities=capabilities or ("8.9",),
        options={"package": "tensorrt_rtx"},
    )
    report = backend.build(bundle, request, Display(quiet=True))
    return {engine.record.stage: engine.record for engine in report.engines}
