"""`gap-runtime info`: show what a bundle holds."""

from __future__ import annotations

import argparse
from typing import Final

from gap_runtime.cli.options import add_bundle, open_bundle, print_json

SUMMARY: Final = "show what a bundle holds"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_bundle(parser)


def run(options: argparse.Namespace) -> int:
    """Do it; the exit code."""
    bundle = open_bundle(options)
    manifest = bundle.manifest
    if options.json:
        print_json(manifest.dump())
        return 0
    from gap_runtime.display import format_bytes  # noqa: PLC0415

    layout = manifest.layout
    print(f"{manifest.name}: {manifest.family}, {manifest.dtype}, opset {manifest.target.opset}")
    print(f"pruner {manifest.pruning.strategy}, positions {manifest.pruning.positions}")
    print(
        f"prompt: {layout.prefix} text + visual + up to {layout.suffix} text, "
        f"answer up to {layout.answer}; cache {layout.capacity} slots"
    )
    for entry in manifest.ratios:
        extra = f" and {entry.extra} made of the rest" if entry.extra else ""
        bucket = f" ({entry.bucket})" if entry.bucket else ""
        print(f"ratio {entry.ratio:g}{bucket}: keeps {entry.kept} of {entry.patches}{extra}")
    for stage in manifest.stages:
        print(f"stage {stage.file}")
        for label, specs in (("in ", stage.inputs), ("out", stage.outputs)):
            for spec in specs[:6]:
                shape = ", ".join(map(str, spec.shape))
                print(f"  {label} {spec.name} {spec.dtype} [{shape}]  {spec.meaning}")
            if len(specs) > 6:
                print(f"  {label} ... {len(specs) - 6} more of the KV cache")
    total = sum(entry.size for entry in manifest.files.values())
    print(f"{len(manifest.files)} files, {format_bytes(total)}")
    answers = len(manifest.reference.samples) if manifest.reference else 0
    print(f"{answers} reference answers")
    return 0
