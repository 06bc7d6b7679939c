"""What fits where: the table of docs/targets.md, by `gap-export MODEL --dry-run` on true shapes.

    python -m benchmarks.memory [NAME ...]

The checkpoints are sparse: headers of the true sizes and no bytes behind them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks.checkpoints import (
    LLAMA_7B,
    LLAMA_13B,
    write_internvl,
    write_library,
    write_onevision,
)
from benchmarks.command import require_known, run_benchmark
from benchmarks.qwen import QWEN, write_qwen
from benchmarks.tiled import INTERNVL, ONEVISION
from gap_export.pipeline.estimate import is_tight

MODELS: Final = (
    {
        "llava-1.5-7b": ("LLaVA-1.5-7B", partial(write_library, kind="llava", text=LLAMA_7B)),
        "llava-1.5-13b": ("LLaVA-1.5-13B", partial(write_library, kind="llava", text=LLAMA_13B)),
    }
    | {
        name: (f"InternVL3-{name[-2:].upper()}", partial(write_internvl, text=text))
        for name, text in INTERNVL.items()
        if name.startswith("internvl3-")
    }
    | {
        name: (
            f"LLaVA-OneVision-{name.rpartition('-')[2].upper()}",
            partial(write_onevision, text=text),
        )
        for name, text in ONEVISION.items()
    }
    | {
        name: (name.upper().replace("QWEN", "Qwen"), partial(write_qwen, name=name))
        for name in QWEN
    }
)
PRECISIONS: Final = {"float16": [], "int8": ["--quantize", "int8"], "int4": ["--quantize", "int4"]}
MACHINES: Final = {
    "Orin Nano, 8 GB": 8,
    "Orin NX, 16 GB": 16,
    "AGX Orin, 64 GB": 64,
    "Thor, 128 GB": 128,
}
"""GiB of memory, which CPU and GPU share."""
_GIB: Final = 2**30


def estimate(name: str, folder: Path, options: list[str]) -> dict[str, Any]:
    """The memory part of a dry run."""
    program = Path(sys.executable).parent / "gap-export"
    command = [str(program), name, "--checkpoint", str(folder), *options, "--ratio", "0.5"]
    done = subprocess.run(
        [*command, "--target", "jetson-orin-jp7", "--no-reference", "--dry-run", "--json"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=folder,
    )
    memory: dict[str, Any] = json.loads(done.stdout)["memory"]
    return memory


def make_row(model: str, precision: str, memory: dict[str, Any]) -> str:
    """A row of the table; GiB."""
    total = memory["total_bytes"]
    sizes = [f"{size / _GIB:.1f}" for size in (memory["bundle_bytes"], total)]
    verdicts = [
        "tight" if is_tight(total, gib * _GIB) else "fits" if total <= gib * _GIB else "no"
        for gib in MACHINES.values()
    ]
    return f"| {' | '.join([model, precision, *sizes, *verdicts])} |"


def main() -> None:
    """Print the table, or the rows of some models."""
    names = sys.argv[1:] or list(MODELS)
    require_known("model", names, MODELS)
    sizes = ("bundle", "to run")
    print(f"| {' | '.join(['model', 'weights', *sizes, *MACHINES])} |")
    print("|" + "---|" * (2 + len(sizes) + len(MACHINES)))
    with tempfile.TemporaryDirectory() as home:
        for name in names:
            model, write = MODELS[name]
            folder = Path(home) / name
            write(folder, sparse=True)
            for precision, options in PRECISIONS.items():
                print(make_row(model, precision, estimate(name, folder, options)), flush=True)


if __name__ == "__main__":
    run_benchmark(main)
