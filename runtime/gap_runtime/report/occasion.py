"""When, where and with what a report was made: what it needs once it is passed on."""

from __future__ import annotations

import datetime as dt
import platform
from importlib import metadata
from pathlib import Path

from gap_runtime.bundle.bundle import Bundle
from gap_runtime.machines.survey import Machine, describe_gpu, survey_machine

Occasion = tuple[tuple[str, str], ...]
"""Names and what they are, for people."""


def note_occasion(bundle: Bundle) -> Occasion:
    """Now, here, with this bundle.

    Raises:
        BundleError: The bundle's manifest is gone.
    """
    now = dt.datetime.now(dt.timezone.utc)
    return describe_occasion(bundle, survey_machine(Path.cwd()), platform.node(), now)


def describe_occasion(bundle: Bundle, machine: Machine, host: str, when: dt.datetime) -> Occasion:
    """The lines about a time and a machine.

    Raises:
        BundleError: The bundle's manifest is gone.
    """
    driver = f"driver {machine.driver or 'unknown'}, CUDA {machine.cuda or 'unknown'}"
    gpus = "; ".join(describe_gpu(gpu) for gpu in machine.gpus)
    here = {
        "gap-runtime": metadata.version("gap-runtime"),
        "Python": machine.python,
        **machine.onnxruntimes,
        **machine.engines,
    }
    return (
        ("date", f"{when:%Y-%m-%d %H:%M} {when.tzname()}"),
        ("host", host or "unknown"),
        ("system", machine.system if machine.jetson is None else machine.jetson.model),
        ("GPU", f"{gpus}; {driver}" if gpus else "none found"),
        ("versions", ", ".join(f"{name} {version}" for name, version in here.items())),
        ("exported with", ", ".join(f"{k} {v}" for k, v in bundle.manifest.versions.items())),
        ("bundle", f"{bundle.folder.resolve().name}, manifest {bundle.hash_manifest()} (SHA-256)"),
    )
