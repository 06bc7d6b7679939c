"""A service under load: latencies, memory before and after, and what HTTP costs beside the model.

    python -m benchmarks.service BUNDLE [--requests 1000] [--clients 16]

The service runs in a process of its own on this machine, so clients take some of its cores.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from queue import Empty, SimpleQueue

import psutil

from gap_runtime import Bundle, Grounder
from gap_runtime.evaluation.refshapes import draw_scene

_START = "from gap_runtime.cli.main import main; raise SystemExit(main())"
_WARM = 100
_ALONE = 200


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What was measured. Times are in milliseconds; memory is the resident set in MiB.

    Pictures are kept until their memory is used up, so memory grows with new pictures: the same
    ones are asked about twice. `alone_` is one client. The two `cpu_` are of the processor, of a
    request in the service and of the same call of the library, on one thread: other work on the
    machine does not change them.
    """

    requests: int
    clients: int
    statuses: dict[str, int]
    seconds: float
    p50: float
    p95: float
    p99: float
    memory_ready: float
    memory_after_first: float
    memory_after_all: float
    memory_after_all_again: float
    alone_p50: float
    alone_model_p50: float
    alone_overhead_p50: float
    alone_overhead_p95: float
    cpu_of_a_request: float
    cpu_of_the_library: float


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
    """One connection that is kept."""

    def __init__(self, address: str) -> None:
        host, port = address.removeprefix("http://").split(":")
        self._connection = http.client.HTTPConnection(host, int(port), timeout=120)

    def ask(self, body: bytes) -> tuple[int, float, float]:
        """Status, milliseconds, and those of them that the model's stages took."""
        began = time.perf_counter()
        self._connection.request("POST", "/v1/ground", body, {"content-type": "application/json"})
        answer = self._connection.getresponse()
        data = json.loads(answer.read())
        took = (time.perf_counter() - began) * 1e3
        results = data.get("results", [])
        return answer.status, took, sum(each["milliseconds"]["total"] for each in results)


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
        raise SystemExit(line)
    return process, found[1]


def read_memory(process: subprocess.Popen[str]) -> float:
    """Resident memory in MiB."""
    return float(psutil.Process(process.pid).memory_info().rss) / 2**20


def read_cpu(process: subprocess.Popen[str]) -> float:
    """Milliseconds of the processor that a process took so far."""
    times = psutil.Process(process.pid).cpu_times()
    return float(times.user + times.system) * 1e3


def time_library(bundle: str, bodies: list[bytes]) -> float:
    """Milliseconds of the processor of a call about the bytes of a picture that is known."""
    asked = [json.loads(body) for body in bodies]
    pairs = [(base64.b64decode(each["image"]), each["phrase"]) for each in asked]
    with Grounder(Bundle.open(bundle)) as grounder:
        for image, phrase in pairs:
            grounder.ground(image, phrase)
        began = time.process_time()
        for image, phrase in pairs:
            grounder.ground(image, phrase)
        return (time.process_time() - began) * 1e3 / len(pairs)


def press(
    address: str, bodies: list[bytes], clients: int
) -> tuple[Counter[str], list[float], float]:
    """Statuses, milliseconds and the seconds of it all."""
    waiting: SimpleQueue[bytes] = SimpleQueue()
    for body in bodies:
        waiting.put(body)
    statuses: Counter[str] = Counter()
    took: list[float] = []

    def work() -> None:
        client = Client(address)
        while True:
            try:
                body = waiting.get_nowait()
            except Empty:
                return
            status, milliseconds, _ = client.ask(body)
            statuses[str(status)] += 1
            took.append(milliseconds)

    threads = [threading.Thread(target=work) for _ in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statuses, took, time.perf_counter() - began


def measure(bundle: str, requests: int, clients: int) -> Figures:
    """All figures of a service."""
    process, address = start(bundle)
    try:
        bodies = list(islice(make_bodies(), requests))
        Client(address).ask(bodies[0])
        ready = read_memory(process)
        press(address, bodies[:_WARM], clients)
        first = read_memory(process)
        statuses, took, seconds = press(address, bodies, clients)
        end = read_memory(process)
        press(address, bodies, clients)
        again = read_memory(process)
        # A new one: a connection that nothing comes over for long is closed.
        alone = Client(address)
        before = read_cpu(process)
        single = [alone.ask(body)[1:] for body in bodies[:_ALONE]]
        cpu = (read_cpu(process) - before) / len(single)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    cuts = statistics.quantiles(took, n=100)
    over = sorted(whole - model for whole, model in single)
    return Figures(
        requests=requests,
        clients=clients,
        statuses=dict(statuses),
        seconds=seconds,
        p50=cuts[49],
        p95=cuts[94],
        p99=cuts[98],
        memory_ready=ready,
        memory_after_first=first,
        memory_after_all=end,
        memory_after_all_again=again,
        alone_p50=statistics.median(whole for whole, _ in single),
        alone_model_p50=statistics.median(model for _, model in single),
        alone_overhead_p50=over[len(over) // 2],
        alone_overhead_p95=over[int(len(over) * 0.95)],
        cpu_of_a_request=cpu,
        cpu_of_the_library=time_library(bundle, bodies[:_ALONE]),
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=16)
    options = parser.parse_args()
    figures = measure(options.bundle, options.requests, options.clients)
    print(
        json.dumps({**asdict(figures), "cores": os.cpu_count(), "load": os.getloadavg()}, indent=2)
    )


if __name__ == "__main__":
    main()
