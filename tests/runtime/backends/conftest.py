"""Stages as backends get them."""

import dataclasses
import sys

import pytest

from gap_runtime.bundle.bundle import Bundle
from gap_runtime.bundle.tensors import TensorSpec


def spec(name, dtype, *shape):
    return TensorSpec(name=name, dtype=dtype, shape=shape, meaning=f"the {name}")


@pytest.fixture
def make_stages(manifest):
    """A function that gives the manifest's stages, with all that a decoder of a dtype has."""

    def make(dtype="float32"):
        slots = manifest.layout.capacity
        caches = [spec(f"cache_{part}_00", dtype, 1, 1, slots, 2) for part in ("key", "value")]
        decoder = dataclasses.replace(
            manifest.stages[-1],
            inputs=(
                spec("embeddings", "float32", 1, "rows", 2),
                spec("position_ids", "int64", 1, "rows"),
                spec("write_slot", "int64", 1),
                spec("logits_rows", "int64", "wanted_rows"),
                *caches,
            ),
            outputs=(
                spec("logits", "float32", "wanted_rows", 12),
                *(dataclasses.replace(cache, name=f"next_{cache.name}") for cache in caches),
            ),
        )
        return (*manifest.stages[:-1], decoder)

    return make


@pytest.fixture
def decoder_bundle(make_bundle, make_stages, manifest):
    """The minimal bundle with a decoder that has all its inputs."""
    inputs = make_stages()[-1].inputs
    decoder = dataclasses.replace(manifest.stages[-1], inputs=inputs)
    return Bundle.open(make_bundle(stages=(*manifest.stages[:-1], decoder)))


@pytest.fixture
def ort(monkeypatch, decoder_bundle, fake_onnxruntime):
    """An onnxruntime that has the CPU alone; its fields say otherwise."""
    module = fake_onnxruntime.make(decoder_bundle.manifest.stages)
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", None)
    return module
