"""Python's search for dead objects is as it was when an export is over."""

import gc

import pytest

from gap_export.pipeline.garbage import rare_collections


@pytest.fixture
def usual():
    """Python's own thresholds, in place of those of the test run."""
    before = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    yield gc.get_threshold()
    gc.set_threshold(*before)


def test_thresholds_come_back_whatever_happens(usual):
    before = usual
    seen = []

    @rare_collections()
    def export(fails):
        seen.append(gc.get_threshold())
        assert gc.isenabled()
        if fails:
            raise ValueError("no room")

    export(fails=False)
    assert gc.get_threshold() == before
    with pytest.raises(ValueError, match="room"):
        export(fails=True)
    assert gc.get_threshold() == before
    assert all(each[0] > before[0] for each in seen)


def test_an_export_in_an_export_changes_nothing_more():
    before = gc.get_threshold()
    with rare_collections():
        within = gc.get_threshold()
        with rare_collections():
            assert gc.get_threshold() == within
        assert gc.get_threshold() == within
    assert gc.get_threshold() == before
