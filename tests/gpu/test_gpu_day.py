"""The day with a GPU, rehearsed: every step of it runs on the CUDA of host memory.

Kernels compute nothing there, so answers are nonsense, and there is no cuDNN, which pictures of
bundles that are not for CUDA need. That every step runs to its end is looked at.
"""

import os
import re
import subprocess
import sys

import pytest
from tools import fake_cuda
from tools.places import ROOT

from benchmarks.gpu_day.__main__ import prepare

pytestmark = pytest.mark.gpu_contract


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    site, libraries = fake_cuda.prepare()
    folder = tmp_path_factory.mktemp("day") / "gpu-day"
    prepare(folder, python="3.12", layers=1, is_small=True)
    done = subprocess.run(
        [sys.executable, folder / "device.py", "--installed", "--minutes", "3"],
        env=os.environ
        | {"PYTHONPATH": f"{site}:{ROOT / 'runtime'}", "LD_LIBRARY_PATH": str(libraries)},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return (folder / "report.txt").read_text()


def test_every_step_runs_to_its_end(report):
    titles = re.findall(r"^== \d+ s: (.*)$", report, re.MULTILINE)
    assert titles[:3] == ["the machine", "doctor", "memory and copies"]
    assert titles[3:5] == ["cuda-float16 against PyTorch", "cpu-float32 against PyTorch"]
    assert titles[-1] == "where a step's time goes"
    assert report.endswith("== done\n")
    assert "Traceback" not in report
    assert "stopped after" not in report
    assert "left out" not in report


def test_what_it_says(report):
    assert "fresh memory is zero: True" in report
    assert "what was copied in comes out: True" in report
    assert re.search(r"GraphDecoder: loaded in .* step \d+\.\d+ ms", report)
    assert re.search(r"OnnxDecoder: loaded in .* draft of 8 rows", report)
    # Of the check of the bundle for the CPU; pictures of the one for CUDA need none.
    assert report.count("its convolution needs cuDNN on CUDA") == 1
    assert re.search(r"cuda-float16 again: first phrase \d", report)
    assert re.search(r"us a step  \w+", report)
