"""Changed requests of every kind end in an answer or in one line, and the next one is answered.

Some of each kind; `make fuzz` makes more.
"""

import random

import pytest
from fuzz import requests
from fuzz.bundles import BundleCase
from fuzz.outcome import FAILURES, judge

pytest.importorskip("starlette.testclient")

KINDS = {
    "ground-bodies": (requests.ground_bodies, 40),
    "chat-bodies": (requests.chat_bodies, 25),
    "forms": (requests.forms, 40),
    "pipe": (requests.pipe, 2),
}


@pytest.fixture(scope="module")
def case(refshapes_bundle, tmp_path_factory):
    return BundleCase(refshapes_bundle, tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("kind", KINDS)
def test_changed_requests_are_answered_or_refused(case, kind):
    begin, count = KINDS[kind]
    make, ends = begin(case), set()
    for number in range(count):
        what, run = make(random.Random(f"{kind}:{number}"))
        outcome, said = judge(run)
        assert outcome not in FAILURES, (number, what, said)
        ends.add(outcome)
    assert "done" in ends
