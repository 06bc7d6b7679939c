"""What fits where: the table of docs/targets.md, by `gap-export MODEL --dry-run` on true shapes.

    python -m benchmarks.memory

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
    INTERNVL,
    LLAMA_7B,
    LLAMA_13B,
    write_internvl,
    write_library,
)

_write_llava: Final = partial(write_library, kind="llava")
MODELS: Final = {
    "llava-1.5-7b": ("LLaVA-1.5-7B", _write_llava, LLAMA_7B),
    "llava-1.5-13b": ("LLaVA-1.5-13B", _write_llava, LLAMA_13B),
} | {name: (f"InternVL3-{name[-2:].upper()}", write_internvl, INTERNVL[name]) for name in INTERNVL}
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
    sizes = [f"{memory[key] / _GIB:.1f}" for key in ("bundle_bytes", "total_bytes")]
    verdicts = [
        "fits" if memory["total_bytes"] <= gib * _GIB else "no" for gib in MACHINES.values()
    ]
    return f"| {' | '.join([model, precision, *sizes, *verdicts])} |"


def main() -> None:
    """Print the table."""
    print(f"| {' | '.join(['model', 'weights', 'bundle', 'to run', *MACHINES])} |")
    print("|" + "---|" * (4 + len(MACHINES)))
    with tempfile.TemporaryDirectory() as home:
        for name, (model, write, text) in MODELS.items():
            folder = Path(home) / name
            write(folder, text=text, sparse=True)
            for precision, options in PRECISIONS.items():
                print(make_row(model, precision, estimate(name, folder, options)), flush=True)


if __name__ == "__main__":
    main()
