"""The extras of gap-runtime name what the package registry has, for every kind of machine.

pip resolves them without installing anything, for another processor and Python than this one's.
"""

import json
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from tools.places import ROOT

_SOURCES = {
    "tensorrt-cu13": ("tensorrt-cu13-bindings",),
    "tensorrt-cu12": ("tensorrt-cu12-bindings",),
    "tensorrt-rtx-cu13": ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu13-libs"),
    "tensorrt-rtx-cu12": ("tensorrt-rtx-cu12-bindings", "tensorrt-rtx-cu12-libs"),
}
"""Packages that are no wheels but fetch some, and the wheels of theirs on the registry."""
_NEWEST_GLIBC = 39
CUDA_13 = ("gpu", "tensorrt", "rtx")
CUDA_12 = ("gpu-cu12", "tensorrt-cu12", "rtx-cu12")
PROJECT = tomllib.loads((ROOT / "runtime" / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]
OTHERS = tuple(extra for extra in EXTRAS if extra not in {*CUDA_13, *CUDA_12})
"""Those that have nothing to do with CUDA, of which a machine may have all."""
CASES = {
    **{
        (machine, python, OTHERS): {}
        for machine in ("x86_64", "aarch64")
        for python in ("3.12", "3.10")
    },
    ("x86_64", "3.12", CUDA_13): {"onnxruntime-gpu": ">=1.30", "cuda-python": "==13.*"},
    ("x86_64", "3.10", ("tensorrt", "rtx")): {"cuda-python": "==13.*"},
    ("x86_64", "3.12", CUDA_12): {"onnxruntime-gpu": "==1.26.*", "cuda-python": "==12.*"},
    ("x86_64", "3.10", CUDA_12): {"onnxruntime-gpu": "==1.23.*", "cuda-python": "==12.*"},
    ("aarch64", "3.12", CUDA_13): {"onnxruntime-gpu": ">=1.31", "cuda-python": "==13.*"},
    ("aarch64", "3.10", ("tensorrt", "rtx")): {"cuda-python": "==13.*"},
    ("aarch64", "3.10", "cuda-python==12.6.*"): {"cuda-python": "==12.6.*"},
    ("aarch64", "3.12", "cuda-python==13.2.*"): {"cuda-python": "==13.2.*"},
}
"""What is asked for, and versions that have to come of it. The last two are docs/jetson.md's."""


def list_requirements(asked, python):
    """What extras ask for with a Python, as wheels; a requirement is itself."""
    if isinstance(asked, str):
        return [asked]
    found = []
    for extra in asked:
        for each in map(Requirement, EXTRAS[extra]):
            if each.marker is None or each.marker.evaluate({"python_version": python}):
                names = _SOURCES.get(each.name, (each.name,))
                found += [f"{name}{each.specifier}" for name in names]
    return found


def resolve(case):
    """Versions by name, or what pip says."""
    machine, python, asked = case
    platforms = [f"manylinux_2_{k}_{machine}" for k in range(17, _NEWEST_GLIBC + 1)]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
    command += ["--quiet", "--disable-pip-version-check", "--report", "-", "--target", "nowhere"]
    command += ["--only-binary=:all:", "--python-version", python]
    for platform in (*platforms, f"manylinux2014_{machine}"):
        command += ["--platform", platform]
    done = subprocess.run(
        [*command, *list_requirements(asked, python)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    if done.returncode:
        return f"{done.stderr.strip()} (pip's exit code {done.returncode})"
    installed = json.loads(done.stdout)["install"]
    return {
        each["metadata"]["name"].replace("_", "-"): each["metadata"]["version"]
        for each in installed
    }


def _is_verdict(text):
    """Whether pip says of the packages that they do not fit, and not of the network."""
    refused = "No matching distribution" in text or "ResolutionImpossible" in text
    return refused and "connection" not in text.lower()


def list_cases():
    """Every case; pip asks the registry for seconds, so that all are for `make extras`."""
    for case in CASES:
        machine, python, asked = case
        name = asked if isinstance(asked, str) else "+".join(asked)
        yield pytest.param(case, id=f"{machine}-{python}-{name}", marks=pytest.mark.matrix)


@pytest.fixture(scope="module")
def resolved(request):
    """What pip makes of the cases of this run, asked side by side: it mostly waits."""
    items = [item for item in request.session.items if item.path == request.path]
    cases = [item.callspec.params["case"] for item in items if hasattr(item, "callspec")]
    with ThreadPoolExecutor(len(cases)) as pool:
        return dict(zip(cases, pool.map(resolve, cases), strict=True))


@pytest.mark.parametrize("case", list(list_cases()))
def test_they_resolve(case, resolved):
    found = resolved[case]
    if isinstance(found, str) and not _is_verdict(found):
        pytest.skip(f"pip does not get an answer from the registry: {found[-300:]}")
    assert isinstance(found, dict), found
    for name, versions in CASES[case].items():
        assert SpecifierSet(versions).contains(found[name]), found
    wanted = {Requirement(each).name for each in list_requirements(case[2], case[1])}
    assert wanted <= set(found)


def test_each_major_version_of_cuda_has_its_own_extras():
    for extra in CUDA_13:
        assert not [each for each in list_requirements([extra], "3.12") if "cu12" in each]
    for extra in CUDA_12:
        assert not [each for each in list_requirements([extra], "3.12") if "cu13" in each]
