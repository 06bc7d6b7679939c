"""Phrases on a picture that is known get the bits that they would get alone, on every cache."""

import pytest

from gap_runtime import Bundle, Grounder
from gap_runtime.evaluation.refshapes import draw_scene

PHRASES = ("the red circle", "the ring left of the green triangle")


def make_pictures():
    return [draw_scene("test", index).image for index in range(2)]


def require_same(bundle, backend):
    """Each question alone, in a new process's state, against all of them by turns."""
    pictures, entries = make_pictures(), bundle.manifest.ratios[:2]
    grounder = Grounder(bundle, backend)
    views = [grounder.look(picture) for picture in pictures]
    alone = Grounder(bundle, backend, keep_pictures=0)
    rows = 0
    for phrase in PHRASES:
        for entry in entries:
            for picture, view in zip(pictures, views, strict=True):
                # Nothing is held, so that the prompt is computed as a whole.
                alone._open_cache()._held = None
                expected = alone.run_stages(picture, phrase, entry, draft=False).decoded
                for draft in (False, True):
                    found = grounder.run_stages(view, phrase, entry, draft=draft).decoded
                    assert found.token_ids == expected.token_ids
                    # A draft has logits of more rows than one, which round otherwise.
                    if not draft:
                        same = found.prefill_logits == expected.prefill_logits
                        assert same.all()
                rows += view.outputs[entry].rows is not None
    # The last picture at the last ratio never had to give way after its last phrase.
    assert rows >= 2 * len(PHRASES)
    return grounder


@pytest.mark.parametrize(
    ("target", "settings"),
    [
        ("cpu", {}),
        pytest.param("standard", {}, marks=pytest.mark.matrix),
        ("portable", {}),
        pytest.param("cpu", {"dtype": "float16"}, marks=pytest.mark.matrix),
        ("cpu", {"quantize__weights": "int4"}),
        pytest.param(
            "cpu",
            {"quantize__weights": "int8", "quantize__vision": True},
            marks=pytest.mark.matrix,
        ),
    ],
)
def test_a_known_picture_changes_no_bit(export, tmp_path, target, settings):
    out = export(
        "refshapes",
        tmp_path / "b",
        target=target,
        prune__ratios=[0.0, 0.5],
        reference=False,
        **settings,
    )
    require_same(Bundle.open(out), "onnxruntime:cpu")


@pytest.mark.parametrize("weights", [None, pytest.param("int4", marks=pytest.mark.matrix)])
def test_pages_give_the_same(export, tmp_path, weights):
    pytest.importorskip("openvino")
    settings = {"quantize__weights": weights} if weights else {}
    out = export(
        "refshapes",
        tmp_path / "b",
        target="openvino",
        prune__ratios=[0.0, 0.5],
        reference=False,
        **settings,
    )
    require_same(Bundle.open(out), "openvino")


@pytest.mark.parametrize(
    ("target", "is_in_place"),
    # Engines with the cache in place answer in test_tensorrt_check.py.
    [pytest.param("standard", True, marks=pytest.mark.matrix), ("portable", False)],
)
def test_engines_give_the_same_on_both_caches(
    export, build_computed, tmp_path, target, is_in_place
):
    out = export(
        "refshapes", tmp_path / "b", target=target, prune__ratios=[0.0, 0.5], reference=False
    )
    bundle, _ = build_computed(out, is_in_place=is_in_place)
    grounder = require_same(bundle, "tensorrt:rtx")
    session = grounder._open_cache().session
    assert session._cache.sides == (1 if is_in_place else 2)
    assert bundle.manifest.layout.suffix in session._engine.record.profiles
