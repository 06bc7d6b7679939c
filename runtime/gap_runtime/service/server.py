"""A service on a port of this machine, until it is told to stop."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Final

import uvicorn

from gap_runtime.errors import ConfigError, GapError
from gap_runtime.service.app import Service
from gap_runtime.service.connections import IDLE_SECONDS, MOST_CONNECTIONS, make_protocol
from gap_runtime.service.models import Models
from gap_runtime.service.settings import ServiceSettings

_TURN_SECONDS: Final = 0.0005
"""How long one thread of Python may keep the others waiting."""


def serve(models: Models, settings: ServiceSettings, announce: Callable[[str], None]) -> None:
    """Answer requests until SIGTERM or SIGINT; what runs is finished first.

    Args:
        models: To answer with.
        settings: Where to listen, and limits.
        announce: Told the address as soon as there is one.

    Raises:
        ConfigError: The port cannot be had.
        GapError: The models cannot be loaded.
    """
    listening = _listen(settings)
    failures: list[GapError] = []

    def fail(error: GapError) -> None:
        failures.append(error)
        server.should_exit = True

    service = Service(models, settings, on_failure=fail)
    config = uvicorn.Config(
        service.app,
        http=make_protocol(),
        # uvloop closes a connection later, so that the next one would find no room.
        loop="asyncio",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=max(1, round(settings.grace)),
        lifespan="on",
    )
    server = _Server(config)
    # The reader of forms warns of every byte that a client gets wrong; the client is told.
    for name in ("uvicorn", "python_multipart"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if threading.current_thread() is threading.main_thread():
        # uvicorn stops at SIGTERM, then sends it again to whoever had it before: nobody.
        signal.signal(signal.SIGTERM, lambda *_: None)
    announce(_describe(listening))
    # While a model runs, reading and answering others' requests must not wait 5 ms for their turn.
    sys.setswitchinterval(_TURN_SECONDS)
    # uvicorn raises Ctrl-C again when it has stopped; what runs still gets its time.
    with listening, contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listening])
    if not service.stop(partial(server.count_left, settings.grace)):
        # A graph that still runs cannot be interrupted, and would keep the process alive.
        sys.stderr.flush()
        os._exit(1)
    models.close()
    if failures:
        raise failures[0]


class _Server(uvicorn.Server):
    """A server that knows when it was told to stop."""

    _stopped = math.inf

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop politely."""
        self._stopped = min(self._stopped, time.monotonic())
        super().handle_exit(sig, frame)

    def count_left(self, grace: float) -> float:
        """Seconds of a grace that are left."""
        return grace - max(0.0, time.monotonic() - self._stopped)


def _listen(settings: ServiceSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listening = socket.create_server(
            (settings.host, settings.port), family=family, backlog=MOST_CONNECTIONS
        )
        # asyncio does so for sockets of its own alone; without, an answer waits 40 ms for an ACK.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listening
    except OSError as error:
        raise ConfigError(
            f"{settings.host}:{settings.port}: cannot listen there ({error.strerror or error}); "
            "choose another with --host and --port"
        ) from error


def _describe(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
