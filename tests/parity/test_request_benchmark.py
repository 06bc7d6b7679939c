"""The benchmark of one request: the answer that it forces, what it counts and draws."""

import argparse
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from benchmarks import request, suite
from benchmarks.request import (
    ANSWER,
    Request,
    count_prompt,
    draw,
    list_peer_requests,
    list_requests,
    measure,
    read_answer,
    tabulate,
)
from gap_runtime import Bundle, Grounder

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
    """A Grounder's cases, and what it answers while the benchmark forces it."""
    with Grounder(Bundle.open(refshapes_bundle), keep_pictures=0) as grounder:
        tokens = read_answer(grounder.bundle)
        cases = measure(grounder, runs=1)
        return grounder, tokens, cases


def test_the_answer_is_forced_whole_and_drafts_save_calls(measured):
    grounder, tokens, cases = measured
    assert grounder.encoder.decode(tokens[:-1]).strip() == ANSWER.strip()
    assert tokens[-1] in grounder.bundle.manifest.prompt.stop_ids
    plain, drafted = cases[:2]
    assert (plain.draft, drafted.draft) == (False, True)
    # Every token is a call of its own, the first one that of the prompt.
    assert plain.calls == len(tokens)
    # Eight digits are news at the most.
    assert drafted.calls <= 10
    assert all(len(case.first) == len(case.further) == 1 for case in cases)


def test_a_further_phrase_sees_nothing_again(measured):
    _, _, cases = measured
    requests = list(list_requests("ours", cases[:2]))
    assert [each.name for each in requests] == [
        "ours, no drafts",
        "ours, drafts",
        "ours, drafts, further phrase",
    ]
    assert requests[-1].milliseconds["vision"] == 0
    assert requests[0].total == pytest.approx(
        sum(cases[0].first[0][stage] for stage in ("preprocess", "vision", "prefill", "decode"))
    )


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
