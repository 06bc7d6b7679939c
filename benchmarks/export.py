"""Time, memory and bytes written of exports of the true sizes, with random weights.

    python -m benchmarks.export [NAME ...] [--home DIR] [--out build/benchmarks/export.json]

Each checkpoint is written (benchmarks.checkpoints), exported with `--no-reference` and removed
again; up to 45 GB of disk are needed at a time. `written` are the bytes of the bundle that are no
hard links.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from benchmarks.checkpoints import write_checkpoint

NAMES: Final = (
    "llava-1.5-7b",
    "llava-1.5-13b",
    "llava-next-vicuna-7b",
    "llava-next-mistral-7b",
    "shikra-7b",
    "minigpt-v2",
)


def measure(name: str, home: Path, options: list[str]) -> dict[str, Any]:
    """One export in a process of its own."""
    found = write_checkpoint(name, home / name)
    out = home / f"{name}-bundle"
    program = Path(sys.executable).parent / "gap-export"
    command = [str(program), name, *found, "--no-reference", "--weights", "link", *options]
    began = time.monotonic()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [*command, "--out", str(out)], capture_output=True, text=True, check=False
    )
    seconds = time.monotonic() - began
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    row: dict[str, Any] = {
        "name": name,
        "options": options,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime - before.ru_utime - before.ru_stime),
        "load_average": round(os.getloadavg()[0], 1),
        "failed": done.stderr.strip().splitlines()[-1] if done.returncode else None,
    }
    if not done.returncode:
        files = [path.stat() for path in out.rglob("*") if path.is_file()]
        row["written_mb"] = round(sum(f.st_size for f in files if f.st_nlink == 1) / 1e6, 1)
        row["bundle_gb"] = round(sum(f.st_size for f in files) / 1e9, 1)
        row["steps"] = [line for line in done.stderr.splitlines() if line.endswith(" s)")]
    shutil.rmtree(home / name)
    shutil.rmtree(out, ignore_errors=True)
    return row


def main() -> None:
    """Command line; every export runs in a child of a child, whose peak memory is its own."""
    parser = argparse.ArgumentParser(description="time and memory of exports of the true sizes")
    parser.add_argument("names", nargs="*", default=list(NAMES), metavar="NAME")
    parser.add_argument("--home", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks/export.json"))
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options, passed = parser.parse_known_args()
    if options.one:
        row = measure(options.names[0], options.home, passed)
        row["peak_gb"] = round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6, 2)
        print(json.dumps(row))
        return
    rows = []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name in options.names:
        command = [sys.executable, "-m", "benchmarks.export", name, "--one"]
        done = subprocess.run(
            [*command, "--home", str(options.home), *(passed or ["--ratio", "0.5"])],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        rows.append(json.loads(done.stdout))
        options.out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        row = rows[-1]
        print(
            f"{name}: {row['seconds']} s, peak {row['peak_gb']} GB, "
            f"{row.get('written_mb')} MB written of {row.get('bundle_gb')} GB"
            + (f"; {row['failed']}" if row["failed"] else "")
        )


if __name__ == "__main__":
    main()
