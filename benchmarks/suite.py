"""What the comparisons share: finding subjects, running them in processes, results and tables.

A subject is a script in benchmarks/peers, run by the python of its own environment; ours are among
them. How it is spoken to is written in benchmarks/peers/measure.py.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil

from benchmarks.environments import UnavailableError, find_python, last_line
from gap_runtime.errors import ConfigError
from gap_runtime.records.files import exists
from gap_runtime.records.plain import read_table

PEERS: Final = Path(__file__).resolve().parent / "peers"
OURS: Final = "gap_export"
OWN: Final = frozenset((OURS, "gap_export_openvino"))
"""Ours on each of its backends; run by the python that runs the suite."""
PRECISIONS: Final = ("fp32", "int4")
STORED: Final = "fp16"
"""What the checkpoints are stored in: exported for GPUs, not run here."""
_SHARED: Final = {"__init__", "measure", "own"}
_SAMPLE_SECONDS: Final = 0.2
BEST: Final = "best peer"
_MARK: Final = ".whole"
_ERRORS: Final = ("Error", "Exception", "error:")


class PeerError(Exception):
    """A subject that failed; the message is one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A subject. `scope` is `whole` (vision too) or `decoder`, `fault` why it cannot be used."""

    key: str
    name: str
    scope: str
    precisions: tuple[str, ...]
    script: Path
    fault: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A process that ended.

    `peak_mb` is of it and all its children at one time, 0 where that was not watched.
    """

    answer: dict[str, Any]
    seconds: float
    peak_mb: float


def read_peer(script: Path) -> Peer:
    """A subject by its script, which is read and not imported: it is for another python."""
    values: dict[str, Any] = {}
    try:
        for node in ast.parse(script.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name, value = node.targets[0].id, node.value
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                if node.value is None:
                    continue
                name, value = node.target.id, node.value
            else:
                continue
            if name in {"NAME", "SCOPE", "PRECISIONS"}:
                values[name] = ast.literal_eval(value)
        return Peer(
            key=script.stem,
            name=values["NAME"],
            scope=values["SCOPE"],
            precisions=tuple(values["PRECISIONS"]),
            script=script,
        )
    except (SyntaxError, ValueError, KeyError) as error:
        return Peer(
            key=script.stem,
            name=script.stem,
            scope="whole",
            precisions=PRECISIONS,
            script=script,
            fault=f"{script.name} has no readable {error}",
        )


def list_peers(folder: Path = PEERS) -> list[str]:
    """Names of all subjects, ours first."""
    names = {path.stem for path in folder.glob("*.py")} - _SHARED
    return sorted(names, key=lambda name: (name not in OWN, name))


def find_peer_python(peer: Peer) -> Path:
    """The python that runs a subject: for ours the one that runs the suite.

    Raises:
        PeerError: Its script is at fault, or its environment cannot be made.
    """
    if peer.fault:
        raise PeerError(peer.fault)
    if peer.key in OWN:
        return Path(sys.executable)
    try:
        return find_python(peer.key)
    except UnavailableError as error:
        raise PeerError(f"cannot be installed: {error}") from error


def run_peer(
    python: Path,
    peer: Peer,
    arguments: Sequence[str],
    *,
    threads: int | None,
    limit_s: float,
    watched: bool = False,
) -> Finished:
    """A subcommand of a subject's script in a process of its own.

    Args:
        python: Of the subject's environment.
        peer: The subject.
        arguments: The subcommand and its arguments.
        threads: For libraries that read it from the environment; None for their own choice.
        limit_s: Seconds after which the process is ended.
        watched: Look at its memory now and then, which takes some of the machine's time.

    Raises:
        PeerError: It failed, took too long or gave no answer.
    """
    environment = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "PYTHONHOME"}}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # Some of a library's commands are found by their names alone.
    environment["PATH"] = f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}"
    if threads is not None:
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    # -P: a script may have the name of the library that it imports.
    command = [str(python), "-P", str(peer.script), *arguments]
    began = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    peaks = [0.0]
    stop = threading.Event()
    watch = threading.Thread(target=_watch, args=(process.pid, peaks, stop), daemon=True)
    if watched:
        watch.start()
    try:
        output, errors = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired as error:
        raise PeerError(f"ended after {limit_s:.0f} s") from error
    finally:
        _end(process)
        stop.set()
        if watched:
            watch.join()
    if process.returncode:
        raise PeerError(find_reason(errors) or f"exit code {process.returncode}")
    try:
        answer = json.loads(output.strip().splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise PeerError(f"no JSON object as the last line: {last_line(output)}") from error
    return Finished(answer=answer, seconds=time.monotonic() - began, peak_mb=peaks[0])


def find_reason(errors: str) -> str:
    """The line of a program's stderr that says why it failed; empty where there is none."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    named = [line for line in lines if any(word in line.split(" ")[0] for word in _ERRORS)]
    return (named or lines or [""])[-1][:200]


def _watch(pid: int, peaks: list[float], stop: threading.Event) -> None:
    """Keep the largest memory of a process and its children, in MB of 10^6 bytes."""
    while not stop.wait(_SAMPLE_SECONDS):
        total = 0
        try:
            root = psutil.Process(pid)
            for each in (root, *root.children(recursive=True)):
                try:
                    total += each.memory_info().rss
                except psutil.Error:
                    continue
        except psutil.Error:
            continue
        peaks[0] = max(peaks[0], total / 1e6)


def _end(process: subprocess.Popen[str]) -> None:
    """End a process that still runs, and its children."""
    if process.poll() is not None:
        return
    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.Error:
        children = []
    for each in children:
        try:
            each.kill()
        except psutil.Error:
            continue
    process.kill()
    process.communicate()


def prepare_peer(
    peer: Peer,
    checkpoint: Path,
    out: Path,
    *,
    precision: str,
    home: Path,
    threads: int | None,
    limit_s: float,
) -> dict[str, Any]:
    """Convert a checkpoint; what that took, without building tools.

    Args:
        peer: The subject.
        checkpoint: A folder of benchmarks.checkpoints with its decoder.
        out: The folder to make; what is there is removed.
        precision: Of the weights.
        home: Folder for tools that are built once.
        threads: As in `run_peer`.
        limit_s: As in `run_peer`.

    Returns:
        `seconds`, `peak_mb`, `written_mb` and `note`; None for the figures of a subject that
        converts nothing.

    Raises:
        PeerError: It failed.
    """
    python = find_peer_python(peer)
    build = home / "tools" / peer.key
    arguments = ["prepare", str(checkpoint), str(out), "--precision", precision]
    arguments += ["--build", str(build)]
    has_tools = (build / _MARK).is_file()
    # The first to come would read from the disk, the others from memory.
    for path in checkpoint.rglob("*.safetensors"):
        read_through(path)
    for _ in range(2):
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        load = os.getloadavg()[0]
        done = run_peer(python, peer, arguments, threads=threads, limit_s=limit_s, watched=True)
        if has_tools or not build.is_dir():
            break
        # It has built its tools, which is no part of an export: once more.
        (build / _MARK).touch()
        has_tools = True
    converts = done.answer.get("converts", True)
    return {
        "seconds": done.seconds if converts else None,
        "peak_mb": done.peak_mb if converts else None,
        "written_mb": written_mb(out) if converts else None,
        "load_average": load,
        "note": done.answer.get("note", ""),
    }


def read_through(path: Path) -> None:
    """Bring a file into the page cache."""
    with path.open("rb", buffering=0) as opened:
        block = bytearray(2**24)
        while opened.readinto(block):
            pass


def written_mb(folder: Path) -> float:
    """Bytes of a folder's files that have no other name, in MB of 10^6 bytes."""
    files = [path.stat() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return sum(file.st_size for file in files if file.st_nlink == 1) / 1e6


def describe_machine() -> dict[str, Any]:
    """What figures depend on."""
    model = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    memory = psutil.virtual_memory().total
    return {"processor": model, "cores": os.cpu_count(), "memory_gb": round(memory / 1e9, 1)}


class Results:
    """Rows by key in a JSON file, written whole after every change."""

    def __init__(self, path: Path, needs: Collection[str] = ()) -> None:
        """Read what is there; every row has to have what `needs` names.

        Raises:
            ConfigError: It cannot be read, or is something else.
        """
        self.path = path
        data = read_table(path, ConfigError) if exists(path) else {}
        rows = data.get("rows", {})
        if not isinstance(rows, dict) or not all(
            isinstance(row, dict) and row.keys() >= set(needs) for row in rows.values()
        ):
            raise ConfigError(f"{path}: not the results of a benchmark; give another file")
        self.rows: dict[str, dict[str, Any]] = rows

    def put(self, key: str, row: dict[str, Any]) -> None:
        """Keep a row."""
        self.rows[key] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f"{self.path.name}.partial")
        data = {"machine": describe_machine(), "rows": self.rows}
        partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.path)


def turns(rounds: int, subjects: Iterable[str]) -> list[tuple[int, str]]:
    """Round and subject, in the order of running: all take turns, so that drift hits all alike."""
    listed = list(subjects)
    return [(number, subject) for number in range(rounds) for subject in listed]


def median(samples: Iterable[float | None]) -> float | None:
    """The median of those that are there; None without any."""
    present = [sample for sample in samples if sample is not None]
    return statistics.median(present) if present else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A figure of a table.

    `read` takes it from a row that did not fail. `read_decoder` takes from our row what a subject
    without vision is compared with; None where that is the same figure. `better` is `low` or
    `high`.
    """

    title: str
    read: Callable[[dict[str, Any]], float | None]
    read_decoder: Callable[[dict[str, Any]], float | None] | None = None
    better: str = "low"
    digits: int = 0


def find_gain(
    column: Column, own: dict[str, Any] | None, row: dict[str, Any]
) -> tuple[float | None, float | None]:
    """A subject's figure, and how many times better ours is: above 1 where it is.

    Args:
        column: Which figure.
        own: Our row; None where we failed or did not run.
        row: The subject's, that did not fail.
    """
    figure = column.read(row)
    if own is None or not figure:
        return figure, None
    alone = row.get("scope") == "decoder" and column.read_decoder is not None
    mine = column.read_decoder(own) if alone and column.read_decoder else column.read(own)
    if not mine:
        return figure, None
    return figure, figure / mine if column.better == "low" else mine / figure


def find_best(column: Column, rows: dict[str, dict[str, Any]], *, ours: str = OURS) -> str:
    """The strongest peer's name and how many times better ours is; `-` without any peer."""
    own = rows.get(ours)
    found = []
    for key, row in rows.items():
        if key in OWN:
            continue
        figure, gain = find_gain(column, own, row)
        if figure is not None:
            # Without a figure of ours the peers are compared with each other.
            order = gain if gain is not None else figure * (1 if column.better == "low" else -1)
            found.append((order, row["name"], gain))
    if not found:
        return "-"
    _, name, gain = min(found, key=lambda each: each[0])
    return name if gain is None else f"{name} ({gain:.2f}x)"


def tabulate(
    rows: dict[str, dict[str, Any]], columns: Sequence[Column], *, ours: str = OURS
) -> list[list[str]]:
    """Cells: a header, a line for each subject, and one for the strongest peer of each figure.

    A cell of a peer has its figure and, in brackets, how many times better ours is (above 1: ours
    is better). A subject that failed has its reason instead of figures.

    Args:
        rows: By subject, each with `name` and `scope`, and `failed` where it failed.
        columns: The figures.
        ours: Which subject the others are compared with.
    """
    table = [["", *(column.title for column in columns)]]
    fine = {key: row for key, row in rows.items() if not row.get("failed")}
    for key, row in rows.items():
        name = f"{row['name']} (decoder)" if row.get("scope") == "decoder" else row["name"]
        if key not in fine:
            table.append([name, f"failed: {row['failed']}"])
            continue
        cells = [name]
        for column in columns:
            figure, gain = find_gain(column, fine.get(ours), row)
            text = "-" if figure is None else f"{figure:,.{column.digits}f}"
            cells.append(text if key == ours or gain is None else f"{text} ({gain:.2f}x)")
        table.append(cells)
    if fine.keys() - OWN:
        table.append([BEST, *(find_best(column, fine, ours=ours) for column in columns)])
    return table


def format_table(table: Sequence[Sequence[str]], *, markdown: bool = False) -> str:
    """Text of a table whose first row is the header; short rows end in one long cell.

    Without Markdown the line of the best peers, whose cells are long, becomes a list below.
    """
    width = len(table[0])
    if markdown:
        lines = [f"| {' | '.join([*row, *[''] * (width - len(row))])} |" for row in table]
        lines.insert(1, "|---" + "|---:" * (width - 1) + "|")
        return "\n".join(lines)
    body = [row for row in table if row[0] != BEST]
    sizes = [max(len(row[k]) for row in body if len(row) == width) for k in range(width)]
    sizes[0] = max(len(row[0]) for row in body)
    lines = []
    for row in body:
        cells = [row[0].ljust(sizes[0])]
        if len(row) == width:
            cells += [cell.rjust(size) for cell, size in zip(row[1:], sizes[1:], strict=True)]
        else:
            cells += row[1:]
        lines.append("  ".join(cells).rstrip())
    for row in table[len(body) :]:
        pairs = zip(table[0][1:], row[1:], strict=True)
        lines.append(
            f"{BEST} by figure: " + "; ".join(f"{title}: {cell}" for title, cell in pairs)
        )
    return "\n".join(lines)
