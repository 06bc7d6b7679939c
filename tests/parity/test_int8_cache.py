"""Bundles with a KV cache of int8: what they say, hold and answer, beside those without."""

import dataclasses

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from gap_runtime import Bundle, Grounder
from gap_runtime.bundle.validation import read_manifest
from gap_runtime.errors import SchemaError
from gap_runtime.evaluation.refshapes import draw_scene
from gap_runtime.grounding.check import check_bundle
from gap_runtime.pictures.boxes import Box, iou
from gap_runtime.pictures.load import load_picture

RATIO = 0.5
SCENES = 12


@pytest.fixture(scope="module")
def bundle(export, tmp_path_factory):
    """The embedded model, unpruned and at one ratio; the export compared it with PyTorch."""
    out = tmp_path_factory.mktemp("int8-cache") / "b"
    return Bundle.open(export("refshapes", out, kv_cache="int8", prune__ratios=[0.0, RATIO]))


def read_cache(grounder, slots):
    """Keys and values [G, T, d] of the slots in use, by the name of the tensor."""
    decoder = grounder._open_cache().session
    return {
        name: value.numpy()[0, :, :slots].astype(np.float64)
        for name, value in decoder._cache.inputs(0).items()
    }


def test_the_manifest_and_the_graph_say_so(bundle):
    manifest = bundle.manifest
    assert (manifest.dtype, manifest.cache.dtype) == ("float32", "int8")
    assert manifest.has_int8_cache
    assert "int8 KV cache" in repr(bundle)
    caches = [spec for spec in manifest.stage("decoder").inputs if spec.name.startswith("cache_")]
    assert len(caches) == 2 * manifest.cache.layers
    assert {spec.dtype for spec in caches} == {"int8"}


def test_scales_reach_just_what_onnxruntime_caches_without_rounding(bundle, refshapes_bundle):
    """The same questions to graphs with a float32 cache, unpruned and pruned."""
    plain, largest = Bundle.open(refshapes_bundle), {}
    with Grounder(plain, "onnxruntime:cpu") as grounder:
        for sample in bundle.manifest.reference.samples:
            view = grounder.look(load_picture(bundle.folder / sample.image))
            entry = plain.choose_ratio(0.0 if sample.ratio is None else sample.ratio)
            values = grounder.run_stages(view, sample.phrase, entry, draft=False)
            assert tuple(values.decoded.token_ids) == sample.token_ids
            # PyTorch is not asked for what would follow the stop token.
            slots = len(sample.prompt_ids) + entry.kept + len(sample.token_ids)
            for name, rows in read_cache(grounder, slots).items():
                largest[name] = np.maximum(largest.get(name, 0), np.abs(rows).max(axis=1))
    graph = onnx.load(bundle.folder / "decoder.onnx", load_external_data=False).graph
    scales = {
        each.name.removesuffix(".scale"): numpy_helper.to_array(each)
        for each in graph.initializer
        if each.name.endswith(".scale")
    }
    assert set(scales) == set(largest)
    for name, scale in scales.items():
        np.testing.assert_allclose(127 * scale[0, :, 0], largest[name], rtol=2e-4)


def test_check_has_the_gate_of_rounded_weights_for_the_decoder_alone(bundle):
    report = check_bundle(bundle, "onnxruntime:cpu")
    assert report.passed
    assert (report.precision, report.misses_allowed) == ("float32, int8 KV cache", 1)
    assert max(row.visual_error for row in report.rows) < 1e-4
    # Rounding is there, and small.
    errors = [row.relative_logit_error for row in report.rows]
    assert 1e-5 < max(errors) < 1e-2


def test_boxes_stay_and_the_cache_is_a_quarter(bundle, refshapes_bundle):
    hits, sizes = [], []
    for each in (bundle, Bundle.open(refshapes_bundle)):
        with Grounder(each, "onnxruntime:cpu") as grounder:
            scenes = [draw_scene("test", k) for k in range(SCENES)]
            found = []
            for scene in scenes:
                view = grounder.look(scene.image)
                found += [
                    (view.ground(question.phrase, ratio=RATIO), question.box)
                    for question in scene.questions
                ]
            # A picture whose rows were copied aside and put back answers as before.
            again = grounder.look(scenes[0].image)
            phrase = scenes[0].questions[0].phrase
            assert again.ground(phrase, ratio=RATIO).answer == found[0][0].answer
            right = [
                bool(answer.boxes) and iou(answer.boxes[0], Box(*map(float, box))) >= 0.5
                for answer, box in found
            ]
            hits.append(sum(right))
            decoder = grounder._open_cache().session
            values = decoder._cache.inputs(0).values()
            sizes.append(sum(value.numpy().nbytes for value in values))
    # Of 200 phrases as many boxes are right as without (docs/precision.md), not all the same.
    assert len(right) >= 2 * SCENES
    assert hits[0] >= hits[1] - 2 > 0.5 * len(right)
    assert 4 * sizes[0] == sizes[1]


def test_a_manifest_that_says_another_dtype_than_the_graphs_is_refused(bundle, tmp_path):
    """The runtime would allocate the wrong bytes."""
    wrong = dataclasses.replace(bundle.manifest.cache, dtype="float32")
    dataclasses.replace(bundle.manifest, cache=wrong).write(tmp_path)
    with pytest.raises(SchemaError, match="cache does not fit the graphs"):
        read_manifest(tmp_path)
