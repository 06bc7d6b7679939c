"""Kill exports, builds, evaluations, sweeps and pulls at random moments; see what is there after.

    python -m kills --home HOME --kills 200 [--seed 7] [--jobs export build]

After each kill the place is as it was, or as was asked for. After some kills in one place the same
command runs to its end: it has to end well and leave nothing behind but its results.

Every case is a fork of a process that has imported everything and traced the graphs, so that the
moments fall into the work that can be seen from outside.
"""

import argparse
import collections
import os
import random
import shutil
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from faults.driver import MARKS, build_job, evaluate_job, export_job, import_all, pull_job
from tools.places import ROOT

from gap_export.cli.main import main as export_main
from gap_runtime.bundle.bundle import Bundle
from gap_runtime.bundle.engines import find_fault
from gap_runtime.errors import GapError
from gap_runtime.evaluation.results import read_answers

ROUND = 5
"""Kills in one place before the command may end."""


def prepare_evaluation(home):
    arguments, run = evaluate_job(home)
    return [*arguments, "--limit", "8", "--resume"], run


def prepare_sweep(home):
    arguments = [
        *("sweep", str(home / "checkpoint"), "--data", "refshapes:test", "--limit", "4"),
        *("--ratio", "0.5", "--pruners", "cls_attention", "--positions", "gap", "--resume"),
        *("--backend", "onnxruntime:cpu", "--gallery", "0", "--out", str(home / "place" / "all")),
    ]
    return arguments, export_main


PREPARE = {
    "export": export_job,
    "replace": export_job,
    "evaluate": prepare_evaluation,
    "build": build_job,
    "sweep": prepare_sweep,
    "pull": pull_job,
}
BEFORE = {"replace": "first", "evaluate": "first", "build": "engines"}


def begin(home, job):
    """The place as it is before the first command."""
    shutil.rmtree(home / "place", ignore_errors=True)
    (home / "place").mkdir()
    if job in BEFORE:
        shutil.copytree(home / BEFORE[job], home / "place" / "bundle")


def start(home, command):
    """The command in a process of its own; what it says is in a file."""
    arguments, run = command
    child = os.fork()
    if not child:
        code = 99
        try:
            with (
                (home / "said").open("w", encoding="utf-8") as said,
                redirect_stdout(said),
                redirect_stderr(said),
            ):
                code = run(arguments)
        finally:
            os._exit(code)
    return child


def wait(child, seconds=None):
    """Its exit code; None where it was killed."""
    until = None if seconds is None else time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, 0 if until is None else os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.0005)


def look(home, job, *, is_done):
    """Why the place is not as promised; None where it is."""
    place = home / "place"
    names = {path.name for path in place.iterdir()}
    if job in BEFORE and "bundle" not in names:
        return "the bundle is away"
    try:
        for path in [*place.glob("bundle"), *place.glob("all/bundles/[!.]*")]:
            bundle = Bundle.open(path, verify_all=True)
            for stage in bundle.manifest.stages if job == "build" else ():
                for folder in path.glob("engines/*"):
                    fault = find_fault(bundle, stage, folder)
                    if is_done and fault:
                        return f"engine {stage.name}: {fault}"
    except GapError as error:
        return str(error)
    for path in [*place.glob("answers.jsonl"), *place.glob("all/answers/*.jsonl")]:
        try:
            read_answers(path)
        except GapError as error:
            # Of a file without a whole line nothing was answered: it is begun again.
            if b"\n" in path.read_bytes() or is_done:
                return str(error)
    left = [path for path in place.rglob(".*") if any(mark in path.name for mark in MARKS)]
    return f"left behind: {left}" if is_done and left else None


class Counts:
    """Outcomes by job; what is not as promised is written to stderr."""

    def __init__(self):
        self.found = collections.Counter()

    def add(self, job, outcome, why):
        self.found[job, outcome] += 1
        if why is not None:
            self.found[job, "failures"] += 1
            sys.stderr.write(f"{job}, {outcome}: {why}\n")


def kill_some(home, job, kills, rng, counts):
    command = PREPARE[job](home)
    begin(home, job)
    import_all(command[1], command[0])
    begin(home, job)
    since = time.monotonic()
    finish(home, job, command, counts)
    length = time.monotonic() - since
    while counts.found[job, "killed"] < kills:
        begin(home, job)
        for _ in range(ROUND):
            code = wait(start(home, command), rng.random() * length)
            outcome = "killed" if code is None else "done before"
            # Half a pull stays for the next one to go on with, as it says.
            is_half = job == "pull" and code is None
            found = None if is_half else look(home, job, is_done=False)
            why = f"exit code {code}" if code else found
            counts.add(job, outcome, why)
        finish(home, job, command, counts)


def finish(home, job, command, counts):
    """The command once more, to its end."""
    code = wait(start(home, command))
    said = (home / "said").read_text("utf-8")[-600:]
    why = f"exit code {code}: {said!r}" if code else look(home, job, is_done=True)
    counts.add(job, "ended", why)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", nargs="+", choices=list(PREPARE), default=list(PREPARE))
    options = parser.parse_args()
    home = options.home.resolve()
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    shutil.copytree(ROOT / "refshapes" / "checkpoint", home / "checkpoint")
    for name, target in (("first", "cpu"), ("engines", "rtx")):
        arguments = ("refshapes", "--ratio", "0.5", "--target", target, "--no-reference")
        assert export_main([*arguments, "--out", str(home / name)]) == 0
    counts = Counts()
    for job in options.jobs:
        rng = random.Random(f"{job}:{options.seed}")
        kill_some(home, job, -(-options.kills // len(options.jobs)), rng, counts)
        cells = (
            f"{counts.found[job, name]} {name}" for name in ("killed", "done before", "ended")
        )
        sys.stdout.write(f"{job}: {', '.join(cells)}, {counts.found[job, 'failures']} failures\n")
        sys.stdout.flush()
    return any(name == "failures" for _, name in counts.found)


if __name__ == "__main__":
    sys.exit(main())
