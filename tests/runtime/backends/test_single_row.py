"""The graph that OpenVINO's decoder has for calls of a single row: when it is made, and if not."""

import logging
import threading

import pytest

from gap_runtime.backends.openvino import single_row
from gap_runtime.backends.openvino.single_row import SingleRow
from gap_runtime.errors import EngineError


@pytest.fixture(autouse=True)
def enough(monkeypatch):
    monkeypatch.setattr(single_row, "ENOUGH", 3)


class Request:
    """Keeps the tensors of its calls, and fails where it is told to."""

    def __init__(self, fails_at=()):
        self.calls, self.tensors, self.fails_at = [], {}, fails_at

    def set_tensor(self, name, tensor):
        self.tensors[name] = tensor

    def infer(self):
        self.calls.append(dict(self.tensors))
        if len(self.calls) in self.fails_at:
            raise RuntimeError("no memory")


def await_threads():
    for thread in threading.enumerate():
        if thread.name == "single row":
            thread.join(10)
            assert not thread.is_alive()


def test_it_is_made_once_beside_the_calls_that_it_is_for():
    goes_on, opened, request = threading.Event(), [], Request()

    def open_request():
        opened.append(threading.current_thread())
        assert goes_on.wait(10)
        return request

    single = SingleRow(open_request)
    assert not any(single.run({"a": 0}) for _ in range(2))
    assert not opened
    assert not any(single.run({"a": 0}) for _ in range(4))
    assert not single.is_open
    goes_on.set()
    await_threads()
    assert single.is_open
    assert all(single.run({"a": number, "b": 1}) for number in range(4))
    assert request.calls == [{"a": number, "b": 1} for number in range(4)]
    assert len(opened) == 1
    assert opened[0] is not threading.main_thread()


@pytest.mark.parametrize(
    "error", [EngineError("no room"), RuntimeError("no"), MemoryError("none")]
)
def test_where_there_can_be_none_calls_go_on_and_a_line_says_why(error, caplog):
    opened = []

    def open_request():
        opened.append(1)
        raise error

    single = SingleRow(open_request)
    with caplog.at_level(logging.INFO):
        for _ in range(9):
            assert not single.run({})
            await_threads()
    assert len(opened) == 1
    assert [each.message for each in caplog.records] == [
        f"calls of a single row have no graph of their own: {error}"
    ]


def test_a_call_that_fails_is_left_to_the_other_graph_as_all_after_it_are(caplog):
    request = Request(fails_at=[2])
    single = SingleRow(lambda: request)
    for _ in range(3):
        assert not single.run({})
    await_threads()
    with caplog.at_level(logging.INFO):
        assert [single.run({}) for _ in range(9)] == [True] + 8 * [False]
    assert not single.is_open
    assert len(request.calls) == 2
    assert "no memory" in caplog.text


def test_a_system_without_another_thread_goes_on_without(monkeypatch, caplog):
    def start(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    single = SingleRow(Request)
    with caplog.at_level(logging.INFO):
        assert not any(single.run({}) for _ in range(9))
    assert not single.is_open
    (record,) = caplog.records
    assert "can't start new thread" in record.message
