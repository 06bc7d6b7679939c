"""Every graph is parsed and built by a real TensorRT (TensorRT-RTX builds without a GPU)."""

import pytest
from tools.engines import build

from gap_runtime import Bundle


@pytest.fixture(scope="module")
def bundle(export, tmp_path_factory):
    out = tmp_path_factory.mktemp("trt") / "b"
    return Bundle.open(
        export(
            "refshapes",
            out,
            reference=False,
            target="standard",
            dtype="float16",
            prune__ratios=[0.5],
        )
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
