"""`gap-runtime info`: show what a bundle holds."""

from __future__ import annotations

import argparse
from typing import Any, Final

from gap_runtime.cli.options import add_bundle, open_bundle, print_json, print_line

SUMMARY: Final = "show what a bundle holds"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_bundle(parser)


def json_types() -> dict[str, Any]:
    """By what decides it, the type of what `--json` prints."""
    from gap_runtime.bundle.manifest import Manifest  # noqa: PLC0415

    return {"--json": Manifest}


def run(options: argparse.Namespace) -> int:
    """Do it; the exit code."""
    bundle = open_bundle(options)
    manifest = bundle.manifest
    if options.json:
        print_json(manifest.dump())
        return 0
    from gap_runtime.display import format_bytes  # noqa: PLC0415

    layout = manifest.layout
    print_line(
        f"{manifest.name}: {manifest.family}, {manifest.dtype}, opset {manifest.target.opset}"
    )
    print_line(f"pruner {manifest.pruning.strategy}, positions {manifest.pruning.positions}")
    print_line(
        f"prompt: {layout.prefix} text + visual + up to {layout.suffix} text, "
        f"answer up to {layout.answer}; cache {layout.capacity} slots"
    )
    for entry in manifest.ratios:
        extra = f" and {entry.extra} made of the rest" if entry.extra else ""
        bucket = f" ({entry.bucket})" if entry.bucket else ""
        print_line(f"ratio {entry.ratio:g}{bucket}: keeps {entry.kept} of {entry.patches}{extra}")
    for stage in manifest.stages:
        print_line(f"stage {stage.file}")
        for label, specs in (("in ", stage.inputs), ("out", stage.outputs)):
            for spec in specs[:6]:
                shape = ", ".join(map(str, spec.shape))
                print_line(f"  {label} {spec.name} {spec.dtype} [{shape}]  {spec.meaning}")
            if len(specs) > 6:
                print_line(f"  {label} ... {len(specs) - 6} more of the KV cache")
    total = sum(entry.size for entry in manifest.files.values())
    print_line(f"{len(manifest.files)} files, {format_bytes(total)}")
    answers = len(manifest.reference.samples) if manifest.reference else 0
    dtype = f", PyTorch in {manifest.reference.dtype}" if manifest.reference else ""
    print_line(f"{answers} reference answers{dtype}")
    source, pruning = manifest.source, manifest.pruning
    revision = f" at {source.revision}" if source.revision else ""
    print_line(f"made from {source.checkpoint}{revision}, index {source.index_sha256[:12]}")
    made_by = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    print_line(f"made for {manifest.target.name}, seed {pruning.seed}, by {made_by}")
    if manifest.quantization is not None:
        fewer = manifest.quantization
        print_line(f"{fewer.weights} weights by {fewer.method}: {', '.join(fewer.parts)}")
    return 0
