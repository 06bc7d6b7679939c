"""What stands against running a target's graphs with OpenVINO, and how to get it."""

from __future__ import annotations

from gap_runtime.machines.fit import fits_version
from gap_runtime.machines.survey import Machine
from gap_runtime.machines.target import Target


def find_missing(machine: Machine, target: Target) -> list[str]:
    """What a target misses on a machine that runs it with OpenVINO."""
    missing = []
    for name, wanted in target.packages.items():
        version = machine.engines.get(name)
        if version is None or not fits_version(version, wanted):
            found = version or "none"
            missing.append(
                f"needs {name} {wanted}, found {found}; pip install 'gap-runtime[openvino]'"
            )
    return missing
