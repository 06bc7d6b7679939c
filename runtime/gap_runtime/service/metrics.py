"""What a service counts, in Prometheus's form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from gap_runtime.grounding.view import Grounding

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST
_SECONDS: Final = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)


class Metrics:
    """Counters of one service."""

    def __init__(self, queue_limit: int, count_waiting: Callable[[], float]) -> None:
        """Begin at zero.

        Args:
            queue_limit: How many requests may wait.
            count_waiting: How many do now.
        """
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._requests = Counter(
            "gap_requests", "Requests", ["endpoint", "status"], registry=self.registry
        )
        self._request_seconds = Histogram(
            "gap_request_seconds",
            "Time of a request from its head to the end of the answer",
            ["endpoint"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._stage_seconds = Histogram(
            "gap_stage_seconds",
            "Time of a phrase by stage; what an earlier phrase had computed took none",
            ["stage"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._queue_seconds = Histogram(
            "gap_queue_seconds", "Time to wait", buckets=_SECONDS, registry=self.registry
        )
        waiting = Gauge("gap_queue", "Requests that wait or run", registry=self.registry)
        waiting.set_function(count_waiting)
        limit = Gauge("gap_queue_limit", "How many may wait or run", registry=self.registry)
        limit.set(queue_limit)
        names = {
            "phrases": "Phrases that were answered",
            "no_box": "Answers without a usable box",
            "decoder_calls": "Calls of the decoder",
            "drafted_tokens": "Tokens that were drafted",
            "accepted_tokens": "Drafted tokens that were right",
        }
        self._counts = {
            name: Counter(f"gap_{name}", help_, registry=self.registry)
            for name, help_ in names.items()
        }
        self._kept = Gauge("gap_kept_pictures", "Pictures that are kept", registry=self.registry)
        self._kept_bytes = Gauge("gap_kept_bytes", "Their memory", registry=self.registry)

    def count_request(self, endpoint: str, status: int, seconds: float) -> None:
        """A request was answered."""
        self._requests.labels(endpoint, str(status)).inc()
        self._request_seconds.labels(endpoint).observe(seconds)

    def count_groundings(self, found: tuple[Grounding, ...], queue_ms: float) -> None:
        """Phrases were answered."""
        self._queue_seconds.observe(queue_ms / 1e3)
        for each in found:
            self._counts["phrases"].inc()
            self._counts["no_box"].inc(not each.boxes)
            self._counts["decoder_calls"].inc(each.calls)
            self._counts["drafted_tokens"].inc(each.drafted)
            self._counts["accepted_tokens"].inc(each.accepted)
            for stage, value in each.milliseconds.items():
                self._stage_seconds.labels(stage).observe(value / 1e3)

    def set_kept(self, pictures: int, size: int) -> None:
        """So many pictures are kept, in so many bytes."""
        self._kept.set(pictures)
        self._kept_bytes.set(size)

    def dump(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)
