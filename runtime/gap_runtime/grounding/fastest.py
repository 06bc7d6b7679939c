"""Which backend is the fastest for a bundle on this machine: measured once, then remembered.

    <cache>/gap-runtime/<bundle>/fastest-<hash>.json    {"backend": ..., "milliseconds": {...}}

It is the machine's own, so it does not lie in the bundle, which may go to another one. The hash
changes with any file of the bundle.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gap_runtime.backends import BACKENDS, DEFAULT_BACKEND
from gap_runtime.bundle.bundle import Bundle, identify_files
from gap_runtime.bundle.files import user_cache, write_whole
from gap_runtime.errors import ConfigError, EngineError
from gap_runtime.records.plain import read_table
from gap_runtime.registry import list_plugins

AUTO: Final = "auto"
"""The backend's name that stands for the fastest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """A backend and the time of a request on it, or why there is none."""

    backend: str
    milliseconds: float | None
    problem: str | None


def time_backends(
    bundle: Bundle, measure: Callable[[str], float], names: list[str] | None = None
) -> tuple[Timed, ...]:
    """Every backend that is there, the fastest first, and behind them those that cannot run it.

    Args:
        bundle: The opened bundle; the fastest is remembered for it.
        measure: Milliseconds of a request on a backend by name.
        names: Of backends; all by default, each on the device that it chooses itself.

    Raises:
        EngineError: None of them runs the bundle.
    """
    wanted = list_plugins(BACKENDS) if names is None else names
    found = [_time(measure, name) for name in wanted]
    ran = [each for each in found if each.milliseconds is not None]
    if not ran:
        raise EngineError(f"{bundle.folder}: no backend runs it; first: {found[0].problem}")
    ran.sort(key=lambda each: each.milliseconds or 0.0)
    _remember(bundle, ran)
    return (*ran, *(each for each in found if each.milliseconds is None))


def _time(measure: Callable[[str], float], name: str) -> Timed:
    try:
        return Timed(backend=name, milliseconds=measure(name), problem=None)
    except (EngineError, ConfigError) as error:
        return Timed(backend=name, milliseconds=None, problem=str(error))


def choose_backend(bundle: Bundle, name: str) -> str:
    """The backend that a name stands for: the fastest that was measured for `auto`."""
    if name != AUTO:
        return name
    try:
        known = str(read_table(_remembered_in(bundle), EngineError)["backend"])
    except (EngineError, OSError, KeyError):
        return DEFAULT_BACKEND
    # It may have been another version's.
    return known if known.partition(":")[0] in list_plugins(BACKENDS) else DEFAULT_BACKEND


def _remember(bundle: Bundle, ran: list[Timed]) -> None:
    data = {
        "backend": ran[0].backend,
        "milliseconds": {each.backend: each.milliseconds for each in ran},
    }
    try:
        path = _remembered_in(bundle)
    except OSError as error:
        raise EngineError(f"the fastest backend cannot be remembered: {error.strerror}") from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_whole(path) as aside:
            aside.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise EngineError(f"{path}: cannot be written ({error.strerror or error})") from error


def _remembered_in(bundle: Bundle) -> Path:
    return user_cache() / bundle.manifest.name / f"fastest-{identify_files(bundle)}.json"
