"""What OpenVINO compiled and keeps beside a bundle, damaged before it is loaded again.

Only devices other than the CPU keep anything; here the CPU is treated as one. Every case is a
process, as a library that is not ours may end it.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from tools.places import ROOT

from fuzz import mutations
from fuzz.bundles import remove
from fuzz.outcome import WrongResultError
from gap_runtime.bundle.bundle import Bundle
from gap_runtime.bundle.engines import ENGINES
from gap_runtime.bundle.manifest import VISION
from gap_runtime.errors import EngineError, GapError


def openvino(case):
    """The cache of OpenVINO's compiler, changed in its bytes or its files."""
    home = case.folder.parent / "compiled"
    shutil.copytree(case.source, home)
    right = ask(home)
    cache = home / ENGINES
    shutil.copytree(cache, home.with_name("compiled-right"))
    names = [path.relative_to(cache) for path in cache.rglob("*") if path.is_file()]
    if not names:
        raise AssertionError("OpenVINO kept nothing")

    def make(rng):
        name = rng.choice(names)
        way = rng.choice(("bytes",) * 8 + ("empty", "folder", "pipe", "unwritable"))

        def run():
            remove(cache)
            shutil.copytree(home.with_name("compiled-right"), cache)
            path = cache / name
            if way == "bytes":
                path.write_bytes(mutations.change_bytes(path.read_bytes(), rng))
            elif way == "empty":
                path.write_bytes(b"")
            elif way == "unwritable":
                path.parent.chmod(0o555)
            else:
                path.unlink()
                path.mkdir() if way == "folder" else os.mkfifo(path)
            if (found := ask(home)) != right:
                raise WrongResultError(f"{found} where {right} is right")

        return f"{name.name} {way}", run

    return make


def ask(bundle):
    """The hash of what the vision graph gives, by a process of its own."""
    places = (ROOT, ROOT / "runtime", ROOT / "tests")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "fuzz.compiled", str(bundle)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places))},
    )
    if done.returncode == EngineError.exit_code:
        raise EngineError(done.stderr.strip())
    if done.returncode:
        raise WrongResultError(f"exit {done.returncode}: {done.stderr[-1500:]}")
    return done.stdout


def answer(folder):
    """Print the hash of the outputs for grey pixels."""
    from gap_runtime.backends.openvino import session

    # Any other name, so that the CPU keeps what it compiles.
    session._CPU = "none"
    bundle = Bundle.open(folder)
    stage = next(each for each in bundle.manifest.stages if each.role == VISION)
    inputs = {each.name: np.full(each.shape, 0.5, np.float32) for each in stage.inputs}
    outputs = session.open_stage(bundle, stage, "cpu").run(inputs)
    found = b"".join(outputs[name].tobytes() for name in sorted(outputs))
    sys.stdout.write(hashlib.sha256(found).hexdigest())


if __name__ == "__main__":
    try:
        answer(Path(sys.argv[1]))
    except GapError as error:
        sys.stderr.write(str(error))
        sys.exit(error.exit_code)
