"""Connections over which nothing comes, against uvicorn on a real port."""

import asyncio
import contextlib
import socket
import threading
import time

import pytest

uvicorn = pytest.importorskip("uvicorn")

from uvicorn.protocols.http.h11_impl import H11Protocol

from gap_runtime.service import connections

MOST = 6
GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


def list_parsers():
    yield pytest.param(H11Protocol, id="h11")
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError:
        return
    yield pytest.param(HttpToolsProtocol, id="httptools")


class Held:
    """An application that answers /held when it is let go, and all else at once."""

    def __init__(self):
        self.begun, self.let_go = threading.Event(), threading.Event()

    async def __call__(self, scope, _, send):
        while scope["path"] == "/held" and not self.let_go.is_set():
            self.begun.set()
            await asyncio.sleep(0.01)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"here"})


@pytest.fixture(params=list_parsers())
def serve(request, monkeypatch):
    """A function that serves with so many seconds of patience, and gives port and application."""
    stack = contextlib.ExitStack()

    def start(idle, least=0.0):
        monkeypatch.setattr(connections, "MOST_CONNECTIONS", MOST)
        monkeypatch.setattr(connections, "IDLE_SECONDS", idle)
        monkeypatch.setattr(connections, "LEAST_IDLE_SECONDS", least)
        application = Held()
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        config = uvicorn.Config(
            application,
            http=connections.make_protocol(request.param),
            ws="none",
            lifespan="off",
            log_config=None,
            limit_concurrency=MOST,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()

        def stop():
            application.let_go.set()
            server.should_exit = True
            thread.join()

        stack.callback(stop)
        return listening.getsockname()[1], application

    with stack:
        yield start


def connect(port):
    connection = socket.create_connection(("127.0.0.1", port), timeout=5)
    connection.settimeout(5)
    return connection


def ask(connection, head=GET):
    connection.sendall(head)
    return connection.recv(1000)


def is_closed(connection):
    """Whether the other side ends it, within the time of a test."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_who_is_idle_for_longest_makes_way(serve):
    port, application = serve(30)
    with contextlib.ExitStack() as stack:
        busy = stack.enter_context(connect(port))
        busy.sendall(GET.replace(b"/ ", b"/held "))
        assert application.begun.wait(5)
        idle = [stack.enter_context(connect(port)) for _ in range(3 * MOST)]
        for _ in range(3):
            with connect(port) as connection:
                assert ask(connection).startswith(b"HTTP/1.1 200")
        assert all(is_closed(each) for each in idle[:MOST])
        # The newest one is there yet, and who waits for an answer gets it.
        assert ask(idle[-1]).startswith(b"HTTP/1.1 200")
        application.let_go.set()
        assert busy.recv(1000).startswith(b"HTTP/1.1 200")


def test_of_many_that_come_at_once_none_is_cut_off(serve):
    """What has just connected may have asked already."""
    port, _ = serve(30, least=5)
    with contextlib.ExitStack() as stack:
        for _ in range(MOST - 2):
            stack.enter_context(connect(port))
        crowd = [stack.enter_context(connect(port)) for _ in range(MOST)]
        answers = [ask(each)[:12] for each in crowd]
    assert set(answers) <= {b"HTTP/1.1 200", b"HTTP/1.1 503"}


def test_many_that_came_at_once_make_way_later(serve):
    """While they were new, each of them was let in; together they are more than there is room."""
    port, _ = serve(30, least=0.3)
    with contextlib.ExitStack() as stack:
        for _ in range(4 * MOST):
            stack.enter_context(connect(port))
        time.sleep(0.5)
        assert ask(stack.enter_context(connect(port))).startswith(b"HTTP/1.1 200")


def test_where_all_are_at_work_one_more_is_told(serve):
    port, _ = serve(30)
    with contextlib.ExitStack() as stack:
        for _ in range(MOST - 1):
            busy = stack.enter_context(connect(port))
            busy.sendall(GET.replace(b"/ ", b"/held "))
        time.sleep(0.1)
        assert ask(stack.enter_context(connect(port))).startswith(b"HTTP/1.1 503")


def test_a_request_has_to_come_within_some_time(serve):
    port, application = serve(0.2)
    with (
        connect(port) as silent,
        connect(port) as slow,
        connect(port) as late,
        connect(port) as busy,
    ):
        busy.sendall(GET.replace(b"/ ", b"/held "))
        assert ask(late).startswith(b"HTTP/1.1 200")
        for letter in GET[:12]:
            with contextlib.suppress(OSError):
                slow.sendall(bytes([letter]))
            time.sleep(0.03)
        assert [is_closed(each) for each in (silent, slow)] == [True, True]
        while late.recv(1000):
            pass
        # An answer may take longer.
        application.let_go.set()
        assert busy.recv(1000).startswith(b"HTTP/1.1 200")


def test_a_head_has_an_end(serve):
    port, _ = serve(30)
    with connect(port) as endless, contextlib.suppress(OSError):
        endless.sendall(GET[:-2])
        sent = 0
        while sent < 2**22:
            line = b"x: " + b"y" * 5000 + b"\r\n"
            endless.sendall(line)
            sent += len(line)
        pytest.fail("it reads on")
    with connect(port) as connection:
        assert ask(connection).startswith(b"HTTP/1.1 200")
