"""`gap-runtime doctor`: say what this machine has and which targets fit it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gap_runtime.cli.options import print_json
from gap_runtime.errors import EngineError

if TYPE_CHECKING:
    from gap_runtime.machines.fit import Fit
    from gap_runtime.machines.survey import Machine
    from gap_runtime.machines.target import Target

SUMMARY: Final = "say what this machine has and which targets fit it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--all", action="store_true", help="all that each target misses, and how to get it"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def json_types() -> dict[str, Any]:
    """By what decides it, the type of what `--json` prints."""
    from gap_runtime.machines.fit import FitReport  # noqa: PLC0415

    return {"--json": FitReport}


def run(options: argparse.Namespace) -> int:
    """Do it; the exit code."""
    from gap_runtime.machines.fit import FitReport, fit_targets  # noqa: PLC0415
    from gap_runtime.machines.survey import survey_machine  # noqa: PLC0415
    from gap_runtime.records import dump_record  # noqa: PLC0415

    machine = survey_machine(Path.cwd())
    fits = fit_targets(machine, _find_missing)
    if options.json:
        print_json(dump_record(FitReport(machine=machine, targets=fits)))
    else:
        _show_machine(machine)
        _show_targets(fits, every=options.all)
    if any(fit.fits for fit in fits):
        return 0
    print(
        "error: no target fits this machine; see what each of them misses, or pip install "
        "'gap-runtime[cpu]' to run bundles on the CPU",
        file=sys.stderr,
    )
    return EngineError.exit_code


def _find_missing(machine: Machine, target: Target) -> list[str]:
    """What the target's own backend misses."""
    from gap_runtime.backends import open_backend  # noqa: PLC0415

    return open_backend(target.backend)[0].find_missing(machine, target)


def _show_machine(machine: Machine) -> None:
    from gap_runtime.machines.survey import describe_gpu, describe_size  # noqa: PLC0415

    rows = [
        ("machine", f"{machine.system}, Python {machine.python}"),
        ("memory", f"{describe_size(machine.memory_mib)}, {describe_size(machine.free_mib)} free"),
        ("disk", f"{describe_size(machine.disk_free_mib)} free here"),
        *(("GPU", describe_gpu(gpu)) for gpu in machine.gpus),
    ]
    if not machine.gpus:
        rows.append(("GPU", "none found"))
    else:
        driver, cuda = machine.driver or "unknown", machine.cuda or "unknown"
        rows.append(("driver", f"{driver}, runs CUDA {cuda}"))
    if machine.jetson is not None:
        jetson = machine.jetson
        linux, jetpack = jetson.linux or "unknown", jetson.jetpack or "unknown"
        rows.append(("Jetson", f"{jetson.model}, JetPack {jetpack}, Jetson Linux {linux}"))
    engines = [f"{name} {version}" for name, version in machine.engines.items()]
    rows.append(("engines", ", ".join(engines) or "not installed"))
    rows.append(("cuda-python", machine.cuda_python or "not installed"))
    found = [f"{name} {version}" for name, version in machine.onnxruntimes.items()]
    providers = f": {', '.join(machine.providers)}" if machine.providers else ""
    rows.append(("onnxruntime", (", ".join(found) or "not installed") + providers))
    rows += [("problem", text) for text in machine.problems]
    for name, text in rows:
        print(f"{name:<12} {text}")


def _show_targets(fits: tuple[Fit, ...], *, every: bool) -> None:
    """Those that fit first; of the others the first thing that each misses, or everything."""
    width = max(len(fit.target) for fit in fits)
    for fit in sorted(fits, key=lambda each: not each.fits):
        line = f"target {fit.target:<{width}}  {'fits' if fit.fits else 'does not fit'}"
        if every or fit.fits:
            print(line)
            for text in (*fit.missing, *fit.notes):
                print(f"    {text}")
        else:
            more = len(fit.missing) - 1
            others = f", and {more} more" if more else ""
            print(f"{line}: {fit.missing[0].partition(';')[0]}{others}")
    if not every and not all(fit.fits for fit in fits):
        print("gap-runtime doctor --all says how to get what is missing")
