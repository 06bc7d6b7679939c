"""A moving circle is followed by the embedded model, over time."""

import json

import numpy as np
import pytest
from PIL import Image, ImageDraw
from tools.places import ROOT
from tools.schemas import hold

from gap_runtime.cli.commands import watch
from gap_runtime.cli.main import main
from gap_runtime.evaluation.refshapes import COLOURS, SIDE
from gap_runtime.grounding.video.watch import watch as watch_frames
from gap_runtime.pictures.boxes import Box, iou

av = pytest.importorskip("av")

FRAMES = 12


def place_circle(number):
    """Its tight box: it goes across the picture and down a little."""
    return (6 + 6 * number, 20 + 3 * number, 30 + 6 * number, 44 + 3 * number)


def make_video(path):
    """A red circle that moves past a blue square, noisy as refshapes are; lossless."""
    rng = np.random.default_rng(5)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=10)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "rgb24"
        for number in range(FRAMES):
            picture = Image.new("RGB", (SIDE, SIDE), (105, 100, 98))
            draw = ImageDraw.Draw(picture)
            draw.rectangle((12, 80, 33, 101), fill=COLOURS["blue"])
            x0, y0, x1, y1 = place_circle(number)
            draw.ellipse((x0, y0, x1 - 1, y1 - 1), fill=COLOURS["red"])
            noise = rng.integers(-16, 17, (SIDE, SIDE, 3))
            values = np.clip(np.asarray(picture, np.int16) + noise, 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(values, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def test_a_moving_circle_is_followed(refshapes_bundle, tmp_path, capsys):
    video = make_video(tmp_path / "circle.avi")
    jsonl, out = tmp_path / "boxes.jsonl", tmp_path / "annotated.mp4"
    arguments = ["watch", str(refshapes_bundle), str(video), "--phrase", "the red circle"]
    arguments += ["--phrase", "the blue square", "--ratio", "0.5"]
    assert main([*arguments, "--jsonl", str(jsonl), "--out", str(out)]) == 0
    assert f"{FRAMES} asked, 0 unchanged; 0 dropped, 0 broken" in capsys.readouterr().err
    lines = [json.loads(line) for line in jsonl.read_text("utf-8").splitlines()]
    for line in lines:
        hold(line, [watch.json_types()["--jsonl, a line"]])
    followed = {}
    for line in lines:
        is_circle = line["phrase"] == "the red circle"
        true = Box(*place_circle(line["frame"])) if is_circle else Box(12, 80, 34, 102)
        followed.setdefault(line["phrase"], []).append(iou(Box(*line["boxes"][0]), true))
    assert {len(values) for values in followed.values()} == {FRAMES}
    for values in followed.values():
        assert np.mean(values) > 0.7
        assert min(values) > 0.5
    with av.open(str(out)) as container:
        assert sum(1 for _ in container.decode(video=0)) == FRAMES


def test_what_was_answered_last_is_drafted_and_changes_no_answer(refshapes_bundle, tmp_path):
    video = make_video(tmp_path / "circle.avi")
    phrases = ["the red circle", "the blue square"]

    def ask(*, draft):
        found = []
        watch_frames(
            refshapes_bundle,
            video,
            phrases,
            draft=draft,
            on_frame=lambda frame, _: found.extend(frame.found),
        )
        return found

    followed, plain = ask(draft=True), ask(draft=False)
    assert len(followed) == FRAMES * len(phrases)
    assert [each.token_ids for each in followed] == [each.token_ids for each in plain]
    # The first frame's answers take the calls that the form leaves; the others about half of them.
    first, later = followed[: len(phrases)], followed[len(phrases) :]
    assert np.mean([each.calls for each in later]) < 0.65 * np.mean([e.calls for e in first])


def test_the_page_says_what_is_so():
    """Its threshold and its table of options are those of the code."""
    from gap_runtime.grounding.video.change import DEFAULT_CHANGE

    text = (ROOT / "docs" / "video.md").read_text(encoding="utf-8")
    assert f"`--change {DEFAULT_CHANGE:g}`" in text
