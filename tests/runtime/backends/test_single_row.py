"""The graph that OpenVINO's decoder has for calls of a single row: when it is made, and if not."""

import logging
import threading

import pytest

from gap_runtime.backends.openvino import single_row
from gap_runtime.backends.openvino.single_row import SingleRow
from gap_runtime.errors import EngineError


@pytest.fixture(autouse=True)
def enough(monkeypatch):
    monkeypatch.setattr(single_row, "_ENOUGH", 3)


def await_threads():
    for thread in threading.enumerate():
        if thread.name.startswith("single row"):
            thread.join(10)
            assert not thread.is_alive()


def test_it_is_made_once_beside_the_calls_that_it_is_for():
    goes_on, opened = threading.Event(), []

    def open_request():
        opened.append(threading.current_thread())
        assert goes_on.wait(10)
        return "request"

    single = SingleRow(open_request)
    for _ in range(2):
        single.count()
        assert single.request is None
    assert not opened
    for _ in range(4):
        single.count()
        assert single.request is None
    goes_on.set()
    await_threads()
    single.count()
    assert single.request == "request"
    assert len(opened) == 1
    assert opened[0] is not threading.main_thread()


@pytest.mark.parametrize("error", [EngineError("no room"), RuntimeError("no such shape")])
def test_where_there_can_be_none_calls_go_on_and_a_line_says_why(error, caplog):
    opened = []

    def open_request():
        opened.append(1)
        raise error

    single = SingleRow(open_request)
    with caplog.at_level(logging.INFO):
        for _ in range(9):
            single.count()
            assert single.request is None
        await_threads()
    assert len(opened) == 1
    assert [each.message for each in caplog.records] == [
        f"calls of a single row get no graph of their own: {error}"
    ]


def test_large_weights_do_not_lie_in_memory_twice():
    single = SingleRow(None)
    for _ in range(9):
        single.count()
    await_threads()
    assert single.request is None
