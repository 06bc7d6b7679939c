"""A call that fails ends a command in one line, and leaves what was there or what was asked for.

As SQLite tests its I/O errors. `make faults` has every call and every error, the default run some.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
from tools.places import ROOT

from gap_export.cli.main import main
from gap_runtime.errors import NoBoxError

ERRORS = {"ENOSPC": 28, "EIO": 5, "EACCES": 13, "EINTR": 4}
COMPILER = shutil.which("cc") or shutil.which("gcc")
pytestmark = pytest.mark.skipif(
    COMPILER is None or not sys.platform.startswith("linux"), reason="needs Linux and a C compiler"
)


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    path = tmp_path_factory.mktemp("shim") / "shim.so"
    source = ROOT / "tests" / "faults" / "shim.c"
    subprocess.run(
        [COMPILER, "-shared", "-fPIC", "-O1", "-o", str(path), str(source), "-ldl"], check=True
    )
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny_llava, exported):
    """A checkpoint, a bundle of it, and a place for what commands write."""
    folder = tmp_path_factory.mktemp("faults")
    shutil.copytree(tiny_llava, folder / "checkpoint")
    shutil.copytree(exported.folder, folder / "first")
    return folder


@pytest.fixture(scope="module")
def engines(home):
    """A bundle that TensorRT has kernels for, where `build` looks for it."""
    arguments = ("refshapes", "--ratio", "0.5", "--target", "rtx", "--no-reference")
    assert main([*arguments, "--out", str(home / "engines")]) == 0


@pytest.fixture(scope="module")
def run_job(shim, home):
    def run(job, error, first, step):
        done = subprocess.run(
            [
                *(sys.executable, "-W", "ignore", "-m", "faults.driver", job, str(home)),
                *map(str, (ERRORS[error], first, step)),
            ],
            capture_output=True,
            text=True,
            check=False,
            env={
                **os.environ,
                "LD_PRELOAD": str(shim),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "runtime", ROOT / "tests"))),
            },
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]

    return run


EXPORT = {"open", "write", "rename", "fsync", "mkdir", "flock"}
CALLS = {
    "export": EXPORT,
    "source": {"open", "read"},
    "replace": EXPORT | {"unlink"},
    "evaluate": {"open", "read", "write", "flock"},
    "ground": {"open"},
    "build": {"open", "rename", "fsync", "mkdir"},
    "sweep": EXPORT | {"read", "link"},
    "pull": {"open", "write", "mkdir"},
    "push": {"open", "read"},
}
"""What each job does at least, and so has to fail once. Of `source` it is done to a checkpoint."""
FIRST = {"export", "source"}
"""Where there is no bundle before. Nor is there for `pull`, which may leave a half, as it says."""


def judge(job, case):
    """Why a case is not as promised; None where it is."""
    code, state = case["code"], case["bundle"]
    errors = [line for line in case["said"].splitlines() if line.startswith("error: ")]
    said_well = len(errors) == (code != 0) and "Traceback" not in case["said"]
    extra = sorted(set(case["names"]) - {"bundle", "answers.jsonl", "all", "cache"})
    rules = {
        f"exit code {code}: {case['said'][-1500:]}": said_well and code in {0, 2, 3, 4, 5, 6, 7},
        f"left behind: {extra or case['left']}": not extra and not case["left"],
        f"done, but engines are not: {case['engines']}": code != 0 or not case["engines"],
        f"the bundle is {state}": not state.startswith("broken") or (job == "pull" and code != 0),
        f"pulled, but the bundle is {state}": job != "pull" or code != 0 or state != "none",
        f"exit code {code}, but the bundle is {state}": job not in FIRST
        or (code == 0) == (state != "none"),
        "swept, but there is no bundle": job != "sweep" or code != 0 or state != "none",
        "the older bundle is away": job in {*FIRST, "sweep", "pull"} or state != "none",
        f"done, but the answers are {case['answers']}": job not in {"evaluate", "sweep"}
        or code != 0
        or case["answers"] == "2",
        # A file of nothing is gone on with, too.
        f"its answers cannot be gone on with: {case['answers']}": case["answers"]
        in {"none", "empty", "0", "1", "2"},
    }
    return next((why for why, holds in rules.items() if not holds), None)


def check(job, cases):
    wrong = [(case["number"], case["failed"], why) for case in cases if (why := judge(job, case))]
    sys.stdout.write(f"{job}: {len(cases)} cases, {len(wrong)} not as promised\n")
    assert wrong == []
    return {case["failed"] for case in cases}


def test_some_calls_fail(run_job):
    """Of the job that needs no tracing; the others are in `make faults`."""
    cases = run_job("evaluate", "EIO", 3, 29)
    assert len(cases) > 3
    check("evaluate", cases)


@pytest.mark.matrix
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("job", CALLS)
def test_every_call_fails_once(run_job, request, job, error):
    if job == "build":
        request.getfixturevalue("engines")
    cases = run_job(job, error, 0, 1)
    failed = check(job, cases)
    assert len(cases) > 20
    assert failed >= CALLS[job]
    # The last one found no call left that could fail.
    assert cases[-1]["failed"] == ""
    # Random weights find no box, which is an answer of `ground`.
    assert cases[-1]["code"] == (NoBoxError.exit_code if job == "ground" else 0)
