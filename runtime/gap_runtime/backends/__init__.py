"""What a backend gives: loaded stages that can be run, and engines where it builds.

Types are imported for the type checker alone: who runs a graph loads nothing that builds one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

from gap_runtime.registry import list_plugins, load_plugin, read_constant, read_summary

if TYPE_CHECKING:
    import numpy as np

    from gap_runtime.bundle.bundle import Bundle
    from gap_runtime.bundle.engines import BuildReport, BuildRequest
    from gap_runtime.bundle.manifest import Stage
    from gap_runtime.display import Display
    from gap_runtime.machines.survey import Machine
    from gap_runtime.machines.target import Target

DEFAULT_BACKEND: Final = "onnxruntime"
BACKENDS: Final = "gap_runtime.backends"


def resolve_backend(name: str) -> str:
    """The backend that a name stands for, `onnxruntime:cuda` for `cuda`; others as they are."""
    backends = list_plugins(BACKENDS)
    if name.partition(":")[0] in backends:
        return name
    for backend in backends:
        short = read_constant(BACKENDS, backend, "SHORT_NAMES") or {}
        if name in short:
            return str(short[name])
    return name


def list_backends() -> list[str]:
    """Every name that stands for a backend, its short ones and `auto` too."""
    backends = list_plugins(BACKENDS)
    short = [read_constant(BACKENDS, name, "SHORT_NAMES") or {} for name in backends]
    return ["auto", *backends, *(name for names in short for name in names)]


def describe_backends() -> str:
    """Every backend with a line from its own file and its short names, for help."""
    parts = ["auto: the fastest for the bundle, as bench --all measured it"]
    for name in list_plugins(BACKENDS):
        short = ", ".join(read_constant(BACKENDS, name, "SHORT_NAMES") or {})
        parts.append(f"{name}: {read_summary(BACKENDS, name)}" + (f" ({short})" if short else ""))
    return ". ".join(parts)


class StageSession(Protocol):
    """A loaded vision or text graph."""

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name for the stage's inputs by name."""


class DecoderSession(Protocol):
    """A loaded decoder graph and its KV cache, which lives on the device."""

    def fit(self, rows: int) -> int | None:
        """The number of rows that a call of so many has to be padded to; None: it is too long."""

    def run(
        self,
        embeddings: np.ndarray,
        position_ids: np.ndarray,
        write_slot: int,
        logits_rows: np.ndarray,
    ) -> np.ndarray:
        """Logits float32 [R, V] of some rows; all rows' keys and values go into the cache.

        What it gives may be written over by the next call.

        Args:
            embeddings: float32 [1, S, D].
            position_ids: int64 [axes, S].
            write_slot: Slot of the cache that row 0 is written to; the others follow.
            logits_rows: Rows whose logits are wanted, int64 [R], at most MOST_LOGITS.
        """


class SavedSlots(Protocol):
    """The first slots of a decoder's cache, outside of it."""

    @property
    def size(self) -> int:
        """In bytes."""


@runtime_checkable
class SlotSaver(Protocol):
    """A decoder session that can save slots of its cache, so that several pictures share it."""

    def copy_slots(self, count: int) -> SavedSlots:
        """A copy of the first slots."""

    def put_slots(self, saved: Any) -> None:
        """Make the first slots what they were when they were copied."""


class Runner(Protocol):
    """What opens the graphs of a bundle."""

    def open_stage(self, bundle: Bundle, stage: Stage, device: str) -> StageSession:
        """Load a vision or text graph; `device` is what the backend's name has after a colon."""

    def open_decoder(self, bundle: Bundle, stage: Stage, device: str) -> DecoderSession:
        """Load the decoder graph and make an empty cache."""


class Backend(Runner, Protocol):
    """A module in gap_runtime.backends; the first line of its docstring is its help."""

    def find_missing(self, machine: Machine, target: Target) -> list[str]:
        """What stands against a target of this backend on a machine, and how to get it."""


class Builder(Protocol):
    """A backend that compiles stages before it runs them."""

    def build(self, bundle: Bundle, request: BuildRequest, display: Display) -> BuildReport:
        """Make the engines that are missing or stale, keep those that are good."""


def open_backend(name: str) -> tuple[Backend, str]:
    """A backend module by name, and the device after a colon in the name (or nothing).

    Raises:
        UnknownNameError: There is no such backend.
    """
    module, _, device = resolve_backend(name).partition(":")
    backend: Backend = load_plugin(BACKENDS, module, "backend")
    return backend, device
