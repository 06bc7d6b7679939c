"""Runs one command over and over, each time with another call that fails; needs the shim loaded.

    LD_PRELOAD=shim.so python -m faults.driver JOB HOME ERRNO FIRST STEP

Every case is a fork of one process that has imported everything and traced the graphs, but has
started no thread of a library. On stdout comes a line of JSON for each: the number of the call,
its name, the exit code, what was said.
"""

import ctypes
import io
import json
import os
import shutil
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout, suppress
from importlib import import_module
from pathlib import Path

from PIL import Image

MOST = 5000


def main():
    job, home, error, first, step = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:6])
    shim = ctypes.CDLL(None)
    shim.fault_name.restype = ctypes.c_char_p
    arguments, run = JOBS[job](home)
    prepare(home, job)
    import_all(run, arguments)
    for number in range(first, MOST, step):
        prepare(home, job)
        watched = home / WATCHED.get(job, "place")
        found = fork(shim, run, arguments, watched, number, error)
        print(json.dumps({"number": number, **found, **look(home)}), flush=True)
        if not found["failed"]:
            # The command makes no more calls than that.
            return


def import_all(run, arguments):
    """Import here what a command imports; it runs in a fork, whose threads end with it."""
    out, into = os.pipe()
    child = os.fork()
    if not child:
        os.close(out)
        before = set(sys.modules)
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                run(arguments)
        finally:
            with os.fdopen(into, "w") as pipe:
                json.dump(sorted(set(sys.modules) - before), pipe)
            os._exit(0)
    os.close(into)
    with os.fdopen(out) as pipe:
        names = json.load(pipe)
    os.waitpid(child, 0)
    for name in names:
        with suppress(Exception):
            import_module(name)


def fork(shim, run, arguments, place, number, error):
    """One case in a process of its own."""
    out, into = os.pipe()
    child = os.fork()
    if not child:
        os.close(out)
        said, code = io.StringIO(), -1
        shim.fault_arm(os.fsencode(place), number, error)
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(said):
                code = run(arguments)
        except BaseException:
            said.write(traceback.format_exc())
        failed = shim.fault_name().decode()
        found = {"code": code, "said": said.getvalue(), "failed": failed}
        os.write(into, json.dumps(found).encode())
        os._exit(0)
    os.close(into)
    with os.fdopen(out, "rb") as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else {"code": None, "said": "it died", "failed": "?"}


def export_job(home):
    from makers.families import GRAPHS

    from gap_export.cli.main import main as run
    from gap_export.pipeline import run as pipeline

    pipeline.GraphCache = lambda **_: GRAPHS
    arguments = [
        *(str(home / "checkpoint"), "--ratio", "0.5", "--out", str(home / "place" / "bundle")),
        *("--set", "prompt.template=<image> {phrase}", "--set", "prompt.answer=8", "--force"),
        "--no-reference",
    ]
    # Traces the graphs for all the forks.
    shutil.rmtree(home / "traced", ignore_errors=True)
    with redirect_stdout(io.StringIO()):
        assert run([*arguments, "--out", str(home / "traced")]) == 0
    return arguments, run


def evaluate_job(home):
    from gap_runtime.cli.main import main as run

    arguments = [
        *("evaluate", str(home / "place" / "bundle"), "--data", "refshapes:test", "--limit", "2"),
        *("--ratio", "0.5", "--out", str(home / "place" / "answers.jsonl")),
    ]
    return arguments, run


def ground_job(home):
    from gap_runtime.cli.main import main as run

    Image.new("RGB", (90, 60), (200, 100, 50)).save(home / "picture.png")
    return ["ground", str(home / "place" / "bundle"), str(home / "picture.png"), "a square"], run


def build_job(home):
    """With a made-up TensorRT, as none of its own calls is ours."""
    from tools.places import load_runtime_helper

    from gap_runtime.bundle.bundle import Bundle
    from gap_runtime.cli.main import main as run

    fakes = load_runtime_helper("fake_tensorrt")
    gpu = fakes.FakeCuda()
    trt = fakes.FakeTensorrt("tensorrt", "10.16.1", gpu)
    trt.add_bundle(Bundle.open(home / "engines"))
    sys.modules |= {"tensorrt": trt, "tensorrt_rtx": None, "cuda.bindings.runtime": gpu}
    return ["build", str(home / "place" / "bundle"), "--force"], run


def sweep_job(home):
    """Of one variant and its plain model; what begins again goes on, so the folder is new."""
    from makers.families import GRAPHS

    from gap_export.analysis import sweep
    from gap_export.cli.main import main as run

    sweep.GraphCache = lambda **_: GRAPHS
    arguments = [
        *("sweep", str(home / "checkpoint"), "--data", "refshapes:test", "--limit", "2"),
        *("--set", "prompt.template=<image> {phrase}", "--set", "prompt.answer=8"),
        *("--ratio", "0.5", "--pruners", "cls_attention", "--positions", "gap"),
        *("--backend", "onnxruntime:cpu", "--gallery", "0", "--out"),
    ]
    # Traces the graphs for all the forks.
    shutil.rmtree(home / "traced", ignore_errors=True)
    with redirect_stdout(io.StringIO()):
        assert run([*arguments, str(home / "traced")]) == 0
    return [*arguments, str(home / "place" / "all")], run


def stand_in_for_the_hub(home):
    """A hub that knows the first bundle; it answers from this process, the forks ask it."""
    from huggingface_hub import constants
    from makers.hub import TOKEN, Hub

    from gap_runtime.bundle.bundle import Bundle
    from gap_runtime.bundle.hub import parse_name
    from gap_runtime.bundle.license import License
    from gap_runtime.bundle.push import push

    hub = Hub()
    constants.ENDPOINT = hub.url
    constants.HUGGINGFACE_CO_URL_TEMPLATE = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HF_HUB_DISABLE_XET = True
    # Beside what is pulled, so that calls on it fail, too.
    constants.HF_HUB_CACHE = str(home / "place" / "cache")
    constants.HF_TOKEN_PATH = str(home / "token")
    os.environ["HF_TOKEN"] = TOKEN
    found = License(name="apache-2.0", said_by="a test")
    push(Bundle.open(home / "first"), parse_name(HUB_NAME), found, "---\nlicense: mit\n---\n")
    return hub


def pull_job(home):
    from gap_runtime.cli.main import main as run

    stand_in_for_the_hub(home)
    return ["pull", HUB_NAME, "--out", str(home / "place" / "bundle")], run


def push_job(home):
    from gap_runtime.cli.main import main as run

    stand_in_for_the_hub(home)
    return [
        "push",
        str(home / "place" / "bundle"),
        HUB_NAME,
        "--license",
        "apache-2.0",
        "--no-check",
    ], run


JOBS = {
    "export": export_job,
    "source": export_job,
    "replace": export_job,
    "evaluate": evaluate_job,
    "ground": ground_job,
    "build": build_job,
    "sweep": sweep_job,
    "pull": pull_job,
    "push": push_job,
}
HUB_NAME = "org/tiny"
EMPTY = {"export", "source", "sweep", "pull"}
"""Jobs that begin without a bundle."""

MARKS = (".partial-", ".link")
"""In names of what is written aside, which nothing leaves behind."""

WATCHED = {"source": "checkpoint"}
"""Where calls fail that are not those in the place that is written to."""


def prepare(home, job):
    """The place as it is before the command."""
    place = home / "place"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    if job not in EMPTY:
        first = home / ("engines" if job == "build" else "first")
        shutil.copytree(first, place / "bundle")


def look(home):
    """What lies in the place afterwards."""
    from gap_runtime.bundle.bundle import Bundle
    from gap_runtime.bundle.engines import find_fault
    from gap_runtime.errors import GapError

    place = home / "place"
    names = sorted(path.name for path in place.iterdir())
    left = [each.name for each in place.rglob(".*") if any(mark in each.name for mark in MARKS)]
    state = {"names": names, "bundle": "none", "answers": "none", "engines": [], "left": left}
    for folder in [*place.glob("bundle"), *place.glob("all/bundles/[!.]*")]:
        try:
            bundle = Bundle.open(folder, verify_all=True)
            state["bundle"] = bundle.manifest.name
            for engines in folder.glob("engines/*"):
                faults = (find_fault(bundle, stage, engines) for stage in bundle.manifest.stages)
                state["engines"] += [fault for fault in faults if fault]
        except GapError as error:
            state["bundle"] = f"broken: {error}"
            break
    for path in [*place.glob("answers.jsonl"), *place.glob("all/answers/*.jsonl")]:
        state["answers"] = count_answers(path)
        if state["answers"] not in {"empty", "0", "1", "2"}:
            break
    return state


def count_answers(path):
    """Rows of a file of answers, or why it cannot be gone on with."""
    from gap_runtime.errors import GapError
    from gap_runtime.evaluation.results import read_answers

    if not path.stat().st_size:
        return "empty"
    try:
        return str(len(read_answers(path).rows))
    except GapError as error:
        return str(error)


if __name__ == "__main__":
    main()
