"""Some changed input for every byte parser and for whole manifests, and all that was ever found.

More of it, at every border: `make fuzz MINUTES=10`.
"""

import gc
import json
import random
import tempfile
from types import SimpleNamespace

import pytest

from fuzz import families, mutations
from fuzz.outcome import FAILURES, judge
from fuzz.parsers import HERE, PARSERS, corpus, sample

COUNT = 60


@pytest.mark.parametrize("name", PARSERS)
def test_changed_bytes_are_read_or_refused(name):
    parse = PARSERS[name]()
    for data in [*corpus(name), *sample(name, COUNT)]:
        outcome, said = judge(lambda data=data: parse(data))
        assert outcome not in FAILURES, (data[:2000], said)


@pytest.mark.parametrize("name", PARSERS)
def test_what_is_changed_is_read_as_it_is(name):
    """Of what is refused at once, changes would be refused for the same reason."""
    parse = PARSERS[name]()
    for data in corpus(name):
        assert judge(lambda data=data: parse(data)) == ("done", "")


def test_parsers_leave_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in PARSERS:
        parse = PARSERS[name]()
        judge(lambda parse=parse: parse(b""))
        del parse
    gc.collect()
    assert not list(tmp_path.iterdir())


FOUND = sorted((HERE / "found").glob("*/*"))


@pytest.mark.parametrize("path", FOUND, ids=[f"{p.parent.name}-{p.name}" for p in FOUND])
def test_what_was_found_once(path):
    outcome, said = judge(lambda: PARSERS[path.parent.name]()(path.read_bytes()))
    assert outcome == "refused", said


def test_changed_manifests_are_read_or_refused():
    (whole,) = corpus("manifest")
    data, parse = json.loads(whole), PARSERS["manifest"]()
    assert judge(lambda: parse(whole)) == ("done", "")
    for number in range(2 * COUNT):
        rng = random.Random(number)
        changed, place = mutations.change_plain(data, rng)
        text = mutations.write_plain(changed, rng)
        outcome, said = judge(lambda text=text: parse(text))
        assert outcome not in FAILURES, (place, said)


@pytest.mark.parametrize(
    ("kind", "count"),
    [("adapters", COUNT), pytest.param("families", 40 * COUNT, marks=pytest.mark.matrix)],
)
def test_changed_checkpoints_are_planned_or_refused(tmp_path, kind, count):
    make = getattr(families, kind)(SimpleNamespace(folder=tmp_path / "bundle"))
    outcomes = set()
    for number in range(count):
        what, run = make(random.Random(number))
        outcome, said = judge(run)
        assert outcome not in FAILURES, (what, said)
        outcomes.add(outcome)
    assert outcomes == {"done", "refused"}


def test_the_fuzzer_finds_what_is_there():
    """A case that hangs, one that works on and on, one that breaks, one that says two lines."""
    import time

    from gap_runtime.errors import InputError

    class TwoLinesError(InputError):
        def __str__(self):
            return "a\nb"

    def say():
        raise TwoLinesError

    def work():
        while True:
            pass

    assert judge(lambda: time.sleep(10), seconds=0.05)[0] == "waits"
    assert judge(work, seconds=0.05)[0] == "waits"
    assert judge(lambda: 1 // 0)[0] == "traceback"
    assert judge(say)[0] == "lines"
    assert judge(lambda: 1) == ("done", "")
