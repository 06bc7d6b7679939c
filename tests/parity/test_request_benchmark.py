"""The benchmark of one request: the answers that it forces, what it counts and draws."""

import argparse
import itertools
import statistics
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from benchmarks import request, suite
from benchmarks.request import (
    Request,
    compare,
    count_prompt,
    draw,
    list_answers,
    list_peer_requests,
    list_requests,
    measure,
    tabulate,
)
from gap_runtime import Bundle, Grounder
from gap_runtime.evaluation.refshapes256 import draw_scene
from gap_runtime.pictures.boxes import parse_boxes
from gap_runtime.pictures.load import frame_picture

PEER = {
    "name": "peer",
    "scope": "decoder",
    "failed": None,
    "settings": {"prompts": [8]},
    "rounds": [
        {"vision_ms": None, "prefill_ms": {"8": [3.0, 5.0, 4.0]}, "token_ms": {"8": [2.0]}},
    ],
}


@pytest.fixture(scope="module")
def measured(refshapes_bundle):
    """A Grounder's cases, and the answers that the benchmark forces on it."""
    with Grounder(Bundle.open(refshapes_bundle), keep_pictures=0) as grounder:
        tokens = list(itertools.islice(list_answers(grounder.bundle), 40))
        cases = measure(grounder, runs=2)
        return grounder, tokens, cases


def test_the_answers_are_the_true_ones_of_held_out_phrases(measured):
    grounder, tokens, _ = measured
    questions = [
        (scene.image.size, each.box)
        for scene in (draw_scene("test", number) for number in range(40))
        for each in scene.questions
    ]
    manifest = grounder.bundle.manifest
    for ids, (size, box) in zip(tokens, questions, strict=False):
        frame = frame_picture(size, manifest.preprocess, manifest.buckets[0])
        (found,) = parse_boxes(grounder.encoder.decode(ids[:-1]), manifest.box, frame).boxes
        # Two decimals of the square's side, and half a pixel of its margins.
        assert found == pytest.approx(box, abs=0.005 * max(size) + 0.5)
        assert ids[-1] in manifest.prompt.stop_ids


def test_the_answers_are_forced_whole_and_drafts_save_calls(measured):
    _, tokens, cases = measured
    plain, drafted = cases[:2]
    assert (plain.draft, drafted.draft) == (False, True)
    # Every token is a call of its own, the first one that of the prompt.
    assert set(plain.calls) <= {len(ids) for ids in tokens}
    # Eight digits are news at the most, and sizes tell some of them.
    assert max(drafted.calls) <= 10
    assert len(set(drafted.calls)) > 1
    for case in cases:
        assert [len(case.first), len(case.further), len(case.calls)] == [2, 16, 18]
        answers = [each["decode"] for each in case.first + case.further]
        assert case.decode_ms == pytest.approx(statistics.mean(answers))


def test_a_further_phrase_sees_nothing_again(measured):
    _, _, cases = measured
    requests = list(list_requests("ours", cases[:2]))
    assert [each.name for each in requests] == [
        "ours, no drafts",
        "ours, drafts",
        "ours, drafts, further phrase",
    ]
    assert requests[-1].milliseconds["vision"] == 0
    first = cases[0].first
    stages = ("preprocess", "vision", "prefill")
    assert requests[0].total == pytest.approx(
        sum(statistics.median(each[stage] for each in first) for stage in stages)
        + cases[0].decode_ms
    )
    assert requests[1].calls == requests[2].calls == statistics.mean(cases[1].calls)
    ratio = cases[1].decode_ms / cases[0].decode_ms
    assert f"decoding with drafts {ratio:.2f} of that without" in next(compare(cases))


def test_no_phrase_begins_as_the_one_before_it():
    """What two have in common behind the template is not computed again."""
    asked = [request._FIRST, *request._FURTHER, request._FIRST]
    assert all(a.split()[0] != b.split()[0] for a, b in itertools.pairwise(asked))


def test_a_peer_decodes_as_many_tokens(measured):
    (peer,) = list_peer_requests([PEER, {**PEER, "failed": "no kernel"}], calls=24)
    assert peer.milliseconds == {"prefill": 4.0, "decode": 48.0}
    assert (peer.calls, peer.whole) == (25, False)
    table = tabulate([peer])
    assert table[1] == ["peer (decoder)", "0", "25", "-", "-", "4", "48", "52"]
    assert count_prompt(measured[0]) > 64


PROGRAM = """
import json, os, sys
NAME = "made up"
SCOPE = "whole"
PRECISIONS = ("fp32",)
given = sys.argv[1:]
if given[0] == "prepare":
    os.makedirs(given[2])
    print(json.dumps({"note": "made"}))
else:
    count = given[given.index("--prompts") + 1]
    tokens = int(given[given.index("--tokens") + 1])
    print(json.dumps({
        "load_s": 1, "resident_mb": 1, "peak_mb": 1, "vision_ms": [7.0], "note": "",
        "prefill_ms": {count: [float(count)]}, "token_ms": {count: [0.5]},
        "token_ids": {count: [1] * tokens}, "versions": {},
    }))
"""


def test_a_peer_is_asked_by_its_own_program(tmp_path, monkeypatch):
    (tmp_path / "peers").mkdir()
    (tmp_path / "peers" / "made_up.py").write_text(PROGRAM, encoding="utf-8")
    (tmp_path / "checkpoints" / "x").mkdir(parents=True)
    (tmp_path / "checkpoints" / "x" / "processor_config.json").touch()
    monkeypatch.setattr(request, "PEERS", tmp_path / "peers")
    monkeypatch.setattr(suite, "find_python", lambda _: Path(sys.executable))
    options = argparse.Namespace(
        checkpoint="x", peers=["made_up"], home=tmp_path, runs=1, rounds=1, threads=1, limit=60.0
    )
    options.resume = False
    rows = request.measure_peers(options, "fp32", prompt=11, calls=24)
    (peer,) = list_peer_requests(rows, calls=24)
    assert peer.milliseconds == {"vision": 7.0, "prefill": 11.0, "decode": 12.0}
    assert (tmp_path / "request.json").is_file()


def test_the_picture_has_a_bar_for_each_stage(tmp_path):
    one = Request(
        name="one", removed="0.5", calls=9, milliseconds={"vision": 500.0, "decode": 1.0}
    )
    draw([one], "title", tmp_path / "a.svg")
    root = ET.parse(tmp_path / "a.svg").getroot()
    assert root.tag.endswith("svg")
    # The same figures draw the same file, so that it can be kept.
    draw([one], "title", tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
