"""The part of the ROS 2 example that is not ROS: messages' pixels, and boxes for messages."""

import ast
import importlib.util
import sys

import numpy as np
import pytest
from PIL import Image
from tools.places import ROOT

import gap_runtime
from gap_runtime import Bundle, Grounder

HOME = ROOT / "examples" / "ros2"
PICTURE = ROOT / "refshapes" / "samples" / "test-006.png"
PHRASE = "the top yellow circle"


@pytest.fixture(scope="module")
def frames():
    spec = importlib.util.spec_from_file_location("frames", HOME / "frames.py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "frames", module)
        spec.loader.exec_module(module)
    return module


def pack(pixels, padding):
    """Rows of bytes with some more behind each, as cameras send them."""
    height, width = pixels.shape[:2]
    rows = np.full((height, pixels[0].size + padding), 77, np.uint8)
    rows[:, : pixels[0].size] = pixels.reshape(height, -1)
    return {"data": rows.tobytes(), "height": height, "width": width, "step": rows.shape[1]}


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("encoding", ["rgb8", "bgr8", "rgba8", "bgra8", "mono8"])
def test_pixels_of_every_encoding(frames, encoding, padding):
    rgb = np.random.default_rng(3).integers(0, 256, (7, 11, 3), np.uint8)
    if encoding == "mono8":
        rgb[:] = rgb[:, :, :1]
        sent = rgb[:, :, :1]
    else:
        sent = rgb[:, :, ::-1] if encoding.startswith("bgr") else rgb
        if "a" in encoding:
            sent = np.concatenate([sent, np.full((7, 11, 1), 9, np.uint8)], axis=2)
    pixels, order = frames.read_frame(encoding=encoding, **pack(sent, padding))
    assert np.array_equal(pixels if order == "RGB" else pixels[:, :, ::-1], rgb)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"encoding": "16UC1"}, "encoding 16UC1: expected one of rgb8"),
        ({"step": 10}, "too few for 11x7 rgb8"),
        ({"data": b"short"}, "5 bytes in rows of 33"),
    ],
)
def test_other_messages_are_refused(frames, change, said):
    message = {"encoding": "rgb8", **pack(np.zeros((7, 11, 3), np.uint8), 0), **change}
    with pytest.raises(ValueError, match=said):
        frames.read_frame(**message)


def test_a_frame_becomes_detections(frames, refshapes_bundle):
    """Of a camera's bytes in BGR, as of the picture's file; a phrase without a box gives none."""
    with Image.open(PICTURE) as picture:
        bgr = np.asarray(picture.convert("RGB"))[:, :, ::-1]
    pixels, order = frames.read_frame(encoding="bgr8", **pack(bgr, 3))
    with Grounder(Bundle.open(refshapes_bundle)) as grounder:
        found = grounder.ground(pixels, (PHRASE, PHRASE), order=order)
        wanted = grounder.ground(PICTURE, PHRASE)
    box = wanted.boxes[0]
    (detection,) = frames.list_detections((found[0], found[1].reject_below(1.0)))
    assert (detection.phrase, detection.score) == (PHRASE, found[0].score)
    x, y = detection.centre
    width, height = detection.size
    corners = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    assert corners == pytest.approx(tuple(box))


def test_the_node_uses_what_there_is():
    """It cannot be run here: names that it takes from elsewhere in this project are there."""
    text = (HOME / "ground_node.py").read_text(encoding="utf-8")
    assert "was not run" in text
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in {"gap_runtime", "frames"}:
            names = [name.name for name in node.names]
            if node.module == "frames":
                there = (HOME / "frames.py").read_text(encoding="utf-8")
            else:
                there = gap_runtime.__all__
            assert all(name in there for name in names)
