"""The same run on a Ray cluster: pictures go to workers, their rows come back to one writer.

A unit of work is a picture, so that one is lost at most where a worker dies, and done again by
another. The writer is here: the file is the same as without Ray, but for the order of its lines.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Final

from gap_runtime.errors import ConfigError, EngineError, GapError
from gap_runtime.evaluation.answer import Answerer
from gap_runtime.evaluation.results import Row
from gap_runtime.evaluation.run import Open, Unit, Work

_AHEAD: Final = 2
"""Units that lie ready for each worker."""
_TRIES: Final = 3


class RayCluster:
    """Workers on a cluster, each with a loaded model; call it with units. Fits run.Spread."""

    def __init__(self, workers: int | None = None) -> None:
        """Connect to the cluster that RAY_ADDRESS names, or start one on this machine.

        Args:
            workers: How many; by default one for each GPU of the cluster, else for each core.

        Raises:
            ConfigError: Ray is not installed.
            EngineError: There is no cluster.
        """
        self._ray = ray = _import_ray()
        # What Ray will do by itself: leave the visible GPUs alone where none is asked for.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            if not ray.is_initialized():
                address = os.environ.get("RAY_ADDRESS")
                ray.init(
                    address=address,
                    num_cpus=None if address or workers is None else workers,
                    logging_level=logging.ERROR,
                    log_to_driver=False,
                    include_dashboard=None if address else False,
                )
            resources: dict[str, float] = ray.cluster_resources()
        except (OSError, RuntimeError, ValueError) as error:
            raise EngineError(
                f"Ray: no cluster ({' '.join(str(error).split()):.200}); set RAY_ADDRESS or unset "
                "it to work on this machine"
            ) from error
        gpus, cores = resources.get("GPU", 0.0), resources.get("CPU", 1.0)
        self.workers = workers or max(int(gpus or cores), 1)
        if self.workers > cores:
            raise ConfigError(f"--workers {workers}: the cluster has {cores:g} cores")
        self._gpus = gpus / self.workers if gpus else 0

    def __call__(
        self, units: Sequence[Unit], work: Work, open_answerer: Open
    ) -> Iterator[list[Row]]:
        """Rows of each unit as it is done.

        Raises:
            GapError: What a worker raised.
            EngineError: Workers die again and again.
        """
        ray = self._ray
        worker = ray.remote(
            num_cpus=1, num_gpus=self._gpus, max_restarts=_TRIES, max_task_retries=_TRIES
        )(_Worker)
        # No more workers than there is work for.
        waiting = iter(units)
        first = list(islice(waiting, self.workers))
        actors = [worker.remote(open_answerer, work) for _ in first]
        running: dict[Any, Any] = {}

        def hand(actor: Any, unit: Unit | None) -> None:
            if unit is not None:
                running[actor.run.remote(unit)] = actor

        for actor, unit in zip(actors, first, strict=True):
            hand(actor, unit)
        for _ in range(_AHEAD - 1):
            for actor in actors:
                hand(actor, next(waiting, None))
        try:
            while running:
                (done,), _ = ray.wait(list(running))
                actor = running.pop(done)
                rows, error = _fetch(ray, done)
                if error is not None:
                    raise error
                hand(actor, next(waiting, None))
                yield rows
        finally:
            for actor in actors:
                ray.kill(actor)


class _Worker:
    """A loaded model in a process of its own."""

    def __init__(self, open_answerer: Open, work: Work) -> None:
        """Remember how to load the model; an error here could not be told from a dead worker."""
        self._open, self._work = open_answerer, work
        self._answerer: Answerer | None = None

    def run(self, unit: Unit) -> tuple[list[Row], GapError | None]:
        """The rows of a unit, or the error to be raised where the user is."""
        try:
            if self._answerer is None:
                self._answerer = self._open()
            return list(self._work(self._answerer, unit)), None
        except GapError as error:
            return [], error


def _fetch(ray: Any, done: Any) -> tuple[list[Row], GapError | None]:
    try:
        found: tuple[list[Row], GapError | None] = ray.get(done)
        return found
    except ray.exceptions.RayError as error:
        reason = " ".join(str(error).split())
        raise EngineError(f"a Ray worker failed ({reason:.300}); go on with --resume") from error


def _import_ray() -> Any:
    try:
        import ray  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ConfigError("--ray needs Ray: pip install 'gap-runtime[ray]'") from error
    return ray
