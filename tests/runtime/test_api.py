"""The runtime as a library: frames, phrases, closing, drawing, and what is refused."""

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import gap_runtime
from gap_runtime import Bundle, Grounder
from gap_runtime.errors import ConfigError, GapError, InputError
from gap_runtime.grounding.check import check_bundle
from gap_runtime.pictures.load import open_picture

PICTURE = Image.fromarray(np.random.default_rng(3).integers(0, 256, (20, 40, 3), dtype=np.uint8))


@pytest.fixture
def grounder(make_bundle, answer_with):
    answer_with(11)
    with Grounder(Bundle.open(make_bundle())) as opened:
        yield opened


def as_bytes(picture):
    file = io.BytesIO()
    picture.save(file, "png")
    return file.getvalue()


def test_a_frame_is_the_same_picture_in_every_form(tmp_path):
    PICTURE.save(tmp_path / "frame.png")
    rgb = np.asarray(PICTURE)
    forms = [
        open_picture(tmp_path / "frame.png"),
        open_picture(str(tmp_path / "frame.png")),
        open_picture(as_bytes(PICTURE)),
        open_picture(PICTURE),
        open_picture(rgb),
        open_picture(rgb[..., ::-1], order="BGR"),
        open_picture(np.asfortranarray(rgb)),
    ]
    for each in forms:
        assert np.array_equal(np.asarray(each), rgb)


@pytest.mark.parametrize(
    ("image", "order", "said"),
    [
        (np.zeros((4, 4)), "RGB", "float64 array"),
        (np.zeros((4, 4, 4), np.uint8), "RGB", "expected uint8 [height, width, 3]"),
        (7, "RGB", "a picture of type int"),
        (PICTURE, "BGR", "only arrays have an order"),
        (np.zeros((4, 4, 3), np.uint8), "bgr", "expected RGB or BGR"),
    ],
)
def test_what_is_no_picture_is_told(image, order, said):
    with pytest.raises(InputError) as raised:
        open_picture(image, order=order)
    assert said in str(raised.value)


def test_several_phrases_are_answered_in_order(grounder):
    found = grounder.ground(PICTURE, ["the red mug", "the mug"])
    assert [each.phrase for each in found] == ["the red mug", "the mug"]
    assert grounder.ground(PICTURE, ()) == ()
    one = grounder.ground(PICTURE, "the red mug")
    assert one.boxes == found[0].boxes
    assert one.score == found[0].score


@pytest.mark.parametrize("phrase", [7, None, {"the mug"}, ["the mug", 7], b"the mug"])
def test_what_is_no_phrase_is_told(grounder, phrase):
    with pytest.raises(InputError, match="a phrase of type"):
        grounder.ground(PICTURE, phrase)


def test_a_folder_in_place_of_a_bundle_is_told(make_bundle):
    with pytest.raises(ConfigError, match="open it first"):
        Grounder(str(make_bundle()))


def test_a_closed_grounder_says_so_and_can_be_closed_again(make_bundle, answer_with):
    answer_with(11)
    with Grounder(Bundle.open(make_bundle())) as grounder:
        view = grounder.look(PICTURE)
        view.ground("the mug")
        assert not repr(grounder).endswith(", closed)")
    grounder.close()
    assert repr(grounder).endswith(", closed)")
    for use in (lambda: grounder.ground(PICTURE, "the mug"), lambda: view.ground("the mug")):
        with pytest.raises(GapError, match="was closed"):
            use()


def test_the_score_is_that_of_the_digits(grounder):
    # The fake decoder gives the token of the box 1 and the eleven others 0.
    found = grounder.ground(PICTURE, "the mug")
    assert found.score == pytest.approx(np.e / (np.e + 11), rel=1e-5)
    assert found.reject_below(0.1) is found
    rejected = found.reject_below(0.5)
    assert (rejected.boxes, rejected.score) == ((), found.score)
    assert rejected.problems == (f"score {found.score:.3f} is under 0.5",)


def test_results_are_short_to_look_at(grounder):
    assert len(repr(grounder)) < 300
    found = grounder.ground(PICTURE, "the mug")
    assert repr(found) == (
        f"Grounding('the mug': (10.0 0.0 30.0 10.0), score {found.score:.2f}, kept 8 of 16)"
    )
    assert "no box" in repr(found.reject_below(1.0))


def test_draw_paints_what_was_found(grounder):
    found = grounder.ground(PICTURE, ["the mug", "the red mug"])
    painted = gap_runtime.draw(grounder.bundle, PICTURE, found)
    single = gap_runtime.draw(grounder.bundle, np.asarray(PICTURE), found[0])
    assert painted.size == single.size == (480, 240)
    # The outline of the box, 12 times as large.
    assert painted.getpixel((12 * 10 + 1, 12 * 5)) == (255, 64, 129)
    with pytest.raises(InputError, match="expected a Grounding"):
        gap_runtime.draw(grounder.bundle, PICTURE, ["the mug"])
    with pytest.raises(InputError, match="no grounding to draw"):
        gap_runtime.draw(grounder.bundle, PICTURE, [])


def test_check_takes_a_folder_and_says_what_is_wrong_with_it(make_bundle, tmp_path):
    with pytest.raises(GapError, match="no reference answers"):
        gap_runtime.check(make_bundle())
    with pytest.raises(GapError, match="no such bundle"):
        gap_runtime.check(tmp_path / "nowhere")
    assert check_bundle is not gap_runtime.check


def test_telemetry_is_off_before_onnxruntime_is_imported():
    code = """
import os, sys
from importlib import abc
os.environ.pop("ORT_DISABLE_TELEMETRY", None)
class Spy(abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "onnxruntime":
            print(os.environ.get("ORT_DISABLE_TELEMETRY"))
            raise ImportError(name)
sys.meta_path.insert(0, Spy())
from gap_runtime.backends.onnxruntime.loading import import_onnxruntime
from gap_runtime.errors import BackendMissingError
for setting in (None, "0"):
    os.environ.pop("ORT_DISABLE_TELEMETRY", None)
    if setting is not None:
        os.environ["ORT_DISABLE_TELEMETRY"] = setting
    try:
        import_onnxruntime()
    except BackendMissingError:
        pass
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "0"]
