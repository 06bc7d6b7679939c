"""Time, memory and bytes written of exports, with random weights.

    python -m benchmarks.export [NAME ...] [--sparse] [--home DIR] [--out FILE]
    python -m benchmarks.export --peers [PEER ...] [--precision fp16] [--markdown]

The first form is about the true sizes: each checkpoint is written (benchmarks.checkpoints),
exported with `--no-reference` and removed again; up to 45 GB of disk are needed at a time, none
for `--sparse`, whose files have the true sizes and no values: they are read, hashed and looked
through like others, and neither written nor waited for.

The second form exports one checkpoint of 1.41 billion parameters (`llava-1.1b`) with every peer
that can, each in an environment of its own. They take turns, round by round, each time in a fresh
process with as many threads as it likes; figures are medians. The peak is of the process with all
its children, and what reads the checkpoint finds it in the page cache. For every peer the number
in brackets says how many times better gap-export is. A peer marked (decoder) leaves the vision
tower, a fifth of the parameters, out.

`written` are the bytes of files that are no hard links. The peak of the first form is that of the
process and of the copy that traces beside it, whose common pages count once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Final

import psutil

from benchmarks.checkpoints import RUN, write_checkpoint
from benchmarks.command import (
    read_home,
    read_number,
    read_output,
    read_seconds,
    require_known,
    run_benchmark,
)
from benchmarks.runtime import HOME, make_checkpoint
from benchmarks.suite import (
    OURS,
    PEERS,
    PRECISIONS,
    STORED,
    Column,
    PeerError,
    Results,
    format_table,
    list_peers,
    median,
    prepare_peer,
    read_peer,
    read_through,
    tabulate,
    turns,
)
from gap_runtime.cli.options import ArgumentParser
from gap_runtime.errors import ConfigError

NAMES: Final = (
    "llava-1.5-7b",
    "llava-1.5-13b",
    "llava-next-vicuna-7b",
    "llava-next-mistral-7b",
    "shikra-7b",
    "minigpt-v2",
    "internvl3-1b",
    "internvl3-2b",
    "internvl3-8b",
    "qwen2.5-vl-3b",
    "qwen2.5-vl-7b",
    "qwen3-vl-2b",
    "qwen3-vl-4b",
    "qwen3-vl-8b",
    "llava-onevision-qwen2-0.5b",
    "llava-onevision-qwen2-7b",
)


class _Peak:
    """The largest memory of a process and its copies, whose common pages count once."""

    def __init__(self, pid: int) -> None:
        """Look at it twice a second."""
        self._root = psutil.Process(pid)
        self._most = 0
        self._is_over = threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()

    def stop(self) -> int:
        """Bytes, between the looks at least."""
        self._is_over.set()
        self._watch.join()
        return self._most

    def _look(self) -> None:
        while not self._is_over.wait(0.5):
            with contextlib.suppress(psutil.Error):
                tree = (self._root, *self._root.children())
                self._most = max(self._most, sum(each.memory_full_info().pss for each in tree))


def measure(name: str, home: Path, options: list[str], *, sparse: bool) -> dict[str, Any]:
    """One export in a process of its own; `sparse`: of files without values."""
    found = write_checkpoint(name, home / name, sparse=sparse)
    if sparse:
        # As files that were just written: the holes are pages of memory by then, where they fit.
        for path in sorted((home / name).rglob("*.safetensors")):
            read_through(path)
    out = home / f"{name}-bundle"
    program = Path(sys.executable).parent / "gap-export"
    command = [str(program), name, *found, "--no-reference", "--bring", "link", *options]
    began = time.monotonic()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with subprocess.Popen(
        [*command, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as done:
        peak = _Peak(done.pid)
        _, errors = done.communicate()
    seconds = time.monotonic() - began
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    row: dict[str, Any] = {
        "name": name,
        "options": options,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime - before.ru_utime - before.ru_stime),
        "load_average": round(os.getloadavg()[0], 1),
        "peak_gb": round(max(peak.stop(), usage.ru_maxrss * 1024) / 1e9, 2),
        "failed": errors.strip().splitlines()[-1] if done.returncode else None,
    }
    if not done.returncode:
        files = [path.stat() for path in out.rglob("*") if path.is_file()]
        row["written_mb"] = round(sum(f.st_size for f in files if f.st_nlink == 1) / 1e6, 1)
        row["bundle_gb"] = round(sum(f.st_size for f in files) / 1e9, 1)
        row["steps"] = [line for line in errors.splitlines() if line.endswith(" s)")]
    shutil.rmtree(home / name)
    shutil.rmtree(out, ignore_errors=True)
    return row


def make_columns(checkpoint_mb: float) -> list[Column]:
    """Figures of the comparison."""

    def over_rounds(name: str, title: str, digits: int = 0, unit: float = 1.0) -> Column:
        def read(row: dict[str, Any]) -> float | None:
            figure = median(each[name] for each in row["rounds"])
            return None if figure is None else figure / unit

        return Column(title=title, read=read, digits=digits)

    return [
        over_rounds("seconds", "export, s", digits=1),
        over_rounds("peak_mb", "peak, MB"),
        over_rounds("peak_mb", "peak / checkpoint", digits=2, unit=checkpoint_mb),
        over_rounds("written_mb", "written, MB"),
    ]


def compare(options: argparse.Namespace) -> None:
    """Export one checkpoint with every subject that can, in turns."""
    results = Results(options.out or HOME / "export-peers.json")
    name, precision = options.checkpoint, options.precision
    found = [read_peer(PEERS / f"{key}.py") for key in list_peers()]
    wanted = options.peers or [peer.key for peer in found]
    peers = {
        peer.key: peer for peer in found if peer.key in wanted and precision in peer.precisions
    }
    require_known("peer", wanted, [peer.key for peer in found])
    checkpoint = make_checkpoint(name, HOME)
    for key, peer in peers.items():
        row = {"checkpoint": name, "precision": precision, "peer": key, "name": peer.name}
        row |= {"scope": peer.scope, "rounds": [], "failed": None}
        results.rows[f"{name}/{precision}/{key}"] = row
    for number, key in turns(options.rounds, peers):
        row = results.rows[f"{name}/{precision}/{key}"]
        if row["failed"]:
            continue
        out = HOME / "exported" / key
        try:
            row["rounds"].append(
                prepare_peer(
                    peers[key],
                    checkpoint,
                    out,
                    precision=precision,
                    home=HOME,
                    threads=None,
                    limit_s=options.limit,
                )
            )
        except PeerError as error:
            row["failed"] = str(error)
        shutil.rmtree(out, ignore_errors=True)
        results.put(f"{name}/{precision}/{key}", row)
        print(f"{key}: round {number + 1}, {row['failed'] or 'done'}", flush=True)
    order = [f"{name}/{precision}/{key}" for key in list_peers()]
    rows = {
        row["peer"]: row
        for row in (results.rows[key] for key in order if key in results.rows)
        # What runs a checkpoint as it is exports nothing.
        if row["failed"] or any(each["seconds"] is not None for each in row["rounds"])
    }
    checkpoint_mb = (checkpoint / "model.safetensors").stat().st_size / 1e6
    print(f"\n{name}, {precision}; the checkpoint has {checkpoint_mb:,.0f} MB\n")
    table = tabulate(rows, make_columns(checkpoint_mb), ours=OURS)
    print(format_table(table, markdown=options.markdown))
    loads = [each["load_average"] for row in rows.values() for each in row["rounds"]] or [0.0]
    print(f"\nload average before each export: {min(loads):.1f} to {max(loads):.1f}")
    for row in rows.values():
        notes = "; ".join(dict.fromkeys(each["note"] for each in row["rounds"] if each["note"]))
        if notes:
            print(f"- {row['name']}: {notes}")


def main() -> None:
    """Command line; every export runs in a process of its own."""
    parser = ArgumentParser(description="time and memory of exports")
    parser.add_argument("names", nargs="*", default=list(NAMES), metavar="NAME")
    parser.add_argument("--home", type=read_home, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=read_output)
    parser.add_argument("--sparse", action="store_true", help="checkpoints without values")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    peers = parser.add_argument_group("beside peers")
    peers.add_argument("--peers", nargs="*", metavar="PEER", help="all where none is named")
    peers.add_argument("--checkpoint", default="llava-1.1b", choices=list(RUN))
    peers.add_argument("--precision", default=STORED, choices=(STORED, *PRECISIONS))
    peers.add_argument("--rounds", type=read_number, default=3, help="exports by each subject")
    peers.add_argument(
        "--limit", type=read_seconds, default=3600.0, help="seconds for one process"
    )
    peers.add_argument("--markdown", action="store_true")
    options, passed = parser.parse_known_args()
    if options.peers is not None:
        if passed:
            parser.error(f"unknown arguments: {' '.join(passed)}")
        compare(options)
        return
    require_known("checkpoint", options.names, (*NAMES, *RUN))
    options.out = options.out or HOME / "export.json"
    if options.one:
        row = measure(options.names[0], options.home, passed, sparse=options.sparse)
        print(json.dumps(row))
        return
    rows = []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name in options.names:
        command = [sys.executable, "-m", "benchmarks.export", name, "--one"]
        command += ["--sparse"] if options.sparse else []
        done = subprocess.run(
            [*command, "--home", str(options.home), *(passed or ["--ratio", "0.5"])],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            raise ConfigError(f"{name}: its process ended with {done.returncode}, see above")
        rows.append(json.loads(done.stdout))
        options.out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        row = rows[-1]
        print(
            f"{name}: {row['seconds']} s ({row['cpu_seconds']} s of CPU), "
            f"peak {row['peak_gb']} GB, "
            f"{row.get('written_mb')} MB written of {row.get('bundle_gb')} GB"
            + (f"; {row['failed']}" if row["failed"] else "")
        )


if __name__ == "__main__":
    run_benchmark(main)
