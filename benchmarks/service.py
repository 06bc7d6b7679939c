"""A service under load: latencies, memory before and after, and what HTTP adds to the library.

    python -m benchmarks.service BUNDLE [--requests 1000] [--clients 16] [--out FILE]

The service runs in a process of its own on this machine, so clients take some of its cores.

The overhead of a request is what it takes more than the same question, the same bytes of a picture
and the same phrase, asked of `Grounder` directly. It is what the service says of itself: from the
head of a request to its answer (the header `Server-Timing`), without the wait for its turn and
without what the library takes: its stages, and around them (the phrase's tokens, boxes, the score)
as much as in direct calls, which go by turns with requests of one client.

With one client it is timed where the client is, too: what a request takes from the first byte sent
to the last one received, without the direct call. How much of that is HTTP alone says the same
body without a phrase, which is refused when it was read.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from queue import Empty, SimpleQueue

import psutil

from benchmarks.command import read_number, read_output, run_benchmark
from gap_runtime import Bundle, Grounder
from gap_runtime.bundle.files import require_apart
from gap_runtime.cli.options import ArgumentParser
from gap_runtime.errors import ConfigError
from gap_runtime.evaluation.refshapes import draw_scene

_START = "from gap_runtime.cli.main import main; raise SystemExit(main())"
_WARM = 100
_ALONE = 200
_LEAST_REQUESTS = 2
_MOST_CLIENTS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """A request that was answered, in milliseconds: all of it, and what the service says of it."""

    status: int
    whole: float
    service: float
    model: float
    picture: float
    queue: float

    @property
    def beyond_stages(self) -> float:
        """What the service took, but for its queue, the picture and the stages of the model."""
        return self.service - self.queue - self.picture - self.model


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One question, asked over HTTP and of the library, in milliseconds."""

    request: float
    beyond_stages: float
    refused: float
    """The request without a phrase."""
    direct: float
    model: float
    """Of the direct call: the stages of the model."""


@dataclass(frozen=True, kw_only=True)
class Times:
    """Middle and tail of some milliseconds."""

    p50: float
    p95: float
    p99: float


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What was measured. Times are in milliseconds; memory is the resident set in MiB.

    Pictures are kept until their memory is used up, so memory grows with new pictures: the same
    ones are asked about twice. `many` is of all clients at once, `alone` of one. The overheads are
    `many_overhead` and `alone_inside`; `alone_overhead` is by the client's clock, and `alone_http`
    what a refused request takes by it. `library` is what a direct call takes beyond the stages of
    the model.
    """

    requests: int
    clients: int
    statuses: dict[str, int]
    seconds: float
    many: Times
    many_overhead: Times
    memory_ready: float
    memory_after_first: float
    memory_after_all: float
    memory_after_all_again: float
    alone: Times
    alone_direct: Times
    alone_overhead: Times
    alone_inside: Times
    alone_http: Times
    library: Times


def make_bodies() -> Iterator[bytes]:
    """Requests about the held-out pictures of refshapes, one phrase each, without end."""
    index = 0
    while True:
        scene = draw_scene("test", index % 200)
        index += 1
        file = io.BytesIO()
        scene.image.save(file, "png")
        image = base64.b64encode(file.getvalue()).decode()
        for question in scene.questions:
            yield json.dumps({"image": image, "phrase": question.phrase}).encode()


class Client:
    """One connection that is kept. It reads no more of HTTP than it needs, to take little time."""

    def __init__(self, address: str) -> None:
        host, port = address.removeprefix("http://").split(":")
        self._socket = socket.create_connection((host, int(port)), timeout=120)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._host = host

    def ask(self, body: bytes) -> Answered:
        """Send a request and wait for its answer."""
        head = (
            f"POST /v1/ground HTTP/1.1\r\nhost: {self._host}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        ).encode()
        began = time.perf_counter()
        self._socket.sendall(head + body)
        status, service, answer = self._receive()
        whole = (time.perf_counter() - began) * 1e3
        data = json.loads(answer)
        waited = data.get("milliseconds", {})
        return Answered(
            status=status,
            whole=whole,
            service=service,
            model=sum(each["milliseconds"]["total"] for each in data.get("results", [])),
            picture=waited.get("picture", 0.0),
            queue=waited.get("queue", 0.0),
        )

    def _receive(self) -> tuple[int, float, bytes]:
        """Status, milliseconds that the service took, body."""
        data = bytearray()
        while (end := data.find(b"\r\n\r\n")) < 0:
            data += self._receive_some()
        found = re.search(rb"\r\ncontent-length: *(\d+)", data[:end], re.IGNORECASE)
        took = re.search(rb"\r\nserver-timing: service;dur=([\d.]+)", data[:end], re.IGNORECASE)
        assert found is not None
        assert took is not None
        size = end + 4 + int(found[1])
        while len(data) < size:
            data += self._receive_some()
        return int(data[9:12]), float(took[1]), bytes(data[end + 4 :])

    def _receive_some(self) -> bytes:
        piece = self._socket.recv(2**16)
        if not piece:
            raise ConnectionError("the service closed the connection")
        return piece


def start(
    *arguments: str, environment: Mapping[str, str] | None = None
) -> tuple[subprocess.Popen[str], str]:
    """A service and its address.

    Args:
        arguments: Of `gap-runtime serve`.
        environment: Variables that are set beside those that are.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", _START, "serve", "--port", "0", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    assert process.stderr is not None
    line = process.stderr.readline()
    found = re.search(r"at (http://\S+) ", line)
    if found is None:
        raise ConfigError(f"gap-runtime serve: {line.strip().removeprefix('error: ')}")
    return process, found[1]


def read_memory(process: subprocess.Popen[str]) -> float:
    """Resident memory in MiB."""
    return float(psutil.Process(process.pid).memory_info().rss) / 2**20


def take_turns(client: Client, grounder: Grounder, bodies: list[bytes]) -> list[Turn]:
    """Ask each question over HTTP and of the library, about pictures that both know."""
    asked = [json.loads(body) for body in bodies]
    pairs = [(base64.b64decode(each["image"]), each["phrase"]) for each in asked]
    for body, pair in zip(bodies, pairs, strict=True):
        client.ask(body)
        grounder.ground(*pair)
    refusals = [json.dumps({**each, "phrase": ""}).encode() for each in asked]
    turns = []
    for body, refusal, pair in zip(bodies, refusals, pairs, strict=True):
        refused = client.ask(refusal)
        # As behind a direct call, for the request as for the one that is refused.
        grounder.ground(*pair)
        answered = client.ask(body)
        began = time.perf_counter()
        found = grounder.ground(*pair)
        direct = (time.perf_counter() - began) * 1e3
        turns.append(
            Turn(
                request=answered.whole,
                beyond_stages=answered.beyond_stages,
                refused=refused.whole,
                direct=direct,
                model=found.milliseconds["total"],
            )
        )
    return turns


def press(
    address: str, bodies: list[bytes], clients: int
) -> tuple[Counter[str], list[Answered], float]:
    """Statuses, answers and the seconds of it all."""
    waiting: SimpleQueue[bytes] = SimpleQueue()
    for body in bodies:
        waiting.put(body)
    answers: list[Answered] = []

    def work() -> None:
        client = Client(address)
        while True:
            try:
                body = waiting.get_nowait()
            except Empty:
                return
            answers.append(client.ask(body))

    threads = [threading.Thread(target=work) for _ in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    return Counter(str(each.status) for each in answers), answers, seconds


def sum_up(milliseconds: Iterable[float]) -> Times:
    """Middle and tail."""
    cuts = statistics.quantiles(milliseconds, n=100)
    return Times(p50=cuts[49], p95=cuts[94], p99=cuts[98])


def measure(bundle: str, requests: int, clients: int) -> Figures:
    """All figures of a service."""
    process, address = start(bundle)
    try:
        bodies = list(islice(make_bodies(), requests))
        Client(address).ask(bodies[0])
        ready = read_memory(process)
        press(address, bodies[:_WARM], clients)
        first = read_memory(process)
        statuses, many, seconds = press(address, bodies, clients)
        end = read_memory(process)
        press(address, bodies, clients)
        again = read_memory(process)
        # A new one: a connection that nothing comes over for long is closed.
        with Grounder(Bundle.open(bundle)) as grounder:
            turns = take_turns(Client(address), grounder, bodies[:_ALONE])
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    library = sum_up(each.direct - each.model for each in turns)
    return Figures(
        requests=requests,
        clients=clients,
        statuses=dict(statuses),
        seconds=seconds,
        many=sum_up(each.whole for each in many),
        many_overhead=sum_up(each.beyond_stages - library.p50 for each in many),
        memory_ready=ready,
        memory_after_first=first,
        memory_after_all=end,
        memory_after_all_again=again,
        alone=sum_up(each.request for each in turns),
        alone_direct=sum_up(each.direct for each in turns),
        alone_overhead=sum_up(each.request - each.direct for each in turns),
        alone_inside=sum_up(each.beyond_stages - library.p50 for each in turns),
        alone_http=sum_up(each.refused for each in turns),
        library=library,
    )


def main() -> None:
    """Measure, print, and write where that is wanted."""
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle")
    parser.add_argument("--requests", type=read_number, default=1000)
    parser.add_argument("--clients", type=read_number, default=16)
    parser.add_argument("--out", type=read_output, help="a file for the figures")
    options = parser.parse_args()
    if options.requests < _LEAST_REQUESTS:
        parser.error(f"--requests {options.requests}: at least {_LEAST_REQUESTS} have a tail")
    if options.clients > _MOST_CLIENTS:
        parser.error(f"--clients {options.clients}: at most {_MOST_CLIENTS}")
    bundle = Bundle.open(options.bundle)
    if options.out is not None:
        require_apart(options.out, [bundle.folder], "--out")
    load = os.getloadavg()
    figures = measure(options.bundle, options.requests, options.clients)
    said = json.dumps({**asdict(figures), "cores": os.cpu_count(), "load_before": load}, indent=2)
    print(said)
    if options.out is not None:
        options.out.write_text(said + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_benchmark(main)
