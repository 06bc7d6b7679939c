"""Which targets fit a machine, and what stands against the others and how to get it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from gap_runtime.machines.survey import Machine
from gap_runtime.machines.target import Target, list_targets, load_target

_ROOM: Final = 0.9
"""Share of its nominal memory that a machine has at least; firmware keeps the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Whether a target fits; `missing` says what stands against it and how to get it."""

    target: str
    description: str
    fits: bool
    missing: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FitReport:
    """What a machine is, and every target's fit on it."""

    machine: Machine
    targets: tuple[Fit, ...]


Missing = Callable[[Machine, Target], list[str]]
"""What a target's backend misses on a machine, a line each."""


def fit_targets(machine: Machine, find_missing: Missing) -> tuple[Fit, ...]:
    """Every target, and what stands against it on this machine."""
    return tuple(fit_target(machine, load_target(name), find_missing) for name in list_targets())


def fit_target(machine: Machine, target: Target, find_missing: Missing) -> Fit:
    """One target, and what stands against it on this machine."""
    gpu = _miss_gpu(machine, target) if target.compute_capabilities else None
    missing = (*([] if gpu is None else [gpu]), *find_missing(machine, target))
    note = None if missing else _note_memory(machine, target)
    return Fit(
        target=target.name,
        description=target.description,
        fits=not missing,
        missing=missing,
        notes=() if note is None else (note,),
    )


def _miss_gpu(machine: Machine, target: Target) -> str | None:
    wanted = " or ".join(target.compute_capabilities)
    if not machine.gpus:
        return (
            f"no NVIDIA GPU found, needs one of compute capability {wanted}; where there is one, "
            "install its driver until nvidia-smi shows it"
        )
    found = [gpu.compute_capability for gpu in machine.gpus]
    if any(capability in target.compute_capabilities for capability in found):
        return None
    names = ", ".join(
        f"{gpu.name} ({gpu.compute_capability or 'unknown'})" for gpu in machine.gpus
    )
    return f"needs a GPU of compute capability {wanted}, found {names}; choose the target of that"


def _note_memory(machine: Machine, target: Target) -> str | None:
    """What to say of a machine that is smaller than its kind."""
    sizes = [gpu.memory_mib for gpu in machine.gpus if gpu.memory_mib is not None]
    if target.memory_mib is None or not sizes or max(sizes) >= _ROOM * target.memory_mib:
        return None
    return (
        f"the target counts on {target.memory_mib} MiB, this machine has {max(sizes)}; "
        "gap-export MODEL --dry-run --target NAME says what a bundle takes"
    )


def fits_version(version: str, wanted: str) -> bool:
    """Whether a version is one of those that are wanted (PEP 440)."""
    try:
        return SpecifierSet(wanted).contains(Version(version), prereleases=True)
    except InvalidVersion:
        return False
