"""The harness that is led by coverage: it reaches code of ours, and tells what fails."""

import os
import re
import subprocess
import sys

import pytest
from tools.places import ROOT

pytest.importorskip("atheris")

TABLE = """
from fuzz import guided, parsers
parsers.PARSERS["table"] = lambda: lambda data: {}
guided.fuzz_one("table", ["-runs=40", "-artifact_prefix=failed-"])
"""


def fuzz(folder, *arguments):
    paths = map(str, (ROOT, ROOT / "runtime", ROOT / "tests"))
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )


def test_it_reaches_the_parser_and_ends_well(tmp_path):
    corpus = str(ROOT / "tests" / "fuzz" / "corpus" / "manifest")
    (tmp_path / "found").mkdir()
    options = ("-runs=30", "-artifact_prefix=failed-", "found", corpus)
    done = fuzz(tmp_path, "-m", "fuzz.guided", "--one", "manifest", *options)
    assert done.returncode == 0, done.stderr[-2000:]
    # Lines of the runtime are instrumented, without which nothing would be led.
    assert int(re.findall(r"cov: (\d+)", done.stderr)[-1]) > 100
    assert not list(tmp_path.glob("failed-*"))


@pytest.mark.parametrize("way", ["1 / 0", "None"])
def test_a_failure_is_told_and_kept(tmp_path, way):
    done = fuzz(tmp_path, "-c", TABLE.format(way))
    assert (done.returncode != 0) == (way != "None")
    assert bool(list(tmp_path.glob("failed-crash-*"))) == (way != "None")
