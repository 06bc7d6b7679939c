"""`build_engine.sh`: the lines of trtexec that do what `gap-runtime build` does."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Final

from gap_runtime.bundle.engines import ENGINES, list_profiles
from gap_runtime.bundle.manifest import DECODER, BundleLayout, RatioEntry, Stage
from gap_runtime.machines.target import Target

BUILD_SCRIPT: Final = "build_engine.sh"

_HEAD: Final = f"""#!/bin/sh
# Builds this bundle's engines with trtexec, on the machine that will run them, for pipelines of
# your own. gap-runtime does not load them; for engines that it loads: gap-runtime build BUNDLE
# Usage: sh {BUILD_SCRIPT} [FOLDER]; TRTEXEC names another trtexec.
set -eu
cd "$(dirname "$0")"
trtexec="${{TRTEXEC:-trtexec}}"
out="${{1:-{ENGINES}/trtexec}}"
mkdir -p "$out"
"""


def write_build_script(
    folder: Path,
    target: Target,
    stages: list[Stage],
    layout: BundleLayout,
    entries: tuple[RatioEntry, ...],
) -> None:
    """Write the script into a bundle, if its target builds engines at all."""
    if not target.packages:
        return
    path = folder / BUILD_SCRIPT
    path.write_text(make_build_script(target, stages, layout, entries), encoding="utf-8")
    path.chmod(0o755)


def make_build_script(
    target: Target, stages: list[Stage], layout: BundleLayout, entries: tuple[RatioEntry, ...]
) -> str:
    """The script's text: one call of trtexec for every stage."""
    calls = [_make_call(target, stage, list_profiles(layout, entries)) for stage in stages]
    return "\n".join([_HEAD, *calls])


def _make_call(target: Target, stage: Stage, profiles: tuple[int, ...]) -> str:
    words = [
        f"--onnx={shlex.quote(stage.file)}",
        f'--saveEngine="$out"/{shlex.quote(f"{stage.name}.engine")}',
        "--stronglyTyped",
    ]
    if target.workspace_mib is not None:
        # A bare number is MiB in every version.
        words.append(f"--memPoolSize=workspace:{target.workspace_mib}")
    words += ['--timingCacheFile="$out"/timing.cache', "--skipInference"]
    if stage.role == DECODER:
        for k, rows in enumerate(profiles):
            shapes = _describe_shapes(stage, rows)
            sides = (f"--{side}Shapes={shapes}" for side in ("min", "opt", "max"))
            words.append(f"--profile={k} {' '.join(sides)}")
    return '"$trtexec" ' + " \\\n  ".join(words) + "\n"


def _describe_shapes(stage: Stage, rows: int) -> str:
    """The inputs with a free dimension, at that many rows."""
    free = [spec for spec in stage.inputs if any(isinstance(size, str) for size in spec.shape)]
    return ",".join(f"{spec.name}:{'x'.join(map(str, spec.shape_at(rows)))}" for spec in free)
